# SPDX-License-Identifier: Apache-2.0
"""Cost of one attention module, before and after: kernel launches and memory, counted and not timed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Cost(NamedTuple):
    """kernels: operators that compute something (views do not). peak: bytes of the tensors that it allocates and that
    are alive at once, including its inputs except the tokens (e.g. a mask)."""

    kernels: int
    peak: int


def cost_of(call: Callable[..., Any], inputs: dict[str, Any], first: str) -> Cost:
    """Return the cost of a second no-grad forward; the first one fills caches."""
    with torch.no_grad():
        call(**inputs)
        with _Counter() as counter:
            extra = {x.untyped_storage() for key, x in inputs.items() if isinstance(x, Tensor) and key != first}
            counter.now = counter.peak = sum(storage.nbytes() for storage in extra)
            call(**inputs)
    return Cost(counter.kernels, counter.peak)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and _key(x) not in given]
        self.kernels += bool(made) or func._schema.is_mutable
        for x in made:
            storage = x.untyped_storage()
            if _key(x) not in self.alive:
                self.alive.add(_key(x))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, _key(x), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata
