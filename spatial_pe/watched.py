# SPDX-License-Identifier: Apache-2.0
"""Who needs a torch op, and who only pays for it; what torch.compile takes as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)


def watched(tensors: Sequence[Tensor]) -> bool:
    """Whether tracing, a dispatch mode, a function transform or a tensor without values must see a torch op.

    Nobody else needs one, and its dispatch through Python costs 65 us or more with a gradient to come, 15 without:
    more than the kernel of a small image (`python -m benchmarks.throughput.host`).
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None or tensors[0].device.type == "meta":
        return True
    for x in tensors:  # noqa: SIM110, a generator inside any() costs a microsecond
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:  # fake, functional, distributed tensors
            return True
    return False


def wants_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def constant(function: F) -> F:
    """torch.compiler.assume_constant_result without its import of dynamo, which takes as long as that of torch: 1.5 s,
    also of those who never compile."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
