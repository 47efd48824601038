"""`run_distributed` itself: results, errors, deaths and time limits."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from occult_train.testing import RankError, requires_gpu, requires_gpus, run_distributed


def _sum_of_ranks(rank: int, offset: int) -> dict[str, torch.Tensor | int | str]:
    import deepspeed

    value = torch.tensor([rank + offset])
    deepspeed.comm.all_reduce(value)
    assert not torch.cuda.is_available()
    return {"sum": value, "local": int(os.environ["LOCAL_RANK"]), "threads": torch.get_num_threads()}


def _raise_on_last(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        raise ValueError("only this rank")
    dist.barrier()


def _die_on_last(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _sleep(rank: int) -> None:
    time.sleep(60)


def _flavour(rank: int) -> str:
    return os.environ["OCCULT_TEST_FLAVOUR"]


def test_results_come_back_in_rank_order() -> None:
    results = run_distributed(_sum_of_ranks, 3, 10)
    assert [r["local"] for r in results] == [0, 1, 2]
    assert all(r["sum"].item() == 33 and r["threads"] == 1 for r in results)


def test_the_environment_of_the_caller_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCCULT_TEST_FLAVOUR", "salt")
    assert run_distributed(_flavour, 1) == ["salt"]
    monkeypatch.setenv("OCCULT_TEST_FLAVOUR", "sweet")
    assert run_distributed(_flavour, 1) == ["sweet"]


def _device_of_rank(rank: int) -> tuple[int, str]:
    value = torch.ones(1, device="cuda")
    dist.all_reduce(value)
    return value.device.index, dist.get_backend()


@pytest.mark.gpu
@requires_gpus(2)
def test_nccl_gives_each_rank_its_gpu() -> None:
    assert run_distributed(_device_of_rank, 2, backend="nccl") == [(0, "nccl"), (1, "nccl")]


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed.*_raise_on_last.*ValueError: only this rank"):
        run_distributed(_raise_on_last, 2)
    assert time.monotonic() - start < 20


def test_a_killed_rank_does_not_leave_the_others_hanging() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 ended with exit code -9"):
        run_distributed(_die_on_last, 2)
    assert time.monotonic() - start < 20


def test_time_is_limited() -> None:
    with pytest.raises(RankError, match=r"did not end within 3 s"):
        run_distributed(_sleep, 2, timeout=3)


def test_gpu_marks_say_what_is_missing() -> None:
    assert "needs a CUDA GPU" in requires_gpu.kwargs["reason"]
    assert "needs 64 CUDA GPUs; this machine has" in requires_gpus(64).kwargs["reason"]
