# SPDX-License-Identifier: Apache-2.0
"""Longest packed sequence on a GPU, read once per cu_seqlens tensor, not once per layer, as it waits for the device.

transformers gives no maximum unless flash attention is configured. Without one all tokens might be one sequence, and
Qwen2.5-VL's windows of 64 tokens would be computed by the kernels for long sequences, half of whose rows are empty.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._utils.dispatcher import is_traced


@dataclass
class _Entry:
    longest: int
    version: int
    askers: set[Hashable] = field(default_factory=set)


class _Entries(threading.local):
    def __init__(self) -> None:
        self.by_tensor: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


_ENTRIES = _Entries()


def longest_sequence(cu_seqlens: Tensor, asker: Hashable = None) -> int | None:
    """Return the largest difference of neighbours, or None where it cannot be read: in a trace, in a CUDA graph.

    asker: identity of the caller, e.g. an attention module. Tensors of inference mode have no version counter, so if
    the same caller asks about one again, it is in another forward, and it is read again; without an asker always.
    """
    if is_traced(cu_seqlens) or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    version = -1 if cu_seqlens.is_inference() else cu_seqlens._version
    entry = _ENTRIES.by_tensor.get(cu_seqlens)
    if entry is None or entry.version != version or (version < 0 and (asker is None or asker in entry.askers)):
        entry = _Entry(_read(cu_seqlens), version)
        _ENTRIES.by_tensor[cu_seqlens] = entry
    if version < 0:
        entry.askers.add(asker)
    return entry.longest


def _read(cu_seqlens: Tensor) -> int:
    """Return the longest sequence; waits for the device."""
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
