# SPDX-License-Identifier: Apache-2.0
"""How far from the exact result a backend may be."""

from __future__ import annotations

import torch
from torch import Tensor

from .exact import Exact
from .inputs import SEED, Inputs

FACTOR = 1.5


def run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """out, and the gradients of q, k, v and angles, by name."""
    out = inputs.call(backend)
    leaves = inputs.leaves
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def check(got: dict[str, Tensor], eager: dict[str, Tensor], truth: Exact, inputs: Inputs) -> None:
    """‖got - exact‖ <= 1.5 ‖eager - exact‖ + tiny, for out and every gradient.

    Eager is the low-precision path that users have: rotate in float32, round, then torch's SDPA. ``tiny`` is one
    float32 epsilon of the result's noise (see exact.py): both compute in float32 inside, and where the inputs' rounding
    cancels (a sequence of one token has dq = 0) only that of the arithmetic is left.
    """
    assert set(got) == set(eager) == set(truth.values)
    for name, value in truth.values.items():
        allowed = FACTOR * _distance(eager[name], value) + _noise(truth, name, torch.float32)
        _compare(name, got[name], value, allowed, inputs)


def check_bound(got: dict[str, Tensor], truth: Exact, inputs: Inputs, factor: float = 4.0) -> None:
    """‖got - exact‖ <= factor · epsilon of the dtype · noise: for the eager path itself, and for tensors so small
    that a comparison of two random errors says little."""
    assert set(got) == set(truth.values)
    for name, value in truth.values.items():
        _compare(name, got[name], value, factor * _noise(truth, name, inputs.q.dtype), inputs)


def _noise(truth: Exact, name: str, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * truth.noise[name].sum().sqrt().item()


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b).norm().item()


def _compare(name: str, got: Tensor, value: Tensor, allowed: float, inputs: Inputs) -> None:
    label = "out" if name == "out" else f"d{name}"
    where = f"{label} of {inputs.case} (SPATIAL_PE_SEED={SEED})"
    assert got.shape == value.shape, f"{where}: shape {tuple(got.shape)}, not {tuple(value.shape)}"
    assert torch.isfinite(got).all(), f"{where}: {int((~torch.isfinite(got)).sum())} elements are not finite"
    error = _distance(got, value)
    assert error <= allowed, f"{where}: error {error:.3g} > {allowed:.3g}; the result has norm {value.norm():.3g}"
