"""For kernel tests: the device they run on, and memory that nobody wrote filled with what nobody would write."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from occult_train.kernels.tuning import INTERPRETED


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here: a GPU, or in Triton's interpreter on the CPU."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors made empty hold NaN, and integers their least value, until somebody writes them."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.dtype == torch.bool:
                return out
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poison(getattr(Tensor, name)))
