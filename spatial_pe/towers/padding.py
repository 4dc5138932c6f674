# SPDX-License-Identifier: Apache-2.0
"""Padding masks as lengths: no N x N mask reaches a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.dispatcher import is_traced
from .._utils.tensor_cache import once_per_forward
from ..ops.attention import rope_attention
from ..rotary import Rotary


@dataclass(frozen=True)
class Padding:
    """Valid tokens of a (B, N) batch: the first ``seqlens[b]`` of each sample; or, scattered, those in ``index``.

    index: into the B * N tokens, in order; cu_seqlens: start of each sample among them.
    """

    seqlens: Tensor | None = None
    index: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


def padding_of(mask: Tensor, batch: int, tokens: int) -> Padding | str | None:
    """Return the padding, None if every token is valid, or a string if the mask is not padding.

    Takes (B|1, N), bool or 1 / 0, and (B|1, 1, 1|N, N), bool (True attends) or added to the scores (0 attends). Reads
    the values, which waits for a GPU, once per forward.
    """
    if is_traced(mask):
        return "attention_mask is given"
    return once_per_forward(mask, (), (batch, tokens), lambda: _read(mask, batch, tokens))


def attend_padded(
    q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, padding: Padding, scale: float, backend: str
) -> Tensor:
    """Call rope_attention on (B, N, H, D) tensors; the output is 0 in padding."""
    if padding.seqlens is not None:
        return rope_attention(q, k, v, rotary, scale=scale, seqlens=padding.seqlens, backend=backend)
    index = padding.index
    assert index is not None
    shape = q.shape
    q, k, v = (x.flatten(0, 1).index_select(0, index) for x in (q, k, v))
    if rotary is not None:
        cos, sin = (
            t.expand(shape[0], *t.shape[1:]).flatten(0, 1).index_select(0, index)[None]
            for t in (rotary.cos, rotary.sin)
        )
        rotary = Rotary(cos, sin, rotary.pairing)
    out = rope_attention(
        q, k, v, rotary, scale=scale, cu_seqlens=padding.cu_seqlens, max_seqlen=padding.max_seqlen, backend=backend
    )
    return out.new_zeros(shape[0] * shape[1], *shape[2:]).index_copy(0, index, out).view(shape)


def _read(mask: Tensor, batch: int, tokens: int) -> Padding | str | None:
    valid = _valid_tokens(mask, tokens)
    if isinstance(valid, str):
        return valid
    if valid.shape[0] not in (1, batch):
        return f"attention_mask has batch {valid.shape[0]}, the tokens {batch}"
    if bool(valid.all()):
        return None
    valid = valid.expand(batch, tokens)
    lengths = valid.sum(1, dtype=torch.int32)
    position = torch.arange(tokens, device=valid.device)
    if bool((valid == (position < lengths[:, None])).all()):
        return Padding(seqlens=lengths)
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Padding(index=valid.flatten().nonzero()[:, 0], cu_seqlens=bounds, max_seqlen=int(lengths.max()))


def _valid_tokens(mask: Tensor, tokens: int) -> Tensor | str:
    """Return the valid tokens (B|1, N) bool, or why it is not such a mask."""
    if mask.ndim == 2 and mask.shape[1] == tokens:
        return mask.bool()
    if mask.ndim != 4 or mask.shape[-1] != tokens or mask.shape[-2] not in (1, tokens):
        return f"attention_mask of shape {tuple(mask.shape)} is given"
    if mask.shape[1] > 1 and mask.stride(1) != 0:
        return "attention_mask differs between heads"
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        attends = mask
    else:
        attends = mask == 0
        if not bool((attends | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            return "attention_mask adds a bias to the scores"
    keys = attends.any(dim=1)  # (B, N)
    rows = attends.any(dim=2, keepdim=True)  # a row of padding may attend to nothing
    same = bool(((attends == keys[:, None]) | ~rows).all())
    if same and (bool(rows.all()) or bool((rows[..., 0] == keys).all())):
        return keys
    return "attention_mask is not padding"
