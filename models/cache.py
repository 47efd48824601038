"""Keys and values of the positions that a model has seen, so that each is computed once.

B batch, N key-value heads, S new positions, C columns, D width of a head. Rows of different lengths are padded on the
left: all end in the same column, and a row's positions are counted from its own first token.
"""

import torch
from torch import Tensor

from occult_train.models.attention import Positions, turned
from occult_train.models.config import ModelConfig


class KVCache:
    """Of all layers; `GPT.forward` fills it."""

    def __init__(self, config: ModelConfig, pads: list[int], columns: int, like: Tensor) -> None:
        """Room for `columns` columns.

        Args:
            pads: columns of each row [B] that stand before its first token.
            like: a tensor of the device and type of keys and values.
        """
        self.config, self.columns, self.length = config, columns, 0
        self.pad_B = torch.tensor(pads, device=like.device)
        self._least, self._padded = min(pads), any(pads)
        shape = (len(pads), config.kv_heads, columns, config.dim_per_head)
        self.keys = [like.new_empty(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_empty(shape) for _ in range(config.num_hidden_layers)]

    def positions(self, input_ids: Tensor) -> Positions:
        """Rotations of the next columns, and which columns each of them sees.

        Args:
            input_ids: [B, S], what follows.

        Raises:
            ValueError: another batch, no room, or a row outgrows max_position_embeddings.
        """
        batch, new = input_ids.shape
        end, limit = self.length + new, self.config.max_position_embeddings
        if batch != len(self.pad_B):
            raise ValueError(f"a batch of {batch} rows, the cache holds {len(self.pad_B)}")
        if end > self.columns:
            raise ValueError(f"{end} columns, the cache has room for {self.columns}")
        if end - self._least > limit:
            raise ValueError(f"sequence of {end - self._least} is longer than max_position_embeddings={limit}")
        query_S = torch.arange(self.length, end, device=input_ids.device)
        pads_B = self.pad_B if self._padded else self.pad_B[:1]
        cos, sin = turned(self.config, (query_S - pads_B[:, None]).clamp(min=0))
        if not self._padded and (new == 1 or not self.length):
            return Positions(cos, sin, None, causal=new > 1)
        column_C = torch.arange(end, device=input_ids.device)
        seen_SC = column_C <= query_S[:, None]
        # padding sees itself: a softmax over nothing would be NaN
        known_BSC = (column_C >= pads_B[:, None])[:, None] | (column_C == query_S[:, None])
        return Positions(cos, sin, (seen_SC & known_BSC)[:, None])

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values [B, N, S, D]; returns all so far [B, N, C, D]."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, new: int) -> None:
        """All layers have their share of `new` columns."""
        self.length += new
