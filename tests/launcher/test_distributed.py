"""How torch.distributed is set up, and what that relies on in DeepSpeed."""

import os

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
