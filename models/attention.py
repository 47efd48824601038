"""Grouped-query attention with rotary positions. B batch, S sequence, N heads, D width of a head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from occult_train.kernels.rotary.autograd import rotate
from occult_train.models.config import ModelConfig
from occult_train.models.norm import BranchNorm, RMSNorm
from occult_train.models.recompute import Run


@dataclass(frozen=True)
class Positions:
    """What attention knows of the sequence: rotations, and the mask where documents are kept apart."""

    cos: Tensor
    """[B or 1, 1, S, D]"""
    sin: Tensor
    mask: Tensor | None
    """[B, 1, S, S] bool, True where attended; None for plain causal attention. With cached keys [B, 1, S, C]."""
    causal: bool = True
    """Without a mask: whether a position sees only those up to its own; a single new one sees all that is cached."""


def positions(config: ModelConfig, input_ids: Tensor, document_ids: Tensor | None) -> Positions:
    """Rotations for every position, fp32; with document_ids [B, S] positions restart and attention stays within each.

    Raises:
        ValueError: the sequence is longer than max_position_embeddings.
    """
    length, device = input_ids.shape[1], input_ids.device
    if length > config.max_position_embeddings:
        raise ValueError(
            f"sequence of {length} is longer than max_position_embeddings={config.max_position_embeddings}"
        )
    index_BS = torch.arange(length, device=device)[None]
    mask = None
    if document_ids is not None:
        new_BS = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=False)
        index_BS = index_BS - torch.where(new_BS, index_BS, 0).cummax(dim=1).values
        same = document_ids[:, :, None] == document_ids[:, None, :]
        mask = same.tril()[:, None]
    return Positions(*turned(config, index_BS), mask)


def turned(config: ModelConfig, index_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, 1, S, D] of positions [B or 1, S], fp32."""
    half = torch.arange(0, config.dim_per_head, 2, dtype=torch.float32, device=index_BS.device)
    inverse = 1.0 / config.rope_theta ** (half / config.dim_per_head)
    angle = index_BS[..., None].float() * inverse
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    return angle.cos(), angle.sin()


Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes new keys and values [B, N, S, D], and returns them behind those of the positions before."""


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.kv_heads, config.dim_per_head
        q, kv = self.heads * self.width, self.kv_heads * self.width
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q, bias=bias != "none")
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=bias != "none")
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=bias != "none")
        self.o_proj = nn.Linear(q, config.hidden_size, bias=bias == "all")
        self.clip = config.clip_qkv
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            sizes = (q, kv) if self.qk_norm == "full" else (self.width, self.width)
            self.q_norm = RMSNorm(sizes[0], config.rms_norm_eps)
            self.k_norm = RMSNorm(sizes[1], config.rms_norm_eps)

    def forward(self, x: Tensor, at: Positions, extend: Extend | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; with `extend` the new positions also see those before."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self._split(q, self.heads), self._split(k, self.kv_heads), self._split(v, self.kv_heads)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k = rotate(q, at.cos, at.sin), rotate(k, at.cos, at.sin)
        if extend is not None:
            k, v = extend(k, v)
        grouped, causal = self.heads != self.kv_heads, at.causal and at.mask is None
        out = F.scaled_dot_product_attention(q, k, v, at.mask, is_causal=causal, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.width)).transpose(1, 2)


class AttendingBlock(nn.Module):
    """What all blocks begin with: h + attention(norm(h))."""

    def __init__(self, config: ModelConfig, run: Run) -> None:
        super().__init__()
        self.run = run
        self.attention_norm = BranchNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)

    def attend(self, h: Tensor, at: Positions, extend: Extend | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        if extend is not None:  # of another length each time
            return self._attend(h, at, extend)
        return self.run(self._attend, h, at)

    def _attend(self, h: Tensor, at: Positions, extend: Extend | None = None) -> Tensor:
        h, x = self.attention_norm(h)
        return h + self.attention(x, at, extend)
