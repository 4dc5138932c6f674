# SPDX-License-Identifier: Apache-2.0
"""The longest of packed sequences on a GPU: one wait for the device per tensor of bounds, and not one per layer.

transformers says no maximum unless flash attention is configured. Without one all tokens might be one sequence, and
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

    asker: who asks, an attention module say. Tensors of inference mode count no versions, so whoever asks about one a
    second time is in another forward, and it is read again; without an asker it is read each time.
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
    """Waits for the device."""
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
