"""`occult bench pair`: traces drawn by hand, what is asked of them, and a dry run of every system."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from occult_train.errors import UserError
from occult_train.launcher import cli
from occult_train.testing import requires_gpu, run_distributed
from occult_train.tools.bench.breakdown import Kernel, with_waiting
from occult_train.tools.bench.pair_figure import draw
from occult_train.tools.bench.pair_report import lines, timeline
from occult_train.tools.bench.pair_systems import PAIR_SYSTEMS, Preset, pair_flops
from occult_train.tools.bench.shapes import PairTask
from occult_train.tools.bench.timeline import common, phases, record, split, union

# --- traces


def test_a_trace_drawn_by_hand() -> None:
    r"""
    computing      |===|  |=====|     0-4, 7-13 (two at once from 8 to 9)
    communication    |======|   |==|  2-10, 12-15; of a copy's exchange the pieces 12-13 and 13.05-15
    """
    kernels = [
        Kernel("nvjet", 0, 4000),
        Kernel("ncclDevKernel_SendRecv", 2000, 10000),
        Kernel("nvjet", 7000, 13000),
        Kernel("silu", 8000, 9000),
        Kernel("Memcpy DtoH", 12000, 13000),
        Kernel("Memcpy HtoD", 13050, 15000),
    ]
    parts = split(kernels)
    assert (parts.computing, parts.communication, parts.exposed, parts.idle) == (10.0, 11.0, 5.0, 0.0)
    assert parts.hidden == pytest.approx(6 / 11)
    alone = split([Kernel("nvjet", 0, 1000), Kernel("nvjet", 3000, 4000)])
    assert (alone.computing, alone.communication, alone.idle, alone.hidden) == (2.0, 0.0, 2.0, 1.0)


def test_kernels_that_write_into_peers_memory_communicate_where_the_transport_does() -> None:
    kernels = [Kernel("_pack_kernel", 0, 1000), Kernel("_expand_kernel", 500, 2000)]
    assert split(kernels).communication == 0.0
    assert (split(kernels, one_sided=True).communication, split(kernels, one_sided=True).exposed) == (1.0, 0.5)


def test_unions_and_what_they_have_in_common() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert union([(0, 1), (2, 3), (9, 10)], gap=1) == [(0, 3), (9, 10)]
    assert common([(0, 4), (6, 9)], [(1, 2), (3, 7), (8, 20)]) == 1 + 1 + 1 + 1
    assert common([], [(0, 1)]) == 0


def test_phases_lie_between_marks_and_take_turns() -> None:
    def mark(at: float) -> Kernel:
        return Kernel("at::cuda::spin_kernel(long)", at, at + 200)

    kernels = [mark(0), mark(1000), mark(2000), mark(3000), mark(4000)]
    kernels += [Kernel(f"k{at}", at, at + 5) for at in (220, 500, 1210, 2230, 3220)]
    found = phases(kernels, ["forward", "backward"])
    names = {phase: [[k.name for k in run] for run in runs] for phase, runs in found.items()}
    assert names == {"forward": [["k220", "k500"], ["k2230"]], "backward": [["k1210"], ["k3220"]]}
    with pytest.raises(RuntimeError, match="4 marks"):
        phases(kernels[1:], ["forward", "backward"])


def test_waiting_for_peers_is_communication_until_the_mark_that_ends_it() -> None:
    """It began behind the last write into their memory, or with the mark if that overlaps the write."""
    kernels = [
        Kernel("nvjet", 0, 4000),
        Kernel("_pack_kernel", 1000, 2000),
        Kernel("spin_kernel(long)", 5000, 5002),
        Kernel("_share_kernel", 6000, 6500),
        Kernel("spin_kernel(long)", 6400, 6402),
        Kernel("spin_kernel(long)", 9000, 9002),
    ]
    found = with_waiting(kernels)
    assert [(k.name, k.start, k.end) for k in found if k.name == "barrier"] == [
        ("barrier", 2000, 5002),
        ("barrier", 6400, 6402),
        ("barrier", 9000, 9002),
    ]
    parts = split(found, one_sided=True)
    assert (parts.communication, parts.exposed) == (pytest.approx(4.504), pytest.approx(1.504))


@pytest.mark.gpu
@requires_gpu
def test_what_runs_on_a_gpu_is_recorded_by_phase() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    host = torch.empty(2048, 2048, pin_memory=True)

    def copy_beside() -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            host.copy_(a, non_blocking=True)
        a @ a @ a @ a
        torch.cuda.current_stream().wait_stream(side)

    found = record({"multiply": lambda: a @ a, "copy": lambda: host.copy_(a), "both": copy_beside}, repetitions=3)
    parts = {phase: [split(kernels) for kernels in runs] for phase, runs in found.items()}
    assert {phase: len(runs) for phase, runs in parts.items()} == {"multiply": 3, "copy": 3, "both": 3}
    assert all(part.computing > 0 and part.communication == 0 for part in parts["multiply"])
    assert all(part.exposed == part.communication > 0 for part in parts["copy"])
    assert all(part.hidden > 0.2 for part in parts["both"])


# --- what is asked of them


def row(
    system: str, train_ms: float, inference_ms: float, preset: str = "gpt2_moe_medium", **parts: Any
) -> dict[str, Any]:
    """parts: of each phase computing, communication, exposed."""
    found: dict[str, Any] = {"system": system, "preset": preset, "p2p": "off", "ranks": 2, "tokens": 64}
    found |= {"gpu": "drawn", "torch": "0", "train_ms": train_ms, "inference_ms": inference_ms}
    for phase, values in parts.items():
        found |= {f"{phase}_{n}_ms": v for n, v in zip(("computing", "communication", "exposed"), values, strict=True)}
    if parts:
        span = [("computing", 0.0, 1000.0, "nvjet"), ("communication", 500.0, 2000.0, "nccl")]
        found["timeline"] = dict.fromkeys(("forward", "backward", "inference"), span)
    return found


ROWS = [
    row("overlapped", 10.0, 3.0, forward=(3, 2, 0.4), backward=(6, 4, 1.2), inference=(3, 2, 0.5)),
    row("sequential", 14.0, 5.0),
    row("top2:transport=collective", 19.0, 7.0),
    row("top2", 12.0, 4.5, forward=(4, 2, 2), backward=(8, 4, 2.8), inference=(4, 2, 2)),
    row("autoep", 18.5, 9.0),
]


def test_thresholds_follow_from_the_trace_of_the_fastest_top2() -> None:
    """R = (12 + 4.8) / 12 = 1.4 in training, (4 + 2) / 4 = 1.5 in inference; P2P off asks for 3/4 of it above 1."""
    found = {line.what: line for line in lines(ROWS)}
    hidden = {phase: found[f"communication hidden, {phase}"] for phase in ("forward", "backward", "inference")}
    assert [(round(line.got, 9), line.least) for line in hidden.values()] == [(0.8, 0.75), (0.7, 0.75), (0.75, None)]
    assert [line.verdict for line in hidden.values()] == ["reached", "missed", ""]
    train, inference = (found[f"times as fast as top2, {kind}"] for kind in ("train", "inference"))
    assert (train.got, train.least, train.how, train.verdict) == (1.2, pytest.approx(1.3), "R = 1.400", "missed")
    assert (inference.got, inference.least, inference.verdict) == (1.5, pytest.approx(1.375), "reached")
    assert found["times as fast as sequential, train"].least is None
    autoep = found["times as fast as autoep, train"]
    assert (autoep.got, autoep.least, autoep.verdict) == (1.85, 1.8, "reached")


def test_over_nvlink_other_shares_are_asked_and_of_other_presets_nothing_against_autoep() -> None:
    rows = [r | {"p2p": "on", "preset": "gpt3_moe_xl"} for r in ROWS]
    found = {line.what: line for line in lines(rows)}
    assert found["communication hidden, forward"].least == 0.9
    assert found["times as fast as top2, train"].least == pytest.approx(1.24)
    assert found["times as fast as autoep, train"].least is None
    assert lines(rows[1:]) == []
    assert [line.what for line in lines([row("overlapped", 1.0, 1.0), {"preset": "x", "system": "top2"}])] == []


def test_the_trace_is_json_and_drawn(tmp_path: Path) -> None:
    found = json.loads(json.dumps(timeline(ROWS)))
    assert [trace["system"] for trace in found["traces"]] == ["overlapped", "top2"]
    assert found["traces"][0]["forward"][1] == ["communication", 500.0, 2000.0, "nccl"]
    draw(found, tmp_path / "pair.png")
    assert (tmp_path / "pair.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"--figure=.*\.nope"):
        draw(found, tmp_path / "pair.nope")
    with pytest.raises(UserError, match="neither top2 nor overlapped"):
        draw({"traces": []}, tmp_path / "pair.png")


# --- pairs


@pytest.mark.parametrize("name", ["gpt2_moe_medium", "gpt3_moe_xl", "llama2_moe"])
def test_a_preset_is_cut_to_two_blocks_of_equal_flops(name: str) -> None:
    preset = Preset.read(name)
    assert preset.shortcut.moe_layers == preset.top2.moe_layers == ([0, 1] if name == "llama2_moe" else [1])
    assert preset.of("overlapped:schedule=1") is preset.of("sequential") is preset.shortcut
    assert preset.of("autoep") is preset.of("top2") is preset.top2
    flops = [pair_flops(model, preset.sequence) for model in (preset.shortcut, preset.top2)]
    assert flops[0] == pytest.approx(flops[1], rel=1e-3)


TINY = """
model: {{hidden_size: 16, intermediate_size: 12, num_hidden_layers: 4, num_attention_heads: 2, qk_norm: none,
        num_experts: 4, num_experts_per_tok: {k}, dense_intermediate_size: 20, {more}}}
parallel: {{expert: 2}}
data: {{sequence_length: 8}}
train: {{micro_batch_size: 3, global_batch_size: 6}}
"""
SHORTCUT = "shared_expert_intermediate_size: 8, scmoe: {{block: scmoe, position: {position}, every: {every}}}"


def measure_tiny(_rank: int, folder: str) -> list[dict[str, Any]]:
    from occult_train.tools.bench import measure_pair, pair_systems

    pair_systems.PRESETS = Path(folder)
    tasks = [PairTask(system, name, 0, 0, 2, 0.005) for name in ("pairs", "every") for system in PAIR_SYSTEMS]
    rows = [measure_pair.measure(task) for task in [*tasks, PairTask("top2:chunks=1", "pairs", 0, 0, 2, 0.005)]]
    measure_pair.LIMITS = dict.fromkeys(measure_pair.LIMITS, 1e-12)
    return [*rows, measure_pair.measure(PairTask("autoep", "pairs", 2, 4, 2, 0.005))]


def test_every_system_is_right_and_measured(tmp_path: Path) -> None:
    for name, position, every in (("pairs", "pos2", 2), ("every", "pos1", 1)):
        (tmp_path / f"{name}.yaml").write_text(TINY.format(k=1, more=SHORTCUT.format(position=position, every=every)))
        dense = "dense_layers: [0, 2]" if every == 2 else "dense_layers: []"
        (tmp_path / f"{name}_top2.yaml").write_text(TINY.format(k=2, more=dense))
    *rows, unknown, wrong = run_distributed(measure_tiny, 2, str(tmp_path), timeout=240)[0]
    assert [(r["preset"], r["system"]) for r in rows] == [(p, s) for p in ("pairs", "every") for s in PAIR_SYSTEMS]
    for found in rows:
        assert "error" not in found, found
        assert (found["tokens"], found["sequence"]) == (24, 8)
        assert min(found["train_ms"], found["inference_ms"]) > 0
        assert max(found[f"error_{name}"] for name in ("y", "dx", "dw")) < 1e-5
    assert "shortcut experts: in gap" in rows[0]["note"]
    assert rows[1]["note"] == "reference backend"
    assert unknown["error"].startswith("system 'top2:chunks=1': options are matmul, transport, overlap, schedule")
    assert wrong["error"].startswith("not right: ")
    assert "train_ms" not in wrong
    assert (wrong["tokens"], wrong["sequence"]) == (8, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "gpt4"], "error: preset 'gpt4' is not one of gpt2_moe_medium, gpt2_moe_small, gpt3_moe_xl"),
        (["--system", "top3"], "error: system 'top3' is not one of overlapped, sequential, top2, autoep"),
        (["--p2p", "no"], "error: --p2p=no is neither on nor off"),
    ],
)
def test_a_users_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["occult", "bench", "pair", "--cpu", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
