"""How torch.distributed is set up, and what that relies on in DeepSpeed."""

import os
from datetime import timedelta

import psutil
import pytest

from occult_train import distributed
from occult_train.errors import UserError
from occult_train.testing import run_distributed


def _built(rank: int) -> tuple[bool, str]:
    import deepspeed.comm.comm
    import torch.distributed

    return deepspeed.comm.comm.cdb.shm_comm_op is None, torch.distributed.get_backend()


def test_deepspeed_compiles_nothing_at_the_start() -> None:
    assert run_distributed(_built, 1) == [(True, "gloo")]


def test_deepspeed_asks_the_table_of_ops_that_we_change(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops
    from deepspeed.comm.torch import build_shm_op

    assert distributed.SHARED_MEMORY_OP in deepspeed.ops.__compatible_ops__
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, distributed.SHARED_MEMORY_OP, False)
    assert build_shm_op() is None


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that no launcher has touched; undone after the test, whatever it writes."""
    monkeypatch.setattr(os, "environ", {"PATH": "/nowhere"})
    return monkeypatch


def test_a_lone_process_becomes_a_world_of_one(bare: pytest.MonkeyPatch) -> None:
    distributed._become_single_rank_if_alone()
    assert [os.environ[name] for name in distributed.RANK_VARIABLES[:4]] == ["0", "1", "0", "127.0.0.1"]
    assert int(os.environ["MASTER_PORT"]) > 1024


@pytest.mark.parametrize("name", ["RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK"])
def test_ranks_of_a_launcher_are_left_alone(bare: pytest.MonkeyPatch, name: str) -> None:
    os.environ[name] = "2"
    distributed._become_single_rank_if_alone()
    assert "MASTER_ADDR" not in os.environ


def test_srun_without_mpi_is_refused(bare: pytest.MonkeyPatch) -> None:
    os.environ["SLURM_STEP_NUM_TASKS"] = "4"
    with pytest.raises(UserError, match=r"use srun --mpi=pmi2"):
        distributed._become_single_rank_if_alone()


def test_cores_are_shared_out_over_the_ranks_of_a_host(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    os.environ["LOCAL_SIZE"] = "8"
    distributed.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["PATH"].endswith(":/nowhere")
    del os.environ["OMP_NUM_THREADS"]
    os.environ["LOCAL_SIZE"] = "4"
    distributed.prepare_environment()
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    "name, size, expected",
    [
        ("127.0.0.1", "2", "127.0.0.1"),
        ("127.0.0.1", "4", "127.0.0.1"),
        ("localhost", "4", ""),  # where the ranks of another host would look at themselves
        ("192.0.2.1", "4", ""),  # of documentation, of no host
        ("no.such.host.invalid", "4", ""),
    ],
)
def test_the_store_is_served_at_an_address_of_this_host_that_others_find(
    bare: pytest.MonkeyPatch, name: str, size: str, expected: str
) -> None:
    os.environ.update(LOCAL_SIZE="2", WORLD_SIZE=size)
    assert distributed._own_address(name) == expected


def test_rank_0_alone_serves_the_store_and_listens_at_its_address_alone(bare: pytest.MonkeyPatch) -> None:
    port = distributed.free_port()
    os.environ.update(LOCAL_SIZE="2", WORLD_SIZE="2", RANK="1")
    with distributed._store_at("127.0.0.1", port, timedelta(seconds=10)):
        assert distributed.AGENT_STORE not in os.environ
    os.environ["RANK"] = "0"
    with distributed._store_at("127.0.0.1", port, timedelta(seconds=10)):
        assert os.environ[distributed.AGENT_STORE] == "True"
        own = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert [(address.ip, address.port) for address in own if address.port == port] == [("127.0.0.1", port)]
        with pytest.raises(UserError, match=f"port {port} is in use"):
            distributed._listen("127.0.0.1", port)
    assert distributed.AGENT_STORE not in os.environ
    distributed._stores.clear()


def test_where_rank_0_cannot_choose_it_says_so(bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.update(LOCAL_SIZE="1", WORLD_SIZE="2", RANK="0")
    with distributed._store_at("192.0.2.1", 29500, timedelta(seconds=10)):
        assert distributed.AGENT_STORE not in os.environ
    expected = "MASTER_ADDR=192.0.2.1 is no IPv4 address of this host for others, so rank 0 listens on all\n"
    assert capsys.readouterr().err == expected
