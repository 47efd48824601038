"""Several corpora read as one, in fixed proportions.

Corpus c gives its k-th sample at the moment (k + 1/2) / w_c, and samples come in the order of their moments. At moment
t corpus c has thus given round(w_c * t) samples and all of them together about t: which corpus sample i is of follows
from the weights and i without a walk through the samples before it.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from occult_train.data.samples import GPTDataset, Sample
from occult_train.errors import DataError

CHUNK = 1 << 16
"""Moments, and so about as many samples, that are put in order at a time."""
CHUNKS_KEPT = 4


class BlendSchedule:
    """Which corpus each sample of a blend is of, and the how-manieth sample of that corpus it is.

    Among the first i samples, a corpus of weight w has between w*i - n and w*i + n, where n is the number of corpora.

    Args:
        weights: positive and finite, of any sum.

    Raises:
        DataError: a weight is zero, negative or not finite, or there is none.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights:
            raise DataError("data.blend names no corpus")
        for weight in weights:
            if not (math.isfinite(weight) and weight > 0):
                raise DataError(f"data.blend has the weight {weight}; weights must be positive")
        total = math.fsum(weights)
        self.weights: NDArray[np.float64] = np.array([weight / total for weight in weights])
        self._chunks: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def __getitem__(self, index: int) -> tuple[int, int]:
        """`(corpus, sample of that corpus)` for sample `index` of the blend."""
        if index < 0:
            raise IndexError(f"sample {index} is negative")
        chunk = index // CHUNK
        while self._start(chunk) > index:
            chunk -= 1
        while self._start(chunk + 1) <= index:
            chunk += 1
        corpora, samples = self._chunk(chunk)
        at = index - self._start(chunk)
        return int(corpora[at]), int(samples[at])

    def _given(self, chunk: int) -> NDArray[np.int64]:
        """Samples [corpora] that each corpus has given when a chunk begins."""
        return np.floor(self.weights * (chunk * CHUNK) + 0.5).astype(np.int64)

    def _start(self, chunk: int) -> int:
        """The first sample of a chunk."""
        return int(self._given(chunk).sum())

    def _chunk(self, chunk: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Corpus and sample number [samples of the chunk], in order; the last few chunks asked for are kept."""
        if chunk not in self._chunks:
            first, last = self._given(chunk), self._given(chunk + 1)
            corpora = np.repeat(np.arange(len(self.weights)), last - first)
            samples = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
            moments = (samples + 0.5) / self.weights[corpora]
            order = np.lexsort((corpora, moments))
            self._chunks[chunk] = corpora[order], samples[order]
            while len(self._chunks) > CHUNKS_KEPT:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk]


class BlendedDataset:
    """Endless training samples of several corpora; `dataset[i]` is a pure function of them, their weights and i."""

    def __init__(self, datasets: Sequence[GPTDataset], weights: Sequence[float]) -> None:
        if len(datasets) != len(weights):
            raise ValueError(f"{len(datasets)} corpora have {len(weights)} weights")
        self.datasets = list(datasets)
        self.schedule = BlendSchedule(weights)

    @property
    def remarks(self) -> list[str]:
        """Those of its corpora."""
        return [line for dataset in self.datasets for line in dataset.remarks]

    @property
    def has_examples(self) -> bool:
        """Whether not all labels count in some corpus."""
        return any(dataset.has_examples for dataset in self.datasets)

    def __getitem__(self, index: int) -> Sample:
        corpus, sample = self.schedule[index]
        return self.datasets[corpus][sample]
