"""Shuffles that never change."""

import numpy as np
from numpy.typing import NDArray


def permutation(length: int, *key: int) -> NDArray[np.int64]:
    """A shuffle of 0 to length - 1 that depends on `key` alone, on any machine and in any version of numpy.

    Sorting raw Philox words is used because numpy promises their values for ever, unlike those of `Generator`.
    """
    words = np.random.Philox(np.random.SeedSequence([k % 2**64 for k in key])).random_raw(length)
    return np.argsort(words, kind="stable")
