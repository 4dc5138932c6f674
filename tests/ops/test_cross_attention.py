# SPDX-License-Identifier: Apache-2.0
"""Attention to other tokens: keys with a table and lengths of their own."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from oracles import CPU_KERNELS, threads
from oracles.cross import CASES, NAMES, Cross, random_call
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import spatial_pe
from spatial_pe import PatchGrid, RoPE2DAttention, RoPE2DCrossAttention, Rotary, apply_rotary_qk, rope_attention
from spatial_pe.backends import cpu
from spatial_pe.backends.triton import backend as triton

BACKENDS = [*(["cpu"] if cpu.unavailable() is None else []), "composed", "reference"]
BACKENDS += [] if triton.unavailable() or not triton.INTERPRETED else ["triton"]
Q, K = torch.randn(1, 6, 2, 16), torch.randn(1, 9, 2, 16)
OF_Q, OF_K = (Rotary.from_angles(torch.zeros(n, 8)) for n in (6, 9))
BOUNDS = torch.tensor([0, 2, 6], dtype=torch.int32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows():
    """Half of the pairs, and of Triton's, which the interpreter runs, a quarter, and no long one, are not slow."""
    for backend, (i, case), (j, dtype) in product(BACKENDS, enumerate(CASES), enumerate(DTYPES)):
        slow = (i + j) % 2 or (backend == "triton" and ((i + j) % 4 or max(case.keys) > 500))
        yield pytest.param(backend, case, dtype, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("backend", "case", "dtype"), list(rows()), ids=str)
@pytest.mark.usefixtures("rounds_bfloat16")
def test_outputs_and_gradients_follow_the_error_rule(backend, case, dtype):
    case.make(dtype)
    if backend == "triton" and case.dim > 128:
        with pytest.raises(ValueError, match=f"head_dim is {case.dim}: must be a multiple of 8 from 16 to 128"):
            case.run(backend)
        return
    case.check(case.run(backend), case.run("composed"))


@pytest.mark.parametrize("lengths", [("seqlens",), ("seqlens_k",)], ids=lambda names: names[0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_on_one_side(backend, lengths):
    """The other one is whole. As a call for each sample."""
    case = Cross((70, 12), (40, 90), "padded", heads=2, kv_heads=1, dim=32, rotary_dim=16)
    case.make(torch.float32)
    given = {name: x for name, x in case.lengths().items() if name in lengths}
    q, k, v, dout = (case.tensors[name].nan_to_num(nan=0.3) for name in ("q", "k", "v", "dout"))
    rotary, rotary_k = (Rotary.from_angles(case.tensors[name]) for name in ("rotary", "rotary_k"))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = rope_attention(q, k, v, rotary, rotary_k=rotary_k, backend=backend, **given)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for b, (n, m) in enumerate(zip(case.queries, case.keys, strict=True)):
        n, m = (n if "seqlens" in lengths else q.shape[1]), (m if "seqlens_k" in lengths else k.shape[1])
        parts = [x[b : b + 1, :count].detach().double().requires_grad_() for x, count in ((q, n), (k, m), (v, m))]
        tables = (Rotary(x.cos[:, :count], x.sin[:, :count]) for x, count in ((rotary, n), (rotary_k, m)))
        alone = rope_attention(*parts[:3], next(tables), rotary_k=next(tables), backend="reference")
        expected = (alone, *torch.autograd.grad(alone, parts, dout[b : b + 1, :n].double()))
        for x, y, count in zip((out, *grads), expected, (n, n, m, m), strict=True):
            torch.testing.assert_close(x[b, :count], y[0].float(), rtol=1e-4, atol=1e-4)
            assert (x[b, count:] == 0).all()


@pytest.mark.usefixtures("rounds_bfloat16")
@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow) if i > 3 else i for i in range(60)])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "composed"])
def test_random_calls_follow_the_error_rule(backend, seed):
    rng = random.Random(seed)
    case = random_call(rng)
    case.make(rng.choice(DTYPES))
    case.check(case.run(backend), case.run("composed"))


@pytest.mark.parametrize("form", ["dense", "packed", "padded"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("lengths", [(6, 0), (0, 9), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_keys_or_queries_all_is_zero(backend, lengths, rotated, form):
    """Whatever q holds, and the memory that the results get."""
    case = Cross(lengths[:1], lengths[1:], form)
    case.make(torch.float32)
    q, k, v = (case.tensors[name].fill_(torch.nan).requires_grad_() for name in "qkv")
    tables = {name: Rotary.from_angles(case.tensors[name]) if rotated else None for name in ("rotary", "rotary_k")}
    for _ in range(4):  # freed memory, which an allocation of the same size gets
        used = [torch.full_like(x, torch.nan) for x in (q, q, k, v) for _ in range(4)]
        del used
        out = rope_attention(q, k, v, backend=backend, **tables, **case.lengths())
        for x in (out, *torch.autograd.grad(out.sum(), [q, k, v])):
            assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=str)
def test_every_instruction_set(kernel):
    case = Cross((5, 130, 0, 41), (37, 3, 4, 300), heads=4, kv_heads=2, dim=72, rotary_dim=40)
    case.make(torch.float32)
    exact = case.exact()
    with kernel.selected(), threads(1):
        alone = case.run("cpu")
    for name in NAMES:
        assert (alone[name].double() - exact[name]).norm() <= 1e-5 * (1 + exact[name].norm()), name
    with kernel.selected(), threads(2):
        assert all(torch.equal(x, alone[name]) for name, x in case.run("cpu").items())


@pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu: {cpu.unavailable()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_threads_on_one_head_add_in_order(dtype):
    """More threads than heads: they share blocks of keys, and add to dq in the order of one thread. Again and again."""
    case = Cross((500, 260), (1100, 700), heads=3, kv_heads=1)
    case.make(dtype)
    with threads(1):
        alone = case.run("cpu")
    for count in (2, 3, 5, 8) * 3:
        with threads(count):
            assert all(torch.equal(x, alone[name]) for name, x in case.run("cpu").items()), count


def test_the_same_tokens_are_self_attention():
    """Bit for bit, through either door."""
    case = Cross((20, 33), (20, 33))
    case.make(torch.float32)
    q, k, v = (case.tensors[name] for name in "qkv")
    rotary = Rotary.from_angles(case.tensors["rotary"])
    bounds = case.lengths()["cu_seqlens"]
    own = rope_attention(q, k, v, rotary, cu_seqlens=bounds)
    assert torch.equal(rope_attention(q, k, v, rotary, cu_seqlens=bounds, cu_seqlens_k=bounds), own)
    assert torch.equal(rope_attention(q, k, v, rotary, rotary_k=rotary, cu_seqlens=bounds), own)


def test_one_table_for_both_gets_both_gradients():
    x = torch.randn(3, 1, 12, 2, 16)
    gradients = []
    for explicit in (False, True):
        angles = torch.zeros(12, 8).requires_grad_()
        rotary = Rotary.from_angles(angles)
        out = rope_attention(*x, rotary, rotary_k=rotary if explicit else None)
        gradients.append(torch.autograd.grad(out.square().sum(), angles)[0])
    torch.testing.assert_close(*gradients)


def test_keys_that_are_not_rotated():
    q, k, v = torch.randn(1, 6, 2, 16), *torch.randn(2, 1, 9, 2, 16)
    rotary = Rotary.from_angles(torch.randn(6, 8))
    still = Rotary.identity(9, 16)
    expected = rope_attention(apply_rotary_qk(q, k, rotary, still)[0], k, v)
    torch.testing.assert_close(rope_attention(q, k, v, rotary, rotary_k=still), expected)


def test_tables_behind_each_other():
    a, b = Rotary.from_angles(torch.randn(4, 8)), Rotary.from_angles(torch.randn(2, 5, 3, 8))
    both = Rotary.cat([a, b, Rotary.identity(2, 16)])
    assert both.cos.shape == (2, 11, 3, 8)
    assert torch.equal(both.cos[:, 4:9], b.cos) and torch.equal(both.sin[1, :4, 2], a.sin[0, :, 0])
    assert (both.cos[:, 9:] == 1).all() and (both.sin[:, 9:] == 0).all()
    with pytest.raises(ValueError, match="tables must rotate the same pairs, got no table"):
        Rotary.cat([])
    with pytest.raises(ValueError, match="tables must rotate the same pairs"):
        Rotary.cat([a, Rotary.identity(2, 16, "interleaved")])


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7]], ids=lambda case: case.form)
@pytest.mark.parametrize("way", ["make_fx", "decomposed", "compiled", "backward_decomposed"])
def test_transforms(case, way):
    case.make(torch.float32)
    q, k, v, dout = (case.tensors[name].nan_to_num() for name in ("q", "k", "v", "dout"))
    rotary, rotary_k = (Rotary.from_angles(case.tensors[name]) for name in ("rotary", "rotary_k"))

    def attend(q, k, v):
        return rope_attention(q, k, v, rotary, rotary_k=rotary_k, **case.lengths())

    def both(q, k, v):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    expected = both(q, k, v)
    if way == "make_fx":
        found = (make_fx(attend)(q, k, v)(q, k, v),)
    elif way == "decomposed":
        graph = make_fx(attend, spatial_pe.decompositions())(q, k, v)
        assert "spatial_pe" not in graph.code
        found = (graph(q, k, v),)
    elif way == "compiled":
        torch._dynamo.reset()
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = torch.compile(attend, backend="aot_eager", fullgraph=True)(*leaves)
        found = (out, *torch.autograd.grad(out, leaves, dout))
    else:
        found = make_fx(both, spatial_pe.decompositions())(q, k, v)(q, k, v)
    for x, y in zip(found, expected, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_vmap():
    q, k, v = torch.randn(3, 2, 5, 2, 16), *torch.randn(2, 3, 2, 9, 2, 16)
    rotary, rotary_k = (Rotary.from_angles(torch.randn(n, 8)) for n in (5, 9))

    def attend(q, k, v):
        return rope_attention(q, k, v, rotary, rotary_k=rotary_k)

    torch.testing.assert_close(
        torch.vmap(attend)(q, k, v), torch.stack([attend(*x) for x in zip(q, k, v, strict=True)])
    )

    def loss(q, k, v):
        return attend(q, k, v).square().sum()

    each = torch.stack([torch.func.grad(loss)(*x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(q, k, v), each)


@pytest.mark.parametrize("lanes", ["cos", "sin", "sin_k"])
def test_vmap_over_one_of_the_tables(lanes):
    q, k, v = torch.randn(2, 5, 2, 16), *torch.randn(2, 2, 9, 2, 16)
    tables = {"cos": (1, 5), "sin": (1, 5), "cos_k": (1, 9), "sin_k": (1, 9)}
    tables = {name: torch.randn(*shape, 1, 8) for name, shape in tables.items()}
    batch = torch.randn(3, *tables[lanes].shape)

    def attend(table):
        given = {**tables, lanes: table}
        of_q, of_k = Rotary(given["cos"], given["sin"]), Rotary(given["cos_k"], given["sin_k"])
        return rope_attention(q, k, v, of_q, rotary_k=of_k)

    torch.testing.assert_close(torch.vmap(attend)(batch), torch.stack([attend(table) for table in batch]))


def test_onnx_refuses_attention_to_no_keys():
    pytest.importorskip("onnxscript")

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return rope_attention(q, k, k)

    q, k = torch.randn(1, 5, 2, 16), torch.randn(1, 0, 2, 16)
    options = {"dynamo": True, "opset_version": 23, "custom_translation_table": spatial_pe.onnx_translations()}
    with pytest.raises(Exception, match="spatial_pe: ONNX's Attention needs at least one key"):
        torch.onnx.export(Attend(), (q, k), verbose=False, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({11: False}, "q and k must have the same batch and tokens"),
        ({12: None, 13: None}, "rotary and rotary_k must be given together"),
        ({14: torch.tensor([0, 9], dtype=torch.int32)}, "cu_seqlens and cu_seqlens_k must be given together"),
        ({12: torch.ones(1, 8, 1, 8), 13: torch.zeros(1, 8, 1, 8)}, "rotary_k has 8 tokens, k has 9"),
        ({16: torch.tensor([9, 9], dtype=torch.int32)}, "seqlens_k must have an entry for each of the 1 samples"),
    ],
)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "composed"])
def test_the_op_checks_what_could_crash(backend, change, message):
    table = [torch.ones(1, 6, 1, 8), torch.zeros(1, 6, 1, 8)]
    keys = [True, torch.ones(1, 9, 1, 8), torch.zeros(1, 9, 1, 8), None, None, None]
    args = [Q, K, K, *table, "half", 0.25, None, None, None, backend, *keys]
    torch.ops.spatial_pe.rope_attention(*args)
    for position, value in change.items():
        args[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.spatial_pe.rope_attention(*args)


# --------------------------------------------------------------------------------------------------------------- module


def test_the_module_is_two_calls_of_attention():
    """Of one view to the other, as DUSt3R's decoder has it; packed pairs too."""
    torch.manual_seed(0)
    module = RoPE2DCrossAttention(48, 3, context_dim=32)
    view, other = PatchGrid(3, 5), PatchGrid(4, 2)
    x, context = torch.randn(2, 15, 48), torch.randn(2, 8, 32)
    out = module(x, context, view, other)
    q = module.q(x).unflatten(-1, (3, 16))
    k, v = module.kv(context).unflatten(-1, (6, 16)).split(3, dim=-2)
    expected = rope_attention(q, k, v, module.rope(view), rotary_k=module.rope(other)).flatten(-2)
    torch.testing.assert_close(out, module.proj(expected))
    views, others = PatchGrid.packed([(3, 5), (3, 5)]), PatchGrid.packed([(4, 2), (4, 2)])
    packed = module(x.flatten(0, 1), context.flatten(0, 1), views, others)
    torch.testing.assert_close(packed, out.flatten(0, 1))
    ones = torch.full((2,), 15, dtype=torch.int32)
    torch.testing.assert_close(module(x, context, view, other, seqlens=ones), out)
    message = r"context_grid packs 2 images: context must be packed \(T, C\), got shape \(2, 8, 32\)"
    with pytest.raises(ValueError, match=message):
        module(x, context, view, others)
    with pytest.raises(ValueError, match="context_grid is None"):
        module(x, context, view)
    with pytest.raises(ValueError, match=r"x and context must be \(B, N, C\)"):
        module(x, context[0], view, other)
    with pytest.raises(ValueError, match="needs cu_seqlens and cu_seqlens_k"):
        module(x[0], context[0], torch.zeros(15, 2), torch.zeros(8, 2))
    assert sum(p.numel() for p in RoPE2DAttention(48, 3).parameters()) == 48 * 48 * 4 + 48 * 4


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross = RoPE2DCrossAttention(48, 3, context_dim=32)

    def forward(self, x: Tensor, context: Tensor, view: Tensor, other: Tensor) -> Tensor:
        return self.cross(x, context, view, other)


def test_the_module_is_a_leaf_of_a_symbolic_trace():
    decoder = Decoder()
    args = torch.randn(2, 15, 48), torch.randn(2, 8, 32), torch.rand(15, 2), torch.rand(8, 2)
    graph = torch.fx.symbolic_trace(decoder)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 1
    torch.testing.assert_close(graph(*args), decoder(*args))


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope_attention(Q, K, K, OF_Q), "rotary is for the 6 tokens of q, and k has 9: pass rotary_k"),
        (lambda: rope_attention(Q, K, K, rotary_k=OF_K), "rotary_k is given, but rotary is None"),
        (lambda: rope_attention(Q, K, K, OF_Q, rotary_k=OF_Q), "rotary_k has 6 tokens, k has 9"),
        (
            lambda: rope_attention(Q, K, K, OF_Q, rotary_k=Rotary.identity(9, 8)),
            r"rotary_k must rotate the pairs of rotary, 16 channels \(half\), got 8",
        ),
        (lambda: rope_attention(Q, K, K, cu_seqlens_k=BOUNDS), "cu_seqlens_k needs cu_seqlens"),
        (lambda: rope_attention(Q[0], K[0], K[0], cu_seqlens=BOUNDS), "pass cu_seqlens_k, the starts of the keys"),
        (
            lambda: rope_attention(Q[0], K[0], K[0], cu_seqlens=BOUNDS, cu_seqlens_k=BOUNDS[:2] * 0),
            "cu_seqlens_k must have as many sequences as cu_seqlens, 2, got 1",
        ),
        (
            lambda: rope_attention(Q[0], K[0], K[0], cu_seqlens=BOUNDS, cu_seqlens_k=BOUNDS),
            "cu_seqlens_k must end at the number of tokens, 9, got 6",
        ),
        (
            lambda: rope_attention(Q, K, K, seqlens_k=torch.tensor([10], dtype=torch.int32)),
            "seqlens_k must lie between 0 and the 9 tokens of k, got 10",
        ),
        (lambda: rope_attention(Q, K, K, max_seqlen_k=9), "max_seqlen_k is the length of the longest packed sequence"),
        (
            lambda: rope_attention(Q, K.expand(2, -1, -1, -1), K.expand(2, -1, -1, -1)),
            "q and k must have the same batch",
        ),
        (lambda: apply_rotary_qk(Q, K, OF_Q), "rotary has 6 tokens, k has 9"),
        (lambda: apply_rotary_qk(Q, K, OF_Q, OF_Q), "rotary_k has 6 tokens, k has 9"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
