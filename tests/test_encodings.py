# SPDX-License-Identifier: Apache-2.0
"""Learnable parts, raw coordinates, and errors of the encodings."""

from __future__ import annotations

import math

import pytest
import torch

from spatial_pe import apply_rotary
from spatial_pe.conventions import convention
from spatial_pe.encodings import AxialRoPE, MixedRoPE
from spatial_pe.grid import PatchGrid


def test_strength_scales_the_angles():
    grid = PatchGrid(4, 5, prefix=1)
    full, half, none = (AxialRoPE(16, strength=s)(grid) for s in (1.0, 0.5, 0.0))
    plain = AxialRoPE(16)(grid)
    assert torch.equal(full.cos, plain.cos) and torch.equal(full.sin, plain.sin)
    assert (none.cos == 1).all() and (none.sin == 0).all()
    torch.testing.assert_close(half.cos**2 - half.sin**2, plain.cos, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "encoding", [AxialRoPE(16, strength=0.0), MixedRoPE(16, 2, init="identity")], ids=["strength", "mixed"]
)
def test_identity_start_has_a_gradient_for_every_parameter(encoding):
    """Through attention: a gradient that vanished at the identity would never leave it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 12, 2, 16, generator=generator)
    rotary = encoding(PatchGrid(3, 4))
    assert torch.equal(apply_rotary(q, rotary), q)
    logits = torch.einsum("bnhd,bmhd->bhnm", apply_rotary(q, rotary), apply_rotary(k, rotary)) / 4
    torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).square().sum().backward()
    (parameter,) = encoding.parameters()
    assert (parameter.grad.abs() > 1e-8).all()


def test_gradients():
    points = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    axial, mixed = AxialRoPE(8, strength=0.7, offset=1.0).double(), MixedRoPE(8, 2).double()

    def check(encoding, name):
        def table(points, parameter):
            rotary = torch.func.functional_call(encoding, {name: parameter}, (points,))
            return rotary.cos, rotary.sin

        inputs = (points, encoding.get_parameter(name).detach().requires_grad_())
        return torch.autograd.gradcheck(table, inputs, check_forward_ad=True, check_batched_grad=True)

    assert check(axial, "strength") and check(mixed, "frequencies")


@pytest.mark.parametrize("name", ["pixtral", "llama4", "kimi", "sam3"])
def test_raw_coordinates_equal_the_grid(name):
    grid = PatchGrid(4, 6)
    encoding = convention(name, 32, scale=0.5)
    for points in (grid.coordinates(), grid.coordinates().long()):
        assert torch.equal(encoding(points).sin, encoding(grid).sin)
    assert torch.equal(encoding(grid.coordinates()[None].repeat(2, 1, 1)).sin, encoding(grid).sin.repeat(2, 1, 1, 1))


def test_repr_shows_what_differs():
    assert repr(AxialRoPE(64)) == "AxialRoPE(64, theta=10000, pairing='half')"
    text = repr(AxialRoPE(64, 100.0, layout="split", offset=1.0, rotary_dim=32, strength=0.0))
    assert text == (
        "AxialRoPE(64, theta=100, pairing='half', rotary_dim=32, layout='split', offset=1.0, learnable strength)"
    )
    assert repr(MixedRoPE(64, 6)) == "MixedRoPE(64, num_heads=6, theta=10, pairing='interleaved')"


POINTS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: AxialRoPE(30),
            ValueError,
            "head_dim must be a multiple of 4 .* got 30: pass rotary_dim=28 to leave 2",
        ),
        (lambda: AxialRoPE(3), ValueError, "head_dim must be a multiple of 4 .* got 3$"),
        (lambda: AxialRoPE(64.0), TypeError, "head_dim must be an int, got float"),
        (lambda: AxialRoPE(64, rotary_dim=68), ValueError, "rotary_dim must be at most head_dim=64, got 68"),
        (lambda: AxialRoPE(64, rotary_dim=30), ValueError, "rotary_dim must be a multiple of 4"),
        (lambda: AxialRoPE(64, 0.0), ValueError, "theta must be positive and finite, got 0.0"),
        (lambda: AxialRoPE(64, "1e4"), TypeError, "theta must be a number, got str"),
        (lambda: AxialRoPE(64, pairing="pairs"), ValueError, "pairing must be one of .*got 'pairs'"),
        (lambda: AxialRoPE(64, axis_order="xy"), ValueError, "axis_order must be one of .*got 'xy'"),
        (lambda: AxialRoPE(64, layout="thirds"), ValueError, "layout must be one of .*got 'thirds'"),
        (lambda: AxialRoPE(64, frequency="hz"), ValueError, "frequency must be one of .*got 'hz'"),
        (lambda: AxialRoPE(64, normalize="mean"), ValueError, "normalize must be one of .*got 'mean'"),
        (lambda: AxialRoPE(64, period_range=(1, 2)), ValueError, 'period_range=.* needs frequency="period"'),
        (
            lambda: AxialRoPE(64, frequency="period", period_range=3),
            ValueError,
            r"must be \(shortest, longest\), got 3",
        ),
        (
            lambda: AxialRoPE(64, frequency="period", period_range=(3, 1)),
            ValueError,
            r"\(shortest, longest\), got \(3, 1",
        ),
        (lambda: AxialRoPE(64, normalize="min", offset=1.0), ValueError, "normalize='min' .* got offset=1.0"),
        (lambda: AxialRoPE(64, reference_size=(1, 2, 3)), ValueError, "reference_size must be an int or"),
        (lambda: AxialRoPE(64, reference_size=0), ValueError, "reference_size must be at least 1, got 0"),
        (lambda: AxialRoPE(64, scale=math.nan), ValueError, "scale must be finite, got nan"),
        (lambda: AxialRoPE(64, strength=True), TypeError, "strength must be a number, got bool"),
        (lambda: MixedRoPE(64, 0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: MixedRoPE(64, 2, init="zeros"), ValueError, "init must be one of .*got 'zeros'"),
        (lambda: MixedRoPE(62, 2), ValueError, "head_dim must be a multiple of 4"),
        (lambda: AxialRoPE(64)((4, 4)), TypeError, "takes a PatchGrid or a coordinates tensor .* got tuple"),
        (lambda: MixedRoPE(64, 2)([[0, 0]]), TypeError, "takes a PatchGrid or a coordinates tensor .* got list"),
        (lambda: AxialRoPE(64)(torch.zeros(3)), ValueError, r"\(row, column\) pairs.* got shape \(3,\)"),
        (lambda: AxialRoPE(64)(torch.zeros(3, 3)), ValueError, r"got shape \(3, 3\)"),
        (lambda: AxialRoPE(64)(POINTS.bfloat16()), TypeError, "got torch.bfloat16: use coordinates.float"),
        (lambda: AxialRoPE(64)(POINTS / 0), ValueError, "coordinates hold NaN or Inf in 3 of 3 tokens"),
        (lambda: convention("dinov3", 64)(POINTS), ValueError, "normalize='separate' needs the size of the image"),
        (lambda: convention("eva02", 64)(POINTS), ValueError, r"reference_size=\(16, 16\) needs the size of the image"),
        (
            lambda: convention("qwen", 64),
            ValueError,
            "unknown convention 'qwen': it must be one of qwen2_5_vl, pixtral",
        ),
        (lambda: convention("rope_vit_mixed", 64), TypeError, "num_heads"),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()
