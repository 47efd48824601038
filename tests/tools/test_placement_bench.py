"""What placement is measured with: annealing, forced routing, networks with limited links."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from occult_train.errors import UserError
from occult_train.moe.costs import cost, groups_of_tokens
from occult_train.moe.placement import Placement
from occult_train.moe.solver import solution
from occult_train.moe.synthetic import clustered, statistics_of
from occult_train.tools.bench.anneal import Annealer
from occult_train.tools.bench.networks import limited
from occult_train.tools.bench.pilot import LEAST_R, Task, choices, fitted, tasks_of


def test_annealing_finds_what_the_solver_finds() -> None:
    statistics = statistics_of(clustered(300, 12, 3, 3, 2.0), 12)
    solved = solution("hypergraph", statistics, 3, load_bound=1.3)
    annealed = Annealer(statistics, 3, 1.3, seed=0).run(1.0)
    assert annealed.proposals > 1000
    assert annealed.c_t == pytest.approx(cost(statistics, solved.placement, 3).c_t, rel=1e-9)


def test_annealing_keeps_its_books() -> None:
    statistics = statistics_of(clustered(200, 12, 3, 3, 1.0, seed=2), 12)
    annealer = Annealer(statistics, 4, 2.0, seed=1)

    def total() -> float:
        placement = Placement(tuple(torch.from_numpy(annealer.device_E).argsort(stable=True).tolist()))
        return cost(statistics, placement, 4).c_t * 200

    before = total()
    for _ in range(50):
        a, b = annealer.pair()
        before += annealer.change(a, b)
        annealer.exchange(a, b)
    assert total() == pytest.approx(before)


@pytest.mark.parametrize("mean", [1.0, 2.25, 4.0])
def test_forced_routing_needs_that_many_devices(mean: float) -> None:
    task = Task("forced", mean, tuple(range(16)), 64, 8, 16, 4, 1)
    sets_TK = choices(task, 4, rank=0)
    assert sets_TK.shape == (64, 4)
    assert all(len(set(row)) == 4 for row in sets_TK.tolist())
    used = groups_of_tokens(sets_TK, torch.arange(16) // 4, 4)
    assert float(used.double().mean()) == mean
    assert used.unique().numel() <= 2
    assert not torch.equal(sets_TK, choices(task, 4, rank=1))


def test_points_of_the_study() -> None:
    tasks = tasks_of(4, 32, 8, 16, 4, 1)
    assert [task.devices_a_token for task in tasks][:8:7] == [1, 4]
    assert [task.name for task in tasks[8:]] == ["unplaced", "placed"]
    assert tasks[-1].slots != tasks[-2].slots


def test_line_through_points() -> None:
    rows = [{"c_t": x, "ms": 3 * x + 1} for x in (1.0, 2.0, 4.0)]
    assert fitted(rows) == pytest.approx((3, 1, 1))


def test_networks_without_iproute2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install iproute2"), limited(2, "100mbit"):
        pass


def test_networks_that_fail_are_named_and_taken_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for `ip` that notes what it is asked for and knows no `netns`."""
    notes = tmp_path / "notes"
    (tmp_path / "ip").write_text(
        f'#!/bin/sh\necho "$@" >> {notes}\n[ "$1" != netns ] || {{ echo "no right" >&2; exit 1; }}\n'
    )
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"`ip netns add .*` failed.*no right"), limited(2, "100mbit"):
        pass
    asked = [line for line in notes.read_text().splitlines() if not {"list", "show"} & {*line.split()}]
    assert asked[0].startswith("link add ob")
    assert asked[-1].startswith("link del ob")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="networks for ranks need root")
def test_time_is_linear_in_c_t() -> None:
    command = [sys.executable, "-m", "occult_train.tools.bench.pilot", "--ranks", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout.rsplit("r = ", 1)[1]) >= LEAST_R
