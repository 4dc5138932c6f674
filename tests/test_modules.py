# SPDX-License-Identifier: Apache-2.0
"""RoPE2DAttention against the same module written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import threads
from torch import nn

from spatial_pe import AxialRoPE, MixedRoPE, PatchGrid, RoPE2D, RoPE2DAttention, Rotary, convention
from spatial_pe.backends import cpu


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threads(1):
        yield


C, H = 64, 4
GRID = PatchGrid(3, 5, prefix=1)
PACKED = PatchGrid.packed([(2, 3), (1, 1), (4, 2)])
BACKENDS = ["auto", "composed", "reference", *([] if cpu.unavailable() else ["cpu"])]


def by_hand(module: RoPE2DAttention, x: torch.Tensor, cos, sin, pairing: str, lengths=None) -> torch.Tensor:
    """(B, N, C) or packed (N, C) -> the same: explicit weights, explicit softmax, channels rotated one pair at a time.

    cos, sin: (N, 1 or heads, pairs)
    """
    *rows, tokens, _ = x.shape
    width = module.head_dim
    q_end, k_end = C, C + module.num_kv_heads * width
    qkv = x @ module.qkv.weight.T + (0 if module.qkv.bias is None else module.qkv.bias)
    q, k, v = (
        part.reshape(*rows, tokens, -1, width) for part in (qkv[..., :q_end], qkv[..., q_end:k_end], qkv[..., k_end:])
    )
    if cos is not None:
        q, k = rotated(q, cos, sin, pairing), rotated(k, cos, sin, pairing)
    group = module.num_heads // module.num_kv_heads
    k, v = k.repeat_interleave(group, -2), v.repeat_interleave(group, -2)
    outs, start = [], 0
    for length in lengths or [tokens]:
        part = slice(start, start + length)
        scores = torch.einsum("...nhd,...mhd->...hnm", q[..., part, :, :], k[..., part, :, :]) / width**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outs.append(torch.einsum("...hnm,...mhd->...nhd", weights, v[..., part, :, :]))
        start += length
    out = torch.cat(outs, dim=-3).reshape(*rows, tokens, C)
    return out @ module.proj.weight.T + (0 if module.proj.bias is None else module.proj.bias)


def rotated(x, cos, sin, pairing):
    pairs = cos.shape[-1]
    columns = [None] * x.shape[-1]
    for p in range(pairs):
        a, b = (2 * p, 2 * p + 1) if pairing == "interleaved" else (p, p + pairs)
        columns[a] = x[..., a] * cos[..., p] - x[..., b] * sin[..., p]
        columns[b] = x[..., a] * sin[..., p] + x[..., b] * cos[..., p]
    return torch.stack(columns, dim=-1)


def axial_angles(grid: PatchGrid, head_dim: int, theta: float) -> torch.Tensor:
    """(N, 1, pairs): the first half of the pairs rotates with the row, the second with the column."""
    quarter = head_dim // 4
    angles = torch.zeros(grid.num_tokens, 1, 2 * quarter)
    height, width = grid.images[0]
    for row in range(height):
        for column in range(width):
            for i in range(quarter):
                frequency = theta ** (-i / quarter)
                token = grid.prefix + row * width + column
                angles[token, 0, i], angles[token, 0, quarter + i] = row * frequency, column * frequency
    return angles


def equal_to_by_hand(module, x, expected_fn, *args, **kwargs):
    """Outputs, and the gradients of the input and of every parameter."""
    x = x.requires_grad_()
    out = module(x, *args, **kwargs)
    expected = expected_fn(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    names = ["x", *(name for name, _ in module.named_parameters())]
    wanted = [x, *module.parameters()]
    dout = torch.randn_like(out)
    got, grads = torch.autograd.grad(out, wanted, dout), torch.autograd.grad(expected, wanted, dout)
    for name, a, b in zip(names, got, grads, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item() + 1e-5, msg=lambda t, n=name: n + t
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_axial(backend, kv_heads):
    module = RoPE2DAttention(C, H, num_kv_heads=kv_heads, backend=backend)
    # a key's bias adds the same to all scores of a query, so without rotation its gradient would be 0
    angles = axial_angles(GRID, module.head_dim, module.rope.theta)
    equal_to_by_hand(
        module,
        torch.randn(2, GRID.num_tokens, C),
        lambda x: by_hand(module, x, angles.cos(), angles.sin(), module.rope.pairing),
        GRID,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed(backend):
    """Every head has its own frequencies, and they get a gradient."""
    module = RoPE2DAttention(C, H, rope="mixed", qkv_bias=False, proj_bias=False, backend=backend)
    assert set(dict(module.named_parameters())) == {"rope.frequencies", "qkv.weight", "proj.weight"}

    def expected(x):
        row, column = GRID.coordinates()[:, :, None, None].unbind(1)
        angles = row * module.rope.frequencies[0] + column * module.rope.frequencies[1]
        return by_hand(module, x, angles.cos(), angles.sin(), "interleaved")

    equal_to_by_hand(module, torch.randn(2, GRID.num_tokens, C), expected, GRID)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend):
    """A packed grid brings its cu_seqlens; given ones win; images do not see each other."""
    module = RoPE2DAttention(C, H, backend=backend)
    x = torch.randn(PACKED.num_tokens, C)
    images = [PatchGrid(h, w) for h, w in PACKED.images]
    angles = torch.cat([axial_angles(grid, module.head_dim, module.rope.theta) for grid in images])

    def expected(lengths):
        return lambda x: by_hand(module, x, angles.cos(), angles.sin(), module.rope.pairing, lengths)

    equal_to_by_hand(module, x, expected([6, 1, 8]), PACKED)
    cu_seqlens = torch.tensor([0, 5, 15], dtype=torch.int32)
    equal_to_by_hand(module, x, expected([5, 10]), PACKED, cu_seqlens=cu_seqlens)
    equal_to_by_hand(module, x, expected([5, 10]), PACKED.coordinates(), cu_seqlens=cu_seqlens, max_seqlen=10)


def test_padded():
    module = RoPE2DAttention(C, H)
    x = torch.randn(2, GRID.num_tokens, C)
    out = module(x, GRID, seqlens=torch.tensor([16, 9], dtype=torch.int32))
    torch.testing.assert_close(out[0], module(x, GRID)[0])
    short = Rotary.from_angles(axial_angles(GRID, 16, module.rope.theta)[None, :9], module.rope.pairing)
    torch.testing.assert_close(out[1, :9], module(x[1:, :9], short)[0])
    assert torch.equal(out[1, 9:], module.proj.bias.expand(7, C))


def test_ways_to_say_where_tokens_are():
    """A grid, its coordinates, a ready Rotary."""
    grid = PatchGrid(4, 4)
    module, x = RoPE2DAttention(C, H), torch.randn(1, 16, C)
    expected = module(x, grid)
    assert torch.equal(module(x, grid.coordinates()), expected)
    assert torch.equal(module(x, module.rope(grid)), expected)
    assert not torch.allclose(module(x, PatchGrid(2, 8)), expected, atol=1e-3)


def test_without_rope():
    """Plain attention: tokens are a set. A key's bias does not matter, but all else does."""
    module = RoPE2DAttention(C, H, rope=None, qkv_bias=False)
    x = torch.randn(2, 15, C)
    equal_to_by_hand(module, x, lambda x: by_hand(module, x, None, None, ""))
    order = torch.randperm(15)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    # a grid is then of no use, but for a packed one's lengths
    assert torch.equal(module(x, GRID), module(x))
    packed = torch.randn(PACKED.num_tokens, C)
    equal_to_by_hand(module, packed, lambda x: by_hand(module, x, None, None, "", [6, 1, 8]), PACKED)


@pytest.mark.parametrize("name", ["qwen2_vl", "pixtral", "dinov3"])
def test_any_encoding(name):
    """rope is a module that the user brings; its Rotary is used."""
    rope = convention(name, 16)
    module, x = RoPE2DAttention(C, H, rope=rope), torch.randn(1, 15, C)
    assert module.rope is rope
    rotary = rope(PatchGrid(3, 5))
    expected = by_hand(module, x, rotary.cos[0], rotary.sin[0], rotary.pairing)
    torch.testing.assert_close(module(x, PatchGrid(3, 5)), expected, rtol=1e-4, atol=1e-5)


def test_mixed_learns():
    """Each token shall give its right neighbour (the last of a row its first): attention without positions cannot, and
    the frequencies that the rotation starts from do not. New data in every step, so that nothing is learned by heart.
    """
    torch.manual_seed(1)
    grid = PatchGrid(4, 4)
    losses = {}
    for name, rope in (("mixed", MixedRoPE(16, 2)), ("none", None)):
        model = RoPE2DAttention(32, 2, rope=rope)
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        losses[name] = []
        for _ in range(280):
            x = torch.randn(8, 4, 4, 32)
            loss = nn.functional.mse_loss(model(x.flatten(1, 2), grid), x.roll(-1, dims=2).flatten(1, 2))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses[name].append(loss.item())
        moved = [(p - q).abs().max() for p, q in zip(model.parameters(), start, strict=True)]
        assert all(distance > 1e-3 for distance in moved)
    assert losses["none"][-1] > 0.8
    assert losses["mixed"][-1] < 0.2


def test_state_dict_and_copies():
    module = RoPE2DAttention(C, H, rope="mixed")
    other = RoPE2DAttention(C, H, rope="mixed")
    x = torch.randn(1, GRID.num_tokens, C)
    assert not torch.equal(module(x, GRID), other(x, GRID))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x, GRID), other(x, GRID))
    assert torch.equal(module(x, GRID), copy.deepcopy(module)(x, GRID))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rope", ["axial", "mixed"])
def test_cast(dtype, rope):
    """model.to(dtype): the output follows, and is that of float32 up to the rounding of the dtype."""
    module = RoPE2DAttention(C, H, rope=rope)
    x = torch.randn(1, GRID.num_tokens, C)
    expected = module(x, GRID)
    out = module.to(dtype)(x.to(dtype), GRID)
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < 8 * max(torch.finfo(dtype).eps, 1e-7) * expected.norm()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dim": 65}, r"^num_heads must divide embed_dim, got num_heads=4, embed_dim=65"),
        ({"num_heads": 0}, r"^num_heads must divide embed_dim, got num_heads=0"),
        ({"num_kv_heads": 3}, r"^num_kv_heads must divide num_heads, got 3 and 4"),
        ({"num_kv_heads": 0}, r"^num_kv_heads must divide num_heads, got 0 and 4"),
        ({"rope": "axail"}, r"^rope must be \"axial\", \"mixed\", a module or None, got 'axail'"),
        ({"embed_dim": 24}, r"rotary_dim must be a multiple of 4|head_dim .*6"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RoPE2DAttention(**({"embed_dim": C, "num_heads": H} | kwargs))


def test_wrong_calls():
    module, x = RoPE2DAttention(C, H), torch.randn(2, 15, C)
    with pytest.raises(ValueError, match=r"^x must be \(B, N, C\) or packed \(T, C\), got shape \(1, 2, 15, 64\)"):
        module(x[None], GRID)
    with pytest.raises(ValueError, match=r"^grid is None: pass a PatchGrid, \(N, 2\) coordinates or a Rotary"):
        module(x)
    with pytest.raises(ValueError, match=r"^packed x \(T, C\) needs cu_seqlens, or a PatchGrid that has them"):
        module(x[0], PatchGrid(3, 5).coordinates())
    with pytest.raises(ValueError, match=r"^packed x \(T, C\) needs cu_seqlens, or a PatchGrid"):
        RoPE2DAttention(C, H, rope=None)(x[0])
    with pytest.raises(ValueError, match=r"^rotary has 15 tokens, q has 16: did you forget prefix=1\?"):
        module(torch.randn(2, 16, C), PatchGrid(3, 5))
    # several images in a batch of one, without their bounds: they would see each other
    with pytest.raises(ValueError, match=r"^grid packs 3 images: x must be packed \(T, C\), got shape \(1, 15, 64\)"):
        module(torch.randn(1, PACKED.num_tokens, C), PACKED)


def test_axial_is_the_default():
    rope = RoPE2DAttention(C, H).rope
    assert isinstance(rope, AxialRoPE) and rope.head_dim == C // H


# --------------------------------------------------------------------------------------------------------------- RoPE2D


def as_croco_has_it(tokens: torch.Tensor, positions: torch.Tensor, freq: float) -> torch.Tensor:
    """(B, H, N, D) in float64: halves by row and by column, each rotate-half over its whole width."""
    out, half = [], tokens.shape[-1] // 2
    for axis, x in enumerate(tokens.double().split(half, dim=-1)):
        angles = positions[:, None, :, axis, None] * freq ** -(torch.arange(0, half, 2).double() / half)
        angles = torch.cat([angles, angles], dim=-1)
        other = torch.cat([-x[..., half // 2 :], x[..., : half // 2]], dim=-1)
        out.append(x * angles.cos() + other * angles.sin())
    return torch.cat(out, dim=-1)


@pytest.fixture
def positions() -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(3), torch.arange(5)).expand(2, -1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "of a fused projection", "tokens first"])
@pytest.mark.parametrize("inplace", [False, True])
def test_rope_2d_is_that_of_croco(inplace, layout, dtype, positions):
    wide = torch.randn(2, 15, 3, 4, 64).to(dtype)
    tokens = wide[:, :, 1].transpose(1, 2)  # (B, H, N, D), as CroCo's attention hands it over
    tokens = tokens.contiguous() if layout == "contiguous" else tokens
    expected = as_croco_has_it(tokens, positions, 100.0)
    rope = RoPE2D(freq=100.0, inplace=inplace, heads_first=layout != "tokens first")
    given = tokens.transpose(1, 2) if layout == "tokens first" else tokens
    out = rope(given, positions)
    assert out.shape == given.shape and out.dtype == dtype
    assert (out.data_ptr() == given.data_ptr()) is inplace
    found = out.transpose(1, 2) if layout == "tokens first" else out
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


class Attention(nn.Module):
    def __init__(self, rope: RoPE2D) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.rope(tokens, positions)


def test_rope_2d_learns_and_compiles(positions):
    rope, tokens = RoPE2D(freq=50.0), torch.randn(2, 4, 15, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(rope(tokens, positions).square().sum() / 2, tokens)
    torch.testing.assert_close(grad, tokens.detach())  # a rotation keeps the norm
    fast = torch.compile(rope, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(tokens, positions), rope(tokens, positions))
    graph = torch.fx.symbolic_trace(Attention(rope))
    torch.testing.assert_close(graph(tokens, positions), rope(tokens, positions))
    assert list(rope.state_dict()) == [] and list(rope.float().parameters()) == []
    shifted = RoPE2D(F0=2.0)(tokens, positions)
    torch.testing.assert_close(shifted, RoPE2D()(tokens, 2 * positions))


def test_rope_2d_follows_positions_that_change(positions):
    rope, tokens, positions = RoPE2D(), torch.randn(2, 4, 15, 32), positions.clone()
    rope(tokens, positions)
    positions += 3
    expected = as_croco_has_it(tokens, positions, 100.0)
    torch.testing.assert_close(rope(tokens, positions).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "positions", "message"),
    [
        ((2, 15, 64), (2, 15, 2), r"tokens must be \(B, H, N, D\)"),
        ((2, 4, 15, 30), (2, 15, 2), "D a multiple of 4"),
        ((2, 4, 15, 32), (15, 2), r"positions must be \(B, N, 2\), row and column of each token, \(2, 15, 2\) here"),
        ((2, 15, 4, 32), (2, 15, 2), r"\(2, 4, 2\) here, got \(2, 15, 2\)"),
    ],
)
def test_rope_2d_names_the_argument(tokens, positions, message):
    with pytest.raises(ValueError, match=message):
        RoPE2D()(torch.randn(tokens), torch.zeros(positions))
