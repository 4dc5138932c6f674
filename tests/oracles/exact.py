# SPDX-License-Identifier: Apache-2.0
"""The result in float64, by an independent road: rotation by complex numbers, gradients by autograd.

Beside each result stands its noise: what it would deviate by, in units of the arithmetic's epsilon, if every operand
and every intermediate were off by an independent relative error of one epsilon, partial sums included. It is the
natural scale of a rounding error where the result itself cancels to 0, as dq does for a sequence of one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import Case, Inputs


@dataclass
class Exact:
    """By name: out, q, k, v, angles (the gradients of these), each float64, and the noise of each (variances)."""

    values: dict[str, Tensor]
    noise: dict[str, Tensor]
    lse: Tensor  # (B, H, N), 0 where there is no token


def pair_channels(rotary_dim: int, pairing: str) -> tuple[list[int], list[int]]:
    """First and second channel of each pair, numbered by the first."""
    if pairing == "interleaved":
        first, step = list(range(0, rotary_dim, 2)), 1
    elif pairing == "half":
        first, step = list(range(rotary_dim // 2)), rotary_dim // 2
    else:
        quarter = rotary_dim // 4
        first, step = [*range(quarter), *range(2 * quarter, 3 * quarter)], quarter
    return first, [channel + step for channel in first]


def exact(inputs: Inputs) -> Exact:
    case = inputs.case
    packed = case.lengths is not None
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.leaves.items()}
    dout = inputs.dout.detach().double()
    q, k, v = (leaves[name][None] if packed else leaves[name] for name in "qkv")
    g = dout[None] if packed else dout
    group = q.shape[2] // k.shape[2]

    out = torch.zeros_like(q)
    lse = q.new_zeros(q.shape[0], q.shape[2], q.shape[1])
    noise = {name: torch.zeros_like(x) for name, x in leaves.items()}
    noise["out"] = torch.zeros_like(dout)
    at = {name: x[None] if packed and name != "angles" else x for name, x in noise.items()}
    for b, start, stop in inputs.sequences():
        rows = slice(start, stop)
        angles = None
        if "angles" in leaves:
            table_sample = b if leaves["angles"].shape[0] > 1 else 0
            angles = leaves["angles"][table_sample, rows]  # (n, H|1, R/2)
        # (n, H, D) -> (H, n, D)
        qr, kr = (_rotated(x[b, rows], angles, case.pairing).transpose(0, 1) for x in (q, k))
        vr, gr = v[b, rows].transpose(0, 1), g[b, rows].transpose(0, 1)
        kr, vr = (x.repeat_interleave(group, dim=0) for x in (kr, vr))
        scores = inputs.scale * qr @ kr.transpose(1, 2)
        weights = torch.softmax(scores, dim=-1)
        out = out.index_put((torch.tensor(b), torch.arange(start, stop)), (weights @ vr).transpose(0, 1))
        with torch.no_grad():
            if stop > start:
                lse[b, :, rows] = torch.logsumexp(scores, dim=-1)
            parts = _noise(qr, kr, vr, gr, weights, inputs.scale)
            for name, x in parts.items():
                x = x.transpose(0, 1)  # (n, H, D)
                shared = x.unflatten(1, (-1, group)).sum(2) if name in ("k", "v") else x
                at[name][b, rows] += shared
            if angles is not None:
                dphi = [
                    _angle_noise(x.transpose(0, 1), parts[name].transpose(0, 1), case).sum_to_size(angles.shape)
                    for x, name in ((qr, "q"), (kr, "k"))
                ]
                at["angles"][table_sample, rows] += dphi[0] + dphi[1]
    if packed:
        out = out[0]
    # tokens that do not exist hold NaN, and are not part of out
    grads = torch.autograd.grad(out, list(leaves.values()), torch.where(dout.isnan(), 0, dout))
    return Exact({"out": out.detach(), **dict(zip(leaves, grads, strict=True))}, noise, lse)


def _rotated(x: Tensor, angles: Tensor | None, pairing: str) -> Tensor:
    """x (n, H, D), angles (n, H|1, R/2)."""
    if angles is None:
        return x
    rotary_dim = 2 * angles.shape[-1]
    first, second = pair_channels(rotary_dim, pairing)
    z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles)
    order = torch.tensor(first + second + list(range(rotary_dim, x.shape[-1]))).argsort()
    return torch.cat([z.real, z.imag, x[..., rotary_dim:]], dim=-1)[..., order]


def _noise(q: Tensor, k: Tensor, v: Tensor, g: Tensor, p: Tensor, scale: float) -> dict[str, Tensor]:
    """Variances of the results of one sequence, each (H, n, D); q and k are rotated, and so are their gradients.

    Every line is the square of the line of the backward pass, plus the relative error of what it makes.
    """
    t = k.transpose(1, 2)
    p2 = p.square()
    over_channels, over_tokens = _partial_sums(q.shape[-1]), _partial_sums(q.shape[-2])
    score = scale**2 * q.square() @ t.square() * (1 + over_channels)
    p_relative = 1 + score + (p2 * score).sum(-1, keepdim=True) + over_tokens * p2.sum(-1, keepdim=True)
    out = p @ v
    out_noise = (p2 * (p_relative + over_tokens)) @ v.square() + out.square()
    dp = g @ v.transpose(1, 2)
    delta = (g * out).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    delta_noise = (g.square() * (out_noise + over_channels * out.square())).sum(-1, keepdim=True)
    dp_noise = g.square() @ v.square().transpose(1, 2) * (1 + over_channels)
    ds_noise = p2 * (dp_noise + delta_noise) + ds.square() * (p_relative + 1)
    dq, dk, dv = scale * ds @ k, scale * ds.transpose(1, 2) @ q, p.transpose(1, 2) @ g
    return {
        "out": out_noise,
        "q": scale**2 * (ds_noise + over_tokens * ds.square()) @ k.square() + dq.square(),
        "k": scale**2 * (ds_noise + over_tokens * ds.square()).transpose(1, 2) @ q.square() + dk.square(),
        "v": (p2 * (p_relative + over_tokens)).transpose(1, 2) @ g.square() + dv.square(),
    }


def _partial_sums(terms: int) -> float:
    """Variance, per sum of squares of the terms, of adding them one after the other: partial sum i has the expected
    square i terms, and is rounded with variance epsilon² / 12."""
    return terms / 24


def _angle_noise(x: Tensor, dx_noise: Tensor, case: Case) -> Tensor:
    """Return the variance of dφ = x1 dx2 - x2 dx1, for rotated channels; (n, H, R/2)."""
    first, second = pair_channels(2 * case.pairs, case.pairing)
    return x[..., first].square() * dx_noise[..., second] + x[..., second].square() * dx_noise[..., first]
