"""Attention for both towers, and the ALiBi mask of the text tower.

Memory: the ALiBi mask of a whole 8,192-token text would be 12 x 8192 x 8192 float32, 3.2 GB. Masks over `MASK_BYTES`
are made and used one block of queries after another instead. Measured on a CPU, float32, published sizes: one text of
8,192 tokens takes 0.7 GB beside the weights, most of it the activations of the gated MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionKind = Literal["sdpa", "plain"]

MASK_BYTES = 64 * 2**20
"""The largest attention mask that is held at once, in bytes."""

PAD_BIAS = -10_000.0
"""Added to the scores of padding keys, as published: weight exactly zero in float32, and inside float16's range."""


def alibi_slopes(n_heads: int) -> list[float]:
    """ALiBi's slope of each head, in head order and therefore not sorted (for 12 heads the last four lie between).

    With p the largest power of two within `n_heads`: 2^(-8(i+1)/p) for the first p heads, then every second slope of
    the series for 2p, from its first. The rule is that of the ALiBi paper's code, which the published model follows.
    """
    p = 1 << (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / p) for i in range(p)]
    return slopes + [2.0 ** (-8.0 * (i + 1) / (2 * p)) for i in range(0, 2 * (n_heads - p), 2)]


class AlibiMask:
    """The additive attention mask of one batch: ALiBi by distance, and padding keys out.

    Args:
        is_pad: bool (B, T), true where a token is padding.
        n_heads: attention heads.
        dtype: the dtype of the queries; `scaled_dot_product_attention` wants the mask in the same.
        is_whole: nothing is padding, so that one mask is every text's.

    Attributes:
        n_tokens: B T, padding included.
    """

    def __init__(self, is_pad: Tensor, n_heads: int, dtype: torch.dtype, *, is_whole: bool = False) -> None:
        self.n_tokens = is_pad.shape[0] * is_pad.shape[1]
        self.is_pad, self.n_heads, self.dtype = is_pad[:1] if is_whole else is_pad, n_heads, dtype
        batch, length = self.is_pad.shape
        self.rows = max(1, MASK_BYTES // (batch * n_heads * length * dtype.itemsize))
        self.whole = self._block(0, length) if self.rows >= length else None

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (first query, last query + 1, mask (B or 1, heads, queries, T)), covering all queries in order."""
        length = self.is_pad.shape[1]
        if self.whole is not None:
            yield 0, length, self.whole
            return
        for start in range(0, length, self.rows):
            end = min(start + self.rows, length)
            yield start, end, self._block(start, end)

    def _block(self, start: int, end: int) -> Tensor:
        device, length = self.is_pad.device, self.is_pad.shape[1]
        slopes = torch.tensor(alibi_slopes(self.n_heads), device=device, dtype=torch.float32)
        keys = torch.arange(length, device=device, dtype=torch.float32)
        distance = (keys[start:end, None] - keys[None, :]).abs()  # (queries, T)
        bias = (-slopes[:, None, None] * distance).to(self.dtype)  # (heads, queries, T)
        pad = self.is_pad[:, None, None, :].to(self.dtype) * PAD_BIAS  # (B, 1, 1, T)
        return bias[None] + pad  # (B, heads, queries, T)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind) -> Tensor:
    """Softmax attention, (B, heads, queries, head_dim), with scores scaled by head_dim^-0.5 before `mask` is added.

    `plain` says the same in matrix products; its backward pass is two to three times faster on a CPU, and it is the
    reference that the fused path is tested against.
    """
    if kind == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores: Tensor = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, heads, queries, T)
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(dim=-1), v)
