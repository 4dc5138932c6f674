# SPDX-License-Identifier: Apache-2.0
"""Rotary and apply_rotary, against complex numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_pe import apply_rotary
from spatial_pe.rotary import PAIRINGS, Rotary, join_pairs, split_pairs

# (first, second) channels of the pairs with R = 8, by hand
PAIRS = {
    "half": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "interleaved": [(0, 1), (2, 3), (4, 5), (6, 7)],
    "axis_half": [(0, 2), (1, 3), (4, 6), (5, 7)],
}


def complex_oracle(x: torch.Tensor, angles: torch.Tensor, pairing: str) -> torch.Tensor:
    """x (B, N, H, 8 + extra), angles (B|1, N, H|1, 4): pair p times exp(i angle p)."""
    out = x.clone()
    rotation = torch.polar(torch.ones_like(angles), angles)
    for p, (first, second) in enumerate(PAIRS[pairing]):
        rotated_pair = torch.complex(x[..., first], x[..., second]) * rotation[..., p]
        out[..., first], out[..., second] = rotated_pair.real, rotated_pair.imag
    return out


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("dim", [8, 11])
def test_apply_rotary_is_a_complex_product(pairing, batch, heads, dim):
    x = torch.randn(2, 5, 3, dim, dtype=torch.float64)
    angles = 10 * torch.randn(batch, 5, heads, 4, dtype=torch.float64)
    expected = complex_oracle(x, angles, pairing)
    rotary = Rotary.from_angles(angles, pairing)
    torch.testing.assert_close(apply_rotary(x, rotary), expected, rtol=0, atol=1e-13)
    # the way back
    torch.testing.assert_close(apply_rotary(expected, rotary.inverse()), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_packed_input(pairing):
    x, angles = torch.randn(5, 3, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    expected = complex_oracle(x[None], angles[None, :, None], pairing)[0]
    torch.testing.assert_close(apply_rotary(x, Rotary.from_angles(angles, pairing)), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_rounds_once(dtype):
    x = torch.randn(1, 7, 2, 16).to(dtype)
    rotary = Rotary.from_angles(5 * torch.randn(7, 8))
    got = apply_rotary(x, rotary)
    assert got.dtype == dtype
    assert torch.equal(got, apply_rotary(x.float(), rotary).to(dtype))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gradients(pairing):
    x = torch.randn(1, 3, 2, 10, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: apply_rotary(x, Rotary.from_angles(a, pairing)), (x, angles))


@given(st.sampled_from(PAIRINGS), st.integers(1, 6))
@settings(deadline=None)
def test_join_undoes_split(pairing, quarters):
    x = torch.arange(4 * quarters)
    first, second = split_pairs(x, pairing)
    assert torch.equal(join_pairs(first, second, pairing), x)
    # columns are numbered by the first channel of their pair
    assert (first.diff() > 0).all() and (first < second).all()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_split_pairs_by_hand(pairing):
    first, second = split_pairs(torch.arange(8), pairing)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == PAIRS[pairing]


def test_pieces_of_a_table():
    angles = torch.randn(2, 5, 3, 4)
    rotary = Rotary.from_angles(angles, "interleaved")
    order = torch.tensor([4, 0, 2])
    assert torch.equal(rotary.index_tokens(order).sin, angles.sin()[:, order])
    assert torch.equal(rotary.slice(1, 2, 5).cos, angles.cos()[1:2, 2:5])
    shared = Rotary.from_angles(angles[:1], "interleaved")
    assert torch.equal(shared.slice(1, 2, 5).cos, angles.cos()[:1, 2:5])
    wide = rotary.to(torch.float64)
    assert wide.cos.dtype == wide.sin.dtype == torch.float64
    assert {r.pairing for r in (rotary.index_tokens(order), rotary.slice(0, 0, 1), wide, rotary.inverse())} == {
        "interleaved"
    }
    assert (rotary.num_tokens, rotary.rotary_dim) == (5, 8)


# ---------------------------------------------------------------------- errors

TABLE = torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((TABLE, TABLE, "pairs"), ValueError, "pairing must be one of .*got 'pairs'"),
        (([0.0], TABLE), TypeError, "cos must be a torch.Tensor, got list"),
        ((TABLE.bfloat16(), TABLE.bfloat16()), TypeError, "cos must be float32, got torch.bfloat16"),
        ((TABLE[None], TABLE[None]), ValueError, r"cos must be \(N, R/2\) or .* got shape \(1, 5, 4\)"),
        ((TABLE, TABLE[:4]), ValueError, "they must be equal"),
        ((TABLE, TABLE.double()), ValueError, "same dtype and device"),
        ((TABLE[:, :3], TABLE[:, :3], "axis_half"), ValueError, "even number of pairs, got 3"),
        ((TABLE, TABLE / 0.0), ValueError, "sin holds NaN or Inf"),
        ((TABLE + torch.inf, TABLE), ValueError, "cos holds NaN or Inf"),
    ],
)
def test_bad_tables(args, error, message):
    with pytest.raises(error, match=message):
        Rotary(*args)


@pytest.mark.parametrize(
    ("shape", "table", "message"),
    [
        ((1, 6, 1, 8), (5, 4), "rotary has 5 tokens, x has 6: did you forget prefix=1?"),
        ((1, 4, 1, 8), (5, 4), "rotary has 5 tokens, x has 4$"),
        ((1, 5, 1, 6), (5, 4), "rotary rotates 8 channels, x has head_dim 6"),
        ((1, 5, 2, 8), (1, 5, 3, 4), "rotary has 3 heads, x has 2: it must have 1 or 2"),
        ((1, 5, 2, 8), (2, 5, 1, 4), "rotary has batch 2, x has 1"),
        ((5, 8), (5, 4), r"x must be \(B, N, H, D\) or packed \(T, H, D\), got shape \(5, 8\)"),
    ],
)
def test_tables_that_do_not_fit(shape, table, message):
    with pytest.raises(ValueError, match=message.replace("prefix=1?", r"prefix=1\?")):
        apply_rotary(torch.zeros(shape), Rotary.from_angles(torch.zeros(table)))


def test_not_a_rotary():
    with pytest.raises(TypeError, match=r"rotary must be a spatial_pe\.Rotary or None, got tuple"):
        apply_rotary(torch.zeros(1, 5, 1, 8), (TABLE, TABLE))
