# SPDX-License-Identifier: Apache-2.0
"""Arguments of a call, as every backend receives them, and the interface of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..rotary import Rotary
from .checks import check_cu_seqlens, check_seqlens

Form = Literal["dense", "packed", "padded"]


def form_of(cu_seqlens: Tensor | None, seqlens: Tensor | None) -> Form:
    return "packed" if cu_seqlens is not None else "padded" if seqlens is not None else "dense"


@dataclass(frozen=True, eq=False)
class Keys:
    """The side of the keys of a call whose queries are other tokens: their table, and their lengths, each as that of
    the queries."""

    rotary: Rotary | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    seqlens: Tensor | None


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Checked arguments of rope_attention. q is (B, N, H, D), k and v are (B, M, Hkv, D); packed sequences are one
    sample, B = 1. ``keys`` is None where the tokens attend to themselves: M = N, and one table and lengths for both."""

    q: Tensor
    k: Tensor
    v: Tensor
    rotary: Rotary | None
    scale: float
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    seqlens: Tensor | None
    keys: Keys | None = None

    @property
    def form(self) -> Form:
        return form_of(self.cu_seqlens, self.seqlens)

    @property
    def bounds(self) -> Tensor | None:
        """cu_seqlens, seqlens, or None."""
        return self.seqlens if self.cu_seqlens is None else self.cu_seqlens

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def longest(self) -> int:
        """An upper bound of the tokens of a sequence: max_seqlen if packed and given, else N."""
        tokens = self.q.shape[1]
        return tokens if self.cu_seqlens is None or self.max_seqlen is None else int(self.max_seqlen)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that may require a gradient."""
        rotary = self.rotary
        if rotary is None:
            return self.q, self.k, self.v
        if self.keys is None or self.keys.rotary is None:
            return self.q, self.k, self.v, rotary.cos, rotary.sin
        return self.q, self.k, self.v, rotary.cos, rotary.sin, self.keys.rotary.cos, self.keys.rotary.sin

    @property
    def key_rotary(self) -> Rotary | None:
        """The table of k."""
        return self.rotary if self.keys is None else self.keys.rotary

    def sequences(self) -> Iterator[tuple[int, int, int]]:
        """Yield (sample, start, stop) of each sequence. Reads the lengths, so on a GPU it waits for them."""
        return _sequences(self.q, self.cu_seqlens, self.max_seqlen, self.seqlens, "")

    def pairs(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (sample, start, stop of the queries, start, stop of the keys) of each sequence."""
        keys = self.keys
        if keys is None:
            for sample, start, stop in self.sequences():
                yield sample, start, stop, start, stop
            return
        of_keys = _sequences(self.k, keys.cu_seqlens, keys.max_seqlen, keys.seqlens, "_k")
        for (sample, start, stop), (_, first, last) in zip(self.sequences(), of_keys, strict=True):
            yield sample, start, stop, first, last


def _sequences(
    x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, seqlens: Tensor | None, side: str
) -> Iterator[tuple[int, int, int]]:
    batch, tokens = x.shape[:2]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        check_cu_seqlens(bounds, tokens, max_seqlen, side)
        for start, stop in pairwise(bounds):
            yield 0, start, stop
    else:
        lengths = [tokens] * batch
        if seqlens is not None:
            lengths = seqlens.tolist()
            check_seqlens(lengths, tokens, side)
        for b, length in enumerate(lengths):
            yield b, 0, length


class Backend(Protocol):
    """Functions of a backend's module. ``ops.select`` calls the first two before each call."""

    def unavailable(self) -> str | None:
        """Return why this machine does not have the backend, or None if it does."""

    def cannot_serve(self, call: AttentionCall) -> str | None:
        """Return why the backend cannot compute this call, or None if it can."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Return out (B, N, H, D) in q's dtype, and lse (B, H, N) float32, the log of a row's sum of exponentials."""

    def backward(self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv in the shapes and dtype of q, k, v."""

    def angle_gradient(
        self,
        q: Tensor,
        k: Tensor | None,
        dq: Tensor,
        dk: Tensor | None,
        cos: Tensor,
        pairing: str,
        seqlens: Tensor | None,
    ) -> Tensor:
        """Return dφ in the shape of the tables, (B|1, N, H|1, R/2), from the final gradients of q and k; of q alone if
        k is None."""


# ------------------------------------------------------------------------------------------ for the compiled backends


def float32_tables(rotary: Rotary, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Return cos and sin in float32, contiguous in the last dimension, with equal strides in the others, which are
    multiples of `multiple` if R/2 is."""
    cos, sin = rotary.cos, rotary.sin
    if cos.dtype != torch.float32:
        cos, sin = cos.float(), sin.float()
    strides = cos.stride()
    if (
        strides != sin.stride()
        or strides[3] != 1
        or (multiple > 1 and any(stride % multiple for stride in strides[:3]))
    ):
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin


def table_strides(cos: Tensor) -> tuple[int, int, int]:
    """Return the strides of (batch, token, head), 0 where samples or heads share a table."""
    (batch, _, heads, _), (of_batch, of_token, of_head, _) = cos.shape, cos.stride()
    return 0 if batch == 1 else of_batch, of_token, 0 if heads == 1 else of_head


def allocator(call: AttentionCall) -> Callable[..., Tensor]:
    """Return a function that allocates results like q: zeros where there is padding, or a sequence may have no keys or
    no queries, as the kernels write only the tokens of sequences that have both."""
    keys = call.keys
    whole = call.seqlens is None
    if keys is not None:
        whole = call.form == "dense" and keys.seqlens is None and call.q.shape[1] > 0 and call.k.shape[1] > 0
    return call.q.new_empty if whole else call.q.new_zeros


def view(x: Tensor) -> tuple[int, int, int, int]:
    """Return the address and strides (batch, token, head) in elements; the last stride is 1."""
    batch, token, head = x.stride()[:3]
    return x.data_ptr(), batch, token, head
