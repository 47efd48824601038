"""From options to the `deepspeed` command."""

import re
from pathlib import Path

import pytest

from occult_train.config import Config
from occult_train.errors import UserError
from occult_train.launcher import hostfile, passed, plan
from occult_train.launcher.plan import Options


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU machine that is called here, with pdsh, whose ssh reaches nobody but `there`."""
    monkeypatch.setattr(plan, "count_gpus", lambda: 0)
    monkeypatch.setattr(plan, "_ssh", _fake_ssh)
    monkeypatch.setattr(plan.shutil, "which", lambda name: f"/bin/{name}" if name == "pdsh" else None)
    monkeypatch.setattr(hostfile, "is_this_machine", lambda host: host in ("localhost", "here"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def _fake_ssh(host: str, command: str) -> str:
    if host != "there":
        raise UserError(f"host {host} cannot be reached by ssh without a password: No route to host")
    return "10.0.0.7 172.17.0.1\n" if command == "hostname -I" else ""


def _config(expert: int = 1) -> Config:
    config = Config()
    config.parallel.expert = expert
    config.train.global_batch_size = 24
    return config


def _hosts(folder: Path, *hosts: str) -> str:
    path = folder / "hosts"
    path.write_text("".join(f"{host} slots=2\n" for host in hosts))
    return str(path)


def _with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(plan, "count_gpus", lambda: count)


def test_cpu_takes_as_many_ranks_as_expert_parallelism() -> None:
    made = plan.make(_config(4), Options())
    assert (made.ranks, made.multi_host, made.flags[0], made.flags[-1]) == (
        4,
        False,
        "--num_gpus=4",
        "--log_level=critical",
    )
    assert made.announcement == "starting 4 ranks on CPU (parallel.expert=4)"
    assert plan.make(_config(), Options(num_gpus=2, verbose=True)).announcement.endswith(
        "2 ranks on CPU (--num-gpus=2)"
    )


def test_gpus_are_all_taken_and_visible_devices_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_gpus(monkeypatch, 4)
    assert plan.make(_config(), Options()).flags[0] == "--include=localhost:0,1,2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7,2,3")
    assert plan.make(_config(), Options(num_gpus=2)).flags[0] == "--include=localhost:6,7"
    with pytest.raises(UserError, match=r"--num-gpus=8 but host localhost has 4"):
        plan.make(_config(), Options(num_gpus=8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ab12")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES=GPU-ab12: .* device numbers only"):
        plan.make(_config(), Options())


def test_ranks_are_checked_against_the_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 ranks are not divisible by parallel.expert=2"):
        plan.make(_config(2), Options(num_gpus=3))
    with pytest.raises(UserError, match=r"global_batch_size=24 is not divisible by .* 16 ranks"):
        plan.make(_config(), Options(num_gpus=16))


def test_a_hostfile_that_lists_this_machine_alone_needs_no_ssh(tmp_path: Path) -> None:
    made = plan.make(_config(), Options(hostfile=_hosts(tmp_path, "localhost")))
    assert {"--no_ssh_check", "--master_addr=127.0.0.1"} < set(made.flags)
    assert not made.multi_host
    assert made.ranks == 2


def test_more_slots_than_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _with_gpus(monkeypatch, 1)
    with pytest.raises(UserError, match=r"host here has 2 slots but 1 GPUs"):
        plan.make(_config(), Options(hostfile=_hosts(tmp_path, "here")))


def test_a_lone_remote_host_is_not_started_here(tmp_path: Path) -> None:
    made = plan.make(_config(), Options(hostfile=_hosts(tmp_path, "here", "there"), include="there"))
    assert {"--force_multi", "--master_addr=10.0.0.7", "--include=there"} < set(made.flags)
    assert made.multi_host


def test_hosts_are_reached_before_anything_starts(tmp_path: Path) -> None:
    hosts = _hosts(tmp_path, "here", "gone")
    with pytest.raises(UserError, match=r"host gone cannot be reached by ssh"):
        plan.make(_config(), Options(hostfile=hosts))
    made = plan.make(_config(), Options(hostfile=hosts, no_ssh_check=True, master_addr="10.0.0.1", master_port=29600))
    assert {"--launcher=pdsh", "--master_addr=10.0.0.1", "--master_port=29600"} < set(made.flags)
    assert made.ranks == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"launcher": "openmpi"}, r"--launcher=openmpi needs ompi_info, which is not on PATH"),
        ({"launcher": "pssh"}, r"--launcher=pssh is not one of pdsh, openmpi"),
        ({"deepspeed_args": "--num_gpus=3"}, r"--deepspeed-args: --num_gpus is an option of"),
        ({"deepspeed_args": "--quiet --nonsense"}, r"--deepspeed-args: unrecognized arguments: --nonsense"),
        ({"deepspeed_args": "train.py"}, r"--deepspeed-args: unrecognized arguments: train.py"),
        ({"deepspeed_args": "--ssh_port"}, r"--deepspeed-args: argument --ssh_port: expected one argument"),
        ({"deepspeed_args": "--bind_cores_to_rank"}, r"--bind_cores_to_rank needs numactl, which is not on PATH"),
        ({"deepspeed_args": "-H other"}, r"--deepspeed-args: -H is an option of"),
        ({"deepspeed_args": "'open"}, r"--deepspeed-args='open: No closing quotation"),
    ],
)
def test_launchers_and_flags_that_cannot_work(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.make(_config(), Options(hostfile=_hosts(tmp_path, "here", "there"), **options))


def test_launchers_without_filters_are_given_the_hosts_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.shutil, "which", lambda name: f"/bin/{name}")
    hosts = _hosts(tmp_path, "here", "there")
    for launcher, options, expected in (
        ("mpich", {"include": "here:0@there:0"}, "here slots=1\nthere slots=1\n"),
        ("openmpi", {"exclude": "there:1"}, "here slots=2\nthere slots=1\n"),
        ("mpich", {"include": "there"}, "there slots=2\n"),
        ("openmpi", {"num_nodes": 2, "num_gpus": 1}, "here slots=1\nthere slots=1\n"),
    ):
        made = plan.make(_config(), Options(hostfile=hosts, launcher=launcher, **options))
        assert made.hostfile == expected
        assert not [flag for flag in made.flags if flag.startswith(("--hostfile", "--include", "--exclude", "--num"))]
    assert plan.make(_config(), Options(hostfile=hosts, launcher="mpich")).hostfile == ""
    assert plan.make(_config(), Options(hostfile=hosts, include="there:1")).hostfile == "", "pdsh filters itself"
    alone = plan.make(_config(), Options(hostfile=hosts, launcher="mpich", include="here:1"))
    assert (alone.hostfile, alone.multi_host) == ("", False)
    message = (
        r"--launcher=mpich starts ranks on the first slots of a host, and --include=there:1 leaves there slots 1; use"
    )
    with pytest.raises(UserError, match=message):
        plan.make(_config(), Options(hostfile=hosts, launcher="mpich", include="there:1"))


@pytest.mark.parametrize("options", [{"num_nodes": 2}, {"force_multi": True}])
def test_nodes_without_a_hostfile(options: dict) -> None:
    with pytest.raises(UserError, match=r"several nodes need --hostfile"):
        plan.make(_config(), Options(**options))


def test_further_flags_of_deepspeed_come_last() -> None:
    made = plan.make(_config(), Options(deepspeed_args="--enable_each_rank_log 'my logs' --save_pid"))
    assert made.flags[-3:] == ["--enable_each_rank_log", "my logs", "--save_pid"]


def test_all_flags_of_deepspeed_are_known(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher.runner import parse_args

    monkeypatch.setattr("sys.argv", ["deepspeed"])
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    theirs = set(re.findall(r"(?<![\w-])--?[a-z]\w*", capsys.readouterr().out.split("options:")[0]))
    assert "--save_pid" in theirs
    assert theirs - {"-h"} <= {*passed.SWITCHES, *passed.WITH_VALUE, *passed.OWN, *passed.UNUSABLE}
