# SPDX-License-Identifier: Apache-2.0
"""One call of the op, as every backend receives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ..checks import check_cu_seqlens, check_seqlens
from ..rotary import Rotary


@dataclass(frozen=True, eq=False)
class Call:
    """Checked arguments of rope_attention. q, k, v are (B, N, H|Hkv, D); packed sequences are one sample, B = 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    rotary: Rotary | None
    scale: float
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    seqlens: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that may want a gradient."""
        rotary = self.rotary
        return (self.q, self.k, self.v) if rotary is None else (self.q, self.k, self.v, rotary.cos, rotary.sin)

    def sequences(self) -> Iterator[tuple[int, int, int]]:
        """(sample, start, stop) of each sequence. Reads the lengths, so on a GPU it waits for them."""
        batch, tokens = self.q.shape[:2]
        if self.cu_seqlens is not None:
            bounds = self.cu_seqlens.tolist()
            check_cu_seqlens(bounds, tokens, self.max_seqlen)
            for start, stop in pairwise(bounds):
                yield 0, start, stop
        else:
            lengths = [tokens] * batch
            if self.seqlens is not None:
                lengths = self.seqlens.tolist()
                check_seqlens(lengths, tokens)
            for b, length in enumerate(lengths):
                yield b, 0, length


# ------------------------------------------------------------------------------------------ for the compiled backends


def allocator(call: Call) -> Callable[..., Tensor]:
    """Allocate results like q. The kernels write the tokens of the sequences; with padding there are others, which must
    be 0."""
    return call.q.new_empty if call.seqlens is None else call.q.new_zeros


def view(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides (batch, token, head) in elements; the last stride is 1."""
    batch, token, head = x.stride()[:3]
    return x.data_ptr(), batch, token, head
