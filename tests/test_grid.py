# SPDX-License-Identifier: Apache-2.0
"""PatchGrid: the order of tokens, packed sequences and windows, against the code of the models."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_pe import AxialRoPE, rope_attention
from spatial_pe.grid import PatchGrid

sides = st.integers(1, 9)
property_test = settings(max_examples=50, deadline=None)


@st.composite
def grids(draw, prefix: bool = True) -> PatchGrid:
    merge = draw(st.integers(1, 3))
    images = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    images = [(h * merge, w * merge) for h, w in images]
    extra = {name: draw(st.integers(0, 3)) if prefix else 0 for name in ("prefix", "suffix")}
    return PatchGrid.packed(images, merge, **extra)


# ----------------------------------------------------------------- coordinates


def test_row_major_with_prefix_and_suffix():
    grid = PatchGrid(2, 3, prefix=1, suffix=2)
    expected = [[0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0], [0, 0]]
    assert grid.coordinates().tolist() == expected
    assert grid.rotated.tolist() == [False] + [True] * 6 + [False] * 2
    assert grid.sizes().tolist() == [[2, 3]] * 9
    assert grid.num_tokens == 9


def test_merge_blocks():
    grid = PatchGrid(4, 4, merge_size=2)
    first_blocks = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert grid.coordinates()[:8].tolist() == first_blocks


@given(grids())
@property_test
def test_every_patch_occurs_once_in_each_image(grid):
    bounds = grid.cu_seqlens.tolist()
    assert grid.cu_seqlens.dtype == torch.int32
    assert bounds[0] == 0 and bounds[-1] == grid.num_tokens == len(grid.coordinates())
    assert max(b - a for a, b in pairwise(bounds)) == grid.max_seqlen
    for (height, width), start, stop in zip(grid.images, bounds, bounds[1:], strict=False):
        here = slice(start, stop)
        rotated = grid.rotated[here]
        assert rotated.tolist() == [False] * grid.prefix + [True] * height * width + [False] * grid.suffix
        places = grid.coordinates()[here][rotated]
        assert sorted(map(tuple, places.tolist())) == [(r, c) for r in range(height) for c in range(width)]
        assert not grid.coordinates()[here][~rotated].any()
        assert (grid.sizes()[here] == torch.tensor([height, width])).all()


@given(st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=3), st.integers(1, 3))
@property_test
def test_order_equals_qwen_position_ids(videos, merge):
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    videos = [(t, h * merge, w * merge) for t, h, w in videos]
    grid_thw = torch.tensor(videos)
    if hasattr(modeling, "get_vision_position_ids"):  # transformers 5
        position_ids = modeling.get_vision_position_ids(grid_thw, merge)
    else:  # the positions are an index into a table of angles: give it a table that is its own index
        model = SimpleNamespace(spatial_merge_size=merge, rotary_pos_emb=lambda n: torch.arange(n)[:, None])
        position_ids = modeling.Qwen2_5_VisionTransformerPretrainedModel.rot_pos_emb(model, grid_thw)
    grid = PatchGrid.packed([(h, w) for t, h, w in videos for _ in range(t)], merge)
    assert torch.equal(grid.coordinates().long(), position_ids)


# --------------------------------------------------------------------- windows


@given(grids(prefix=False), st.integers(1, 4))
@property_test
def test_windows_partition_the_tokens(grid, scale):
    size = grid.merge_size * scale
    permutation, cu_seqlens = grid.windows(size)
    assert sorted(permutation.tolist()) == list(range(grid.num_tokens))
    bounds = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32
    assert bounds[0] == 0 and bounds[-1] == grid.num_tokens
    assert len(bounds) - 1 == sum(-(-h // size) * -(-w // size) for h, w in grid.images)
    image = torch.repeat_interleave(torch.arange(len(grid.images)), torch.tensor(grid.lengths))
    place = torch.cat([image[:, None], grid.coordinates().long() // size], dim=1)[permutation]
    seen = []
    for start, stop in pairwise(bounds):
        assert stop > start
        assert (place[start:stop] == place[start]).all()
        assert (permutation[start:stop].diff() > 0).all()
        seen.append(tuple(place[start].tolist()))
    assert seen == sorted(set(seen))


@given(st.lists(st.tuples(st.integers(1, 2), sides, sides), min_size=1, max_size=3), st.integers(1, 3))
@property_test
def test_windows_equal_qwen2_5_vl(videos, scale):
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    merge, patch = 2, 14
    videos = [(t, 2 * h, 2 * w) for t, h, w in videos]
    size = merge * scale
    grid_thw = torch.tensor(videos)
    if hasattr(modeling, "get_vision_window_index"):  # transformers 5
        index, bounds = modeling.get_vision_window_index(grid_thw, merge, size * patch, patch)
    else:
        settings_ = {"window_size": size * patch, "spatial_merge_size": merge, "patch_size": patch}
        model = SimpleNamespace(**settings_, spatial_merge_unit=merge**2)
        index, bounds = modeling.Qwen2_5_VisionTransformerPretrainedModel.get_window_index(model, grid_thw)
        bounds = torch.unique_consecutive(torch.tensor(bounds, dtype=torch.int32))
    tokens = (index[:, None] * merge**2 + torch.arange(merge**2)).flatten()

    permutation, cu_seqlens = PatchGrid.packed([(h, w) for t, h, w in videos for _ in range(t)], merge).windows(size)
    assert torch.equal(permutation, tokens)
    assert torch.equal(cu_seqlens, bounds)


@pytest.mark.parametrize("rotated", [True, False])
def test_windows_attend_like_one_call_each(rotated):
    """Each window on its own, with the angles of its own tokens."""
    grid = PatchGrid.packed([(6, 10), (4, 4)])
    rotary = AxialRoPE(16)(grid) if rotated else None
    q, k, v = torch.randn(3, grid.num_tokens, 2, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    windows = grid.windows(4)
    packed = windows.pack(q, k, v, rotary)
    local = rope_attention(*packed, cu_seqlens=windows.cu_seqlens, max_seqlen=windows.max_seqlen)
    out = windows.unpack(local)
    place = torch.repeat_interleave(torch.arange(2), torch.tensor(grid.lengths))[:, None]
    place = torch.cat([place, grid.coordinates().long() // 4], dim=1)
    kinds, which = place.unique(dim=0, return_inverse=True)
    assert len(kinds) == len(windows.cu_seqlens) - 1 and windows.max_seqlen == which.bincount().max()
    for window in range(len(kinds)):
        tokens = (which == window).nonzero().flatten()
        table = None if rotary is None else rotary.index_tokens(tokens)
        alone = rope_attention(q[None, tokens], k[None, tokens], v[None, tokens], table)[0]
        torch.testing.assert_close(out[tokens], alone)


def test_windows_unpack_what_they_packed():
    windows = PatchGrid(5, 7).windows(2)
    x = torch.randn(35, 3)
    (packed,) = windows.pack(x)
    assert torch.equal(packed, x[windows.permutation]) and torch.equal(windows.unpack(packed), x)


# ---------------------------------------------------------------------- errors


WINDOWS = PatchGrid(4, 4).windows(2)


def test_hashable_and_comparable():
    assert PatchGrid(2, 3) == PatchGrid.packed([[2, 3]])
    assert hash(PatchGrid(2, 3)) == hash(PatchGrid.packed([[2, 3]]))
    assert PatchGrid(2, 3) != PatchGrid(2, 3, prefix=1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PatchGrid(0, 3), ValueError, "height must be at least 1, got 0"),
        (lambda: PatchGrid(3, 2.0), TypeError, "width must be an int, got float"),
        (lambda: PatchGrid(True, 2), TypeError, "height must be an int, got bool"),
        (lambda: PatchGrid(3, 2, prefix=-1), ValueError, "prefix must be at least 0, got -1"),
        (lambda: PatchGrid(3, 2, merge_size=2), ValueError, "merge_size=2 must divide the grid, got 3 x 2"),
        (lambda: PatchGrid.packed([]), ValueError, "images is empty"),
        (lambda: PatchGrid.packed([(1, 4, 4)]), ValueError, "repeat a pair for each video frame"),
        (lambda: PatchGrid(4, 4, prefix=1).windows(2), ValueError, "windows hold patches only"),
        (lambda: WINDOWS.pack(torch.ones(2, 16, 3)), ValueError, "argument 0 of pack must be .16, ...."),
        (
            lambda: WINDOWS.pack(*torch.ones(3, 16, 2)),
            ValueError,
            "pack the rotary too, windows.pack",
        ),
        (lambda: WINDOWS.pack(None, [1]), TypeError, "argument 1 of pack must be a tensor, a Rotary or None"),
        (lambda: WINDOWS.unpack(torch.ones(15)), ValueError, "out must be .16, ...., a row for each token"),
        (lambda: WINDOWS.pack(AxialRoPE(8)(PatchGrid(3, 4))), ValueError, "the rotary has 12 tokens"),
        (lambda: PatchGrid(4, 4, merge_size=2).windows(3), ValueError, "size=3 must be a multiple of merge_size=2"),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()
