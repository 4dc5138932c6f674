# SPDX-License-Identifier: Apache-2.0
"""verify_rotary passes what is a relative rotation and flags what is not, with numbers known from elsewhere."""

from __future__ import annotations

import math
import re

import pytest
import torch

from spatial_pe import Rotary, apply_rotary
from spatial_pe.conventions import CONVENTIONS, convention
from spatial_pe.encodings import AxialRoPE, MixedRoPE
from spatial_pe.grid import PatchGrid
from spatial_pe.rotary_findings import fastest_of
from spatial_pe.rotary_report import verify_rotary


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def axis_angles(grid: PatchGrid, head_dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D/4) in float64, of rows and of columns."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2, dtype=torch.float64) / (head_dim // 2))
    row, column = grid.coordinates().double().unbind(1)
    return row[:, None] * frequencies, column[:, None] * frequencies


# ----------------------------------------------------------------------------- what must pass


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("grid", [PatchGrid(6, 9, prefix=1, suffix=2), PatchGrid.packed([(4, 2), (2, 6)], 2)])
def test_conventions_are_relative_rotations(name, grid):
    heads = {"num_heads": 2} if name == "rope_vit_mixed" else {}
    report = verify_rotary(convention(name, 16, **heads)(grid), grid)
    assert report.is_rotation and report.is_relative and report.unrotated_is_identity, f"{name}\n{report}"
    assert report.logit_deviation < 3e-6
    assert max(abs(x - 1) for x in (*report.norm_ratio, *report.singular_values, *report.determinant)) < 1e-6
    drivers = list(report.axes.values())
    if name == "rope_vit_mixed":
        assert drivers == ["both"] * 8
    else:
        assert drivers.count("rows") == drivers.count("cols") == 4


@pytest.mark.parametrize("pairing", ["half", "interleaved", "axis_half"])
@pytest.mark.parametrize("layout", ["block", "split", "alternating"])
@pytest.mark.parametrize("axis_order", ["hw", "wh"])
def test_axes_of_every_layout(pairing, layout, axis_order):
    grid = PatchGrid(5, 4)
    encoding = AxialRoPE(16, pairing=pairing, layout=layout, axis_order=axis_order)
    report = verify_rotary(encoding(grid), grid)
    first, second = ("rows", "cols") if axis_order == "hw" else ("cols", "rows")
    order = [first, second] * 4 if layout == "alternating" else [first] * 4 + [second] * 4
    pairs = {
        "half": [(p, p + 8) for p in range(8)],
        "interleaved": [(2 * p, 2 * p + 1) for p in range(8)],
        "axis_half": [(p + 4 * (p // 4), p + 4 * (p // 4) + 4) for p in range(8)],
    }[pairing]
    assert report.axes == dict(zip(pairs, order, strict=True))
    assert report.is_rotation and report.is_relative


def test_learned_encodings():
    grid = PatchGrid(5, 6, prefix=1)
    mixed = MixedRoPE(16, 3)
    with torch.no_grad():
        mixed.frequencies[1, 0] = 0  # head 0: rows only
        mixed.frequencies[0, 1] = 0  # head 1: columns only
        mixed.frequencies[:, :, 7] = 0  # pair 7: still in every head
        mixed.frequencies[:, 2, 6] = 0
        mixed.frequencies[1, :, 6] = 0  # pair 6: rows only, in head 0
    report = verify_rotary(mixed(grid), grid)
    assert report.is_rotation and report.is_relative
    assert list(report.axes.values()) == ["both"] * 6 + ["rows", "none"]

    # a pair that rotates with rows in one head and with columns in another
    two_heads = MixedRoPE(16, 2)
    with torch.no_grad():
        two_heads.frequencies[1, 0] = two_heads.frequencies[0, 1] = 0
    assert set(verify_rotary(two_heads(grid), grid).axes.values()) == {"both"}

    identity = verify_rotary(AxialRoPE(16, strength=0.0)(grid), grid)
    assert identity.is_rotation and identity.is_relative
    assert list(identity.axes) == [(p, p + 8) for p in range(8)]
    assert set(identity.axes.values()) == {"none"}


def constant(grid: PatchGrid) -> Rotary:
    return Rotary.from_angles(torch.full((grid.num_tokens, 8), 0.3))


@pytest.mark.parametrize(
    "table",
    [
        lambda grid: Rotary.from_angles(torch.zeros(grid.num_tokens, 8)),
        AxialRoPE(16, strength=0.0),
        MixedRoPE(16, 2, init="identity"),
        constant,
        lambda grid: lambda x: x,
        lambda grid: lambda x: 2.0 * x,
    ],
    ids=["zeros", "strength", "mixed", "constant", "function", "gain"],
)
def test_a_table_that_encodes_no_position_says_so(table):
    grid = PatchGrid(4, 4)
    report = verify_rotary(table(grid), grid, head_dim=16)
    assert not report.encodes_position and report.is_relative
    text = str(report)
    assert "relative: yes; encodes position: NO" in text.splitlines()[0]
    assert "every patch is mapped alike" in text
    # in place of "none", which reads as no objection
    assert not any(line.split()[0] == "none" for line in text.splitlines())


def test_what_encodes_position_does_not_say_so():
    grid = PatchGrid(4, 4, prefix=1)
    still = MixedRoPE(16, 2)
    with torch.no_grad():
        still.frequencies[..., 7] = 0
    functions = [lambda x: x * (1 + torch.arange(17)[:, None] % 2), lambda x: x.cumsum(1) * torch.arange(17)[:, None]]
    for table in (AxialRoPE(16, strength=1e-4)(grid), still(grid), *functions):
        report = verify_rotary(table, grid, head_dim=16)
        assert report.encodes_position
        assert "encodes position: yes" in str(report) and "mapped alike" not in str(report)
    assert "no position       1 pairs: (14, 15)" in str(verify_rotary(still(grid), grid))


def test_one_patch_cannot_tell_positions():
    grid = PatchGrid(1, 1, prefix=1)
    report = verify_rotary(AxialRoPE(16, offset=1.0)(grid), grid)
    assert report.encodes_position is None and "encodes position: unknown, of one patch" in str(report)


def test_slow_pairs_are_seen_to_move():
    grid = PatchGrid(3, 3)
    report = verify_rotary(convention("lfm3_vl", 128)(grid), grid)
    assert list(report.axes.values()) == ["rows"] * 32 + ["cols"] * 32


def test_a_function_and_its_table_agree():
    grid = PatchGrid(5, 6, prefix=1)
    rotary = convention("kimi", 16, rotary_dim=12)(grid)
    of_table = verify_rotary(rotary, grid, head_dim=16)
    of_function = verify_rotary(lambda x: apply_rotary(x[:, None].float(), rotary)[:, 0], grid, head_dim=16)
    assert of_function.is_rotation and of_function.is_relative
    assert of_function.axes == of_table.axes and len(of_table.axes) == 6
    assert of_function.norm_ratio == pytest.approx(of_table.norm_ratio, abs=1e-6)


# ------------------------------------------------------------------------- what must be flagged


def test_public_code_of_2601_09954():
    """The table is [H, H, W, W], but channel j is paired with j + D/2: one rotates with the row, one with the column.

    The block of a pair is [[cos a, -sin a], [sin b, cos b]] with a, b the angles of row and column: determinant
    cos(a - b), singular values sqrt(1 +- sin(b - a)). On 16 x 16, cos(11) = 0.0044 is the smallest |determinant|.
    """
    grid = PatchGrid(16, 16)
    rows, columns = axis_angles(grid)
    angles = torch.cat([rows, rows, columns, columns], dim=1)
    report = verify_rotary(lambda x: x * angles.cos() + rotate_half(x) * angles.sin(), grid)
    assert not report.is_rotation and not report.is_relative
    assert 0.85 < report.norm_ratio[0] < 0.95 and 1.05 < report.norm_ratio[1] < 1.15
    assert set(report.axes.values()) == {"both"}
    determinants = (rows - columns).cos()
    assert report.determinant == pytest.approx((float(determinants.min()), float(determinants.max())), abs=1e-12)
    gap = (columns - rows).sin()
    assert report.singular_values[0] == pytest.approx(float((1 - gap.abs()).sqrt().min()), abs=1e-9)
    assert report.singular_values[1] == pytest.approx(float((1 + gap.abs()).sqrt().max()), abs=1e-9)
    assert math.prod(report.singular_values) == pytest.approx(0.0044, abs=1e-4)
    assert report.logit_deviation > 0.1
    assert "rotation: NO; relative: NO" in str(report)


def test_its_correct_form_passes():
    grid = PatchGrid(16, 16)
    angles = torch.cat(axis_angles(grid), dim=1).repeat(1, 2)
    report = verify_rotary(lambda x: x * angles.cos() + rotate_half(x) * angles.sin(), grid)
    assert report.is_rotation and report.is_relative
    assert report.logit_deviation < 1e-13
    assert "rotation: yes; relative: yes" in str(report)


def test_vjepa2_tiled_tables():
    """Channels 2j, 2j + 1 are a pair but read the angles of slots 2j, 2j + 1 of a table tiled, not interleaved."""
    vjepa2 = pytest.importorskip("transformers.models.vjepa2.modeling_vjepa2")
    grid = PatchGrid(8, 8)
    row, column = grid.coordinates().double().unbind(1)

    def fn(x):
        parts = [
            vjepa2.rotate_queries_or_keys(part[None, None], pos)[0, 0]
            for part, pos in zip(x.chunk(2, dim=-1), (row, column), strict=True)
        ]
        return torch.cat(parts, dim=-1)

    report = verify_rotary(fn, grid, head_dim=32)
    assert not report.is_rotation and not report.is_relative
    # pairs are unmixed all the same: it is the angles inside a pair that differ
    assert list(report.axes) == [(2 * p, 2 * p + 1) for p in range(16)]
    assert list(report.axes.values()) == ["rows"] * 8 + ["cols"] * 8
    frequencies = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8).repeat(2)
    apart = torch.arange(8)[:, None] * (frequencies[0::2] - frequencies[1::2])
    assert report.determinant[0] == pytest.approx(float(apart.cos().min()), abs=1e-9)


def test_a_rotation_that_is_not_relative():
    """Angles that grow with the square of the row."""
    grid = PatchGrid(6, 6)
    angles = torch.cat(axis_angles(grid, 16), dim=1) ** 2
    report = verify_rotary(Rotary.from_angles(angles), grid)
    assert report.is_rotation and not report.is_relative
    assert report.norm_ratio == pytest.approx((1, 1), abs=1e-12)


def test_linear_but_not_a_rotation():
    """A gain and a reflection keep logits a function of the offset; a squeeze keeps the determinant."""
    grid = PatchGrid(4, 4)
    rotary = AxialRoPE(16)(grid)

    def rotated(x):
        return apply_rotary(x[:, None], rotary)[:, 0]

    gain = verify_rotary(lambda x: 1.1 * rotated(x), grid, head_dim=16)
    assert gain.is_relative and not gain.is_rotation
    assert gain.norm_ratio == pytest.approx((1.1, 1.1)) and gain.determinant == pytest.approx((1.21, 1.21))
    flip = torch.ones(16, dtype=torch.float64)
    flip[0] = -1
    reflection = verify_rotary(lambda x: flip * rotated(x), grid, head_dim=16)
    assert reflection.is_relative and not reflection.is_rotation
    assert reflection.singular_values == pytest.approx((1, 1)) and reflection.determinant[0] == pytest.approx(-1)
    squeeze = torch.ones(16, dtype=torch.float64)
    squeeze[0], squeeze[8] = 2, 0.5
    squeezed = verify_rotary(lambda x: squeeze * rotated(x), grid, head_dim=16)
    assert not squeezed.is_rotation and squeezed.determinant == pytest.approx((1, 1), abs=1e-6)


def test_the_logit_deviation_of_a_one_head_fault_is_found():
    grid = PatchGrid(4, 4)
    angles = MixedRoPE(16, 3)(grid)
    cos, sin = angles.cos.detach().clone(), angles.sin.detach().clone()
    cos[0, 5, 1], sin[0, 5, 1] = cos[0, 6, 1], sin[0, 6, 1].clone()
    report = verify_rotary(Rotary(cos, sin, "interleaved"), grid)
    assert report.is_rotation and not report.is_relative


def test_prefix_tokens_must_be_untouched():
    grid = PatchGrid(4, 4, prefix=1)
    rotary = AxialRoPE(16)(grid.coordinates() + 1)  # as if the offset applied to CLS
    report = verify_rotary(rotary, grid)
    assert report.is_rotation and report.is_relative
    assert not report.unrotated_is_identity
    assert "prefix or suffix tokens are CHANGED" in str(report)


def test_images_are_compared_each_for_itself():
    """DINOv3's angle per patch depends on the size of the image: relative within, not across."""
    grid = PatchGrid.packed([(4, 4), (8, 8)])
    report = verify_rotary(convention("dinov3", 16)(grid), grid)
    assert report.is_relative
    scrambled = convention("dinov3", 16)(PatchGrid.packed([(8, 8), (4, 4)]))
    assert not verify_rotary(scrambled, grid).is_relative


# ------------------------------------------------------------------------------------------------------- causes

HEAD = 32
SQUARE = PatchGrid(16, 16)


def ladders(grid: PatchGrid = SQUARE, dim: int = HEAD) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = axis_angles(grid, dim)
    return rows, columns


def full(angles: torch.Tensor):
    """rotate_half code with a table of all channels."""
    return lambda x: x * angles.cos() + rotate_half(x) * angles.sin()


def neighbours(angles: torch.Tensor):
    """The same with pairs of neighbouring channels."""

    def rotate(x):
        turned = torch.stack([-x[:, 1::2], x[:, 0::2]], dim=-1).flatten(1)
        return x * angles.cos() + turned * angles.sin()

    return rotate


def the_seed():
    """arXiv 2601.09954: [rows, rows, columns, columns] under rotate-half."""
    rows, columns = ladders()
    return full(torch.cat([rows, rows, columns, columns], dim=1))


def ernie_image():
    """Each angle twice side by side, [a, a, b, b], under rotate-half."""
    return full(torch.cat(ladders(), dim=1).repeat_interleave(2, dim=1))


def v_jepa_2():
    """Tiled tables, [f, f] of each axis, under pairs of neighbours."""
    rows, columns = ladders()
    return neighbours(torch.cat([rows, rows, columns, columns], dim=1))


def onevision():
    """torch.cat([freqs, freqs]) of all axes, under pairs of neighbours."""
    return neighbours(torch.cat([*ladders(), *ladders()], dim=1))


def control_ar():
    """A wrong slice: all angles are zero."""
    return Rotary.from_angles(torch.zeros(256, HEAD // 2))


def rows_only():
    rows, _ = ladders()
    return Rotary.from_angles(torch.cat([rows, rows / 2], dim=1).float())


def columns_only():
    _, columns = ladders()
    return Rotary.from_angles(torch.cat([columns, torch.zeros_like(columns)], dim=1).float())


def degrees():
    return Rotary.from_angles(torch.rad2deg(torch.cat(ladders(), dim=1)).float())


def flattened():
    token = torch.arange(256, dtype=torch.float64)
    return Rotary.from_angles((token[:, None] * 10000.0 ** (-torch.arange(16) / 16)).float())


def flattened_by_columns():
    row, column = SQUARE.coordinates().double().unbind(1)
    return Rotary.from_angles(((column * 16 + row)[:, None] * 10000.0 ** (-torch.arange(16) / 16)).float())


def full_width_tiled():
    return Rotary.from_angles(torch.cat(ladders(), dim=1).repeat(1, 2).float())


def full_width_interleaved():
    return Rotary.from_angles(torch.cat(ladders(), dim=1).repeat_interleave(2, dim=1).float(), "interleaved")


def squared():
    return Rotary.from_angles(torch.cat(ladders(), dim=1).float() ** 2)


def coordinates_in_pixels():
    return AxialRoPE(HEAD)(SQUARE.coordinates() * 14)


def coordinates_divided_twice():
    return AxialRoPE(HEAD)(SQUARE.coordinates() / 256)


def two_still_pairs():
    angles = torch.cat(ladders(), dim=1)
    angles[:, [3, 11]] = 0
    return Rotary.from_angles(angles.float())


def cls_moved():
    return AxialRoPE(HEAD)(PatchGrid(16, 16, prefix=1).coordinates() + 1)


def one_diagonal():
    rows, columns = ladders()
    return Rotary.from_angles(torch.cat([rows + columns, (rows + columns) / 2], dim=1).float())


def full_width_by_axis():
    rows, columns = ladders()
    return Rotary.from_angles(torch.cat([rows, rows, columns, columns], dim=1).float())


def no_minus():
    angles = torch.cat(ladders(), dim=1)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() + b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    return rotate


def cls_counted():
    token = torch.arange(257)
    at = torch.stack([token // 16, token % 16], dim=1).float()
    return AxialRoPE(HEAD)(at)


def radians_for_degrees():
    return Rotary.from_angles(torch.deg2rad(torch.cat(ladders(), dim=1)).float())


CAUSES = {
    one_diagonal: ("wrong", "axis_missing", "in one combination, 0.707 row + 0.707 column"),
    full_width_by_axis: ("wrong", "full_width", "32 columns, each angle twice.*unflatten(-1, (2, 2, -1))"),
    no_minus: ("wrong", "sign", "a minus sign is missing in 16 pairs"),
    cls_counted: ("wrong", "prefix", "shifted by the prefix"),
    radians_for_degrees: ("suspicious", "slow", "radians taken for degrees"),
    the_seed: ("wrong", "two_angles", "of 16 pairs, e.g. channels (0, 16).*both halves must hold all angles"),
    ernie_image: ("wrong", "two_angles", "both halves must hold all angles, torch.cat"),
    v_jepa_2: ("wrong", "two_angles", "e.g. channels (0, 1).*each angle must stand twice side by side"),
    onevision: ("wrong", "two_angles", "each angle must stand twice side by side"),
    control_ar: ("wrong", "no_position", "are the angles all 0"),
    rows_only: ("wrong", "axis_missing", "no pair depends on the column: all patches of a row are the same"),
    columns_only: ("wrong", "axis_missing", "no pair depends on the row: all patches of a column are the same"),
    degrees: ("wrong", "degrees", "rows: the fastest pair rotates by 57.3 radians per patch, one in degrees"),
    flattened: ("wrong", "flattened", "one index over the flattened grid"),
    flattened_by_columns: ("wrong", "flattened", "one index over the flattened grid"),
    full_width_tiled: ("wrong", "full_width", "32 columns, each angle twice, under which 64.*cos[..., :16]"),
    full_width_interleaved: ("wrong", "full_width", "cos[..., ::2]"),
    squared: ("wrong", "not_relative", "must be linear in row and column"),
    cls_moved: ("wrong", "prefix", "their angle should be 0"),
    coordinates_in_pixels: (
        "suspicious",
        "aliasing",
        "rotates by 14 radians per patch.*0.45 patches away looks the same",
    ),
    coordinates_divided_twice: ("suspicious", "slow", "rotates by 0.059 radians over 16 patches"),
    two_still_pairs: ("suspicious", "still", "2 of 16 pairs never rotate"),
}


@pytest.mark.parametrize("make", CAUSES, ids=lambda make: make.__name__)
def test_the_cause_is_named(make):
    level, cause, text = CAUSES[make]
    grid = PatchGrid(16, 16, prefix=1) if make in (cls_moved, cls_counted) else SQUARE
    report = verify_rotary(make(), grid, head_dim=HEAD)
    assert (report.level, report.findings[0].level, report.findings[0].cause) == (level, level, cause), str(report)
    pattern = ".*".join(map(re.escape, text.split(".*")))
    assert re.search(pattern, report.findings[0].text), report.findings[0].text
    assert " ".join(str(report.findings[0]).split()) in " ".join(str(report).split())
    assert max(map(len, str(report).splitlines())) <= 100


def test_a_sign_that_is_reversed():
    """Of the sine of one channel: a reflection."""
    angles = torch.cat(ladders(), dim=1)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() + b * angles.sin(), a * angles.sin() - b * angles.cos()], dim=-1)

    report = verify_rotary(rotate, SQUARE, head_dim=HEAD)
    assert report.findings[0].cause == "lengths" and "a sign is reversed" in report.findings[0].text


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(("head_dim", "grid"), [(16, PatchGrid(6, 9, prefix=1)), (64, SQUARE)])
def test_conventions_are_fine(name, head_dim, grid):
    heads = {"num_heads": 2} if name == "rope_vit_mixed" else {}
    report = verify_rotary(convention(name, head_dim, **heads), grid)
    assert report.findings == () and report.level == "fine", str(report)


def test_an_encoding_is_called_with_the_grid():
    encoding = AxialRoPE(16)
    assert str(verify_rotary(encoding, SQUARE)) == str(verify_rotary(encoding(SQUARE), SQUARE))


@pytest.mark.parametrize("first", [4.0, 20.0, 57.3, 100.0])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_a_wrapped_sequence_is_continued(first, ratio):
    made = [first * ratio**j for j in range(14)]
    seen = [abs(math.remainder(x, 2 * math.pi)) for x in made]
    assert fastest_of(seen) == pytest.approx(first, rel=1e-6)
    assert fastest_of(seen[::-1]) == pytest.approx(first, rel=1e-6)


def test_any_other_speeds_are_as_they_are():
    assert fastest_of([1.0, 0.3, 0.09, 0.027]) == 1.0
    assert fastest_of([0.2, 0.7, 1.9, 0.4, 0.1, 0.05, 0.025]) == 1.9  # as learned ones
    assert fastest_of([k * math.pi / 8 for k in range(1, 8)]) == 7 * math.pi / 8
    assert fastest_of([0.5]) == 0.5


# ---------------------------------------------------------------------------------------- errors

GRID = PatchGrid(3, 3)


@pytest.mark.parametrize(
    ("fn", "options", "error", "message"),
    [
        (Rotary.from_angles(torch.zeros(10, 4)), {}, ValueError, "rotary has 10 tokens, the grid 9"),
        (Rotary.from_angles(torch.zeros(9, 4)), {"head_dim": 6}, ValueError, "at least rotary_dim=8, got 6"),
        ("rope", {}, TypeError, "must be a Rotary, an encoding or a function, got str"),
        (AxialRoPE, {}, TypeError, r"is the class AxialRoPE: make one, AxialRoPE\(head_dim\)"),
        ((torch.ones(9, 4), torch.zeros(9, 4)), {}, TypeError, r"got tuple: Rotary\(cos, sin\), with a column"),
        (lambda x: x + torch.ones(4, 1), {}, ValueError, r"fn fails on x \(9, 64\), the tokens of the grid"),
        (lambda x: x, {"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        (lambda x: (x, x), {}, TypeError, "fn must return a tensor, got tuple"),
        (lambda x: x[:, :4], {}, ValueError, r"fn must map \(9, 64\) to the same shape, got \(9, 4\)"),
        (lambda x: x / 0, {}, ValueError, "NaN or Inf"),
        (lambda x: x / x.norm(dim=-1, keepdim=True), {}, ValueError, "linear in x"),
        (lambda x: x + 1, {}, ValueError, "linear in x"),
        (lambda x: x.flip(0), {}, ValueError, "act on each token alone"),
        (lambda x: x.cumsum(0), {}, ValueError, "act on each token alone"),
    ],
)
def test_errors_say_what_is_wrong(fn, options, error, message):
    with pytest.raises(error, match=message):
        verify_rotary(fn, GRID, **options)


def test_grid_must_be_a_grid():
    with pytest.raises(TypeError, match=r"grid must be a spatial_pe\.PatchGrid, got tuple"):
        verify_rotary(AxialRoPE(16)(GRID), (3, 3))
