# SPDX-License-Identifier: Apache-2.0
"""The op inside torch: schema, fake tensors, compilation, autocast, checkpointing, autograd."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from oracles import Case, exact, make, run, threads
from rows import some_pairs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from spatial_pe import Rotary, rope_attention
from spatial_pe._utils.dispatcher import assume_constant
from spatial_pe.backends import cpu
from spatial_pe.backends.triton import backend as triton

BACKENDS = [
    "reference",
    *([] if cpu.unavailable() else ["cpu"]),
    *([] if triton.unavailable() or not triton.INTERPRETED else ["triton"]),
]
CASES = {
    "dense": Case(batch=2, tokens=20, dim=24, kv_heads=1),
    "packed": Case(lengths=(0, 7, 1, 12), dim=24, pairing="interleaved", table="head"),
    "padded": Case(batch=3, tokens=10, seqlens=(10, 0, 3), dim=24, rotary_dim=16, table="sample"),
    "plain": Case(batch=2, tokens=20, dim=24, rotary_dim=0, scale=0.3),
    "view": Case(batch=2, tokens=20, dim=24, layout="fused"),
}
OP = torch.ops.spatial_pe.rope_attention
BACKWARD = torch.ops.spatial_pe.rope_attention_backward


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threads(1):
        yield


def arguments(case: Case, backend: str, tables_want_grad: bool = True) -> tuple:
    """Of the op, as leaves."""
    inputs = make(case)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    if case.seqlens:  # opcheck compares bit by bit, and NaN is not equal to itself
        q, k, v = (x.nan_to_num() for x in (q, k, v))
    if case.lengths:
        q, k, v = q[None], k[None], v[None]
    rotary = inputs.rotary()
    tables = (None, None) if rotary is None else (rotary.cos.detach(), rotary.sin.detach())
    for table in tables:
        if table is not None:
            table.requires_grad_(tables_want_grad)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return q, k, v, *tables, case.pairing, inputs.scale, inputs.cu_seqlens, None, inputs.seqlens, backend


@pytest.mark.parametrize(("name", "backend"), some_pairs(CASES, BACKENDS))
@pytest.mark.parametrize("tables_want_grad", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_opcheck(name, backend, tables_want_grad):
    """Schema, autograd registration, fake tensors, and compiled gradients with static and dynamic shapes."""
    args = arguments(CASES[name], backend, tables_want_grad)
    done = torch.library.opcheck(OP, args)
    assert set(done.values()) == {"SUCCESS"} and len(done) >= 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_opcheck_backward(name, backend):
    args = arguments(CASES[name], backend)
    out, lse = (x.detach() for x in OP(*args))
    args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    dout = torch.randn_like(out)
    # its own autograd raises: what compiles is the forward op, tested above
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    done = torch.library.opcheck(BACKWARD, (dout, out, lse, *args), test_utils=tests)
    assert set(done.values()) == {"SUCCESS"}


# -------------------------------------------------------------------------------------------------- without values


@pytest.mark.parametrize("backend", ["auto", "reference", "composed"])
@pytest.mark.parametrize("name", ["dense", "view", "plain"])
def test_fake_and_meta_tensors(name, backend):
    """Shape, dtype, device and strides are those of the real call; no kernel could run."""
    inputs = make(CASES[name])
    real = inputs.call(backend)
    leaves = [x.detach() for x in inputs.leaves.values()]
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    fake, meta = [mode.from_tensor(x) for x in leaves], [x.to("meta") for x in leaves]
    with mode:
        out = rope_attention(*fake[:3], *map(Rotary.from_angles, fake[3:]), scale=0.3, backend=backend)
    assert out.device.type == "cpu"
    for got in (out, rope_attention(*meta[:3], *map(Rotary.from_angles, meta[3:]), backend=backend)):
        assert (got.shape, got.dtype, got.stride()) == (real.shape, real.dtype, real.stride())


# ----------------------------------------------------------------------------------------------------- torch.compile


def compiled_equals_eager(case: Case, compiler: str, backend: str = "auto", dynamic: bool = False) -> None:
    def attention(q, k, v, angles, cu_seqlens, seqlens):
        rotary = None if angles is None else Rotary.from_angles(angles, case.pairing)
        out = rope_attention(
            q * 1.5, k, v, rotary, scale=case.scale, cu_seqlens=cu_seqlens, seqlens=seqlens, backend=backend
        )
        return out.sin()  # something before and after, so that the op is inside a graph

    inputs = make(case)
    leaves = list(inputs.leaves.values())
    args = (inputs.q, inputs.k, inputs.v, inputs.angles, inputs.cu_seqlens, inputs.seqlens)
    torch._dynamo.reset()
    fast = torch.compile(attention, fullgraph=True, backend=compiler, dynamic=dynamic)
    out, expected = fast(*args), attention(*args)
    torch.testing.assert_close(out, expected)
    got, grads = (torch.autograd.grad(x, leaves, inputs.dout.nan_to_num()) for x in (out, expected))
    for name, a, b in zip(inputs.leaves, got, grads, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_graph_break(name, backend):
    """fullgraph=True raises on a graph break; choosing the backend must not be one."""
    compiled_equals_eager(CASES[name], "aot_eager", backend)


def test_compiles_for_dynamic_shapes():
    compiled_equals_eager(CASES["dense"], "aot_eager", dynamic=True)


def test_compiled_once_for_several_lengths():
    """Marked dynamic, the number of tokens does not recompile."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    attention = torch.compile(lambda q, angles: rope_attention(q, q, q, Rotary.from_angles(angles)),
                              backend=counter, fullgraph=True, dynamic=True)  # fmt: skip
    for tokens in (20, 33, 57):
        q, angles = torch.randn(1, tokens, 2, 24), torch.randn(tokens, 12)
        torch.testing.assert_close(attention(q, angles), rope_attention(q, q, q, Rotary.from_angles(angles)))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor():
    compiled_equals_eager(CASES["dense"], "inductor")


# ----------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("backend", ["auto", *BACKENDS, "composed"])
def test_autocast(backend):
    """float32 in, computed and returned in bfloat16; gradients arrive in float32. float64 is left alone."""
    inputs = make(Case(batch=2, tokens=40, dim=32))
    q, k, v = (x.detach().bfloat16() for x in (inputs.q, inputs.k, inputs.v))
    expected = rope_attention(q, k, v, inputs.rotary(), backend=backend)
    assert inputs.call(backend).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = inputs.call(backend)
        double = rope_attention(*(x.detach().double() for x in (inputs.q, inputs.k, inputs.v)), inputs.rotary())
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert double.dtype == torch.float64
    grads = torch.autograd.grad(out, list(inputs.leaves.values()), inputs.dout.bfloat16())
    truth = exact(inputs)
    for (name, leaf), grad in zip(inputs.leaves.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype == torch.float32
        assert (grad.double() - truth.values[name]).norm() < 0.02 * truth.values[name].norm()


# ----------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(backend, reentrant):
    inputs = make(Case(batch=2, tokens=40, dim=32))
    expected = run(inputs, backend)

    def block(q, k, v, angles):
        return rope_attention(q, k, v, Rotary.from_angles(angles), backend=backend)

    out = checkpoint(block, inputs.q, inputs.k, inputs.v, inputs.angles, use_reentrant=reentrant)
    out.backward(inputs.dout)
    assert all(torch.equal(leaf.grad, expected[name]) for name, leaf in inputs.leaves.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_raises(backend):
    inputs = make(Case(tokens=10, dim=32))
    (dq,) = torch.autograd.grad(inputs.call(backend), inputs.q, inputs.dout, create_graph=True)
    with pytest.raises(RuntimeError, match=r'^spatial_pe.rope_attention has no double backward: .*backend="composed"'):
        dq.sum().backward()


def test_double_backward_of_composed():
    """Where torch's attention has one: not its flash kernel, which it prefers."""
    inputs = make(Case(tokens=6, heads=1, dim=8, dtype=torch.float64))

    def attention(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return rope_attention(q, k, v, inputs.rotary(), backend="composed").square()

    assert torch.autograd.gradgradcheck(attention, (inputs.q, inputs.k, inputs.v))


def test_gradient_of_the_angles_by_finite_differences():
    """Through cos and sin, in float64: for a table of one's own, a frequency per pair, and cos and sin apart."""
    inputs = make(Case(batch=2, tokens=5, dim=8, dtype=torch.float64, table="both", pairing="axis_half"))

    def of_angles(angles):
        return rope_attention(
            inputs.q, inputs.k, inputs.v, Rotary.from_angles(angles, "axis_half"), backend="reference"
        )

    assert torch.autograd.gradcheck(of_angles, inputs.angles)
    positions = torch.arange(5.0, dtype=torch.float64)[:, None]
    assert torch.autograd.gradcheck(lambda f: of_angles((positions * f)[None, :, None]),
                                    torch.rand(4, dtype=torch.float64, requires_grad=True))  # fmt: skip


def test_gradients_of_cos_and_sin_are_along_the_circle():
    """dcos = -sin dφ and dsin = cos dφ, as documented, so that cos dcos + sin dsin = 0."""
    inputs = make(Case(tokens=20, dim=24))
    cos, sin = (f(inputs.angles).detach().requires_grad_() for f in (torch.cos, torch.sin))
    out = rope_attention(inputs.q, inputs.k, inputs.v, Rotary(cos, sin), backend="reference")
    dcos, dsin = torch.autograd.grad(out, (cos, sin), inputs.dout)
    dphi = run(inputs, "reference")["angles"]
    torch.testing.assert_close(dcos, -sin * dphi)
    torch.testing.assert_close(dsin, cos * dphi)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend):
    """A table that wants no gradient gets none, q alone can want one, and no_grad records nothing."""
    inputs = make(Case(tokens=20, dim=24))
    expected = run(inputs, backend)
    q, k, v, rotary = inputs.q, inputs.k.detach(), inputs.v.detach(), Rotary.from_angles(inputs.angles.detach())
    rope_attention(q, k, v, rotary, backend=backend).backward(inputs.dout)
    assert torch.equal(q.grad, expected["q"])
    assert k.grad is v.grad is rotary.cos.grad is None
    out = rope_attention(q.detach(), k, v, inputs.rotary(), backend=backend)
    (dangles,) = torch.autograd.grad(out, inputs.angles, inputs.dout)
    torch.testing.assert_close(dangles, expected["angles"])
    with torch.no_grad():
        assert not inputs.call(backend).requires_grad


# --------------------------------------------------------------------------------------------------------- the rest


def test_deepcopy_and_pickle_of_rotary(tmp_path):
    """A module that keeps a Rotary is copied (EMA, swa_utils) and saved."""
    rotary = Rotary.from_angles(torch.randn(3, 8, 2, 6), "interleaved")
    torch.save(rotary, tmp_path / "rotary.pt")
    for other in (copy.deepcopy(rotary), torch.load(tmp_path / "rotary.pt", weights_only=False)):
        assert other.pairing == "interleaved"
        assert torch.equal(other.cos, rotary.cos) and torch.equal(other.sin, rotary.sin)
        assert other.cos.data_ptr() != rotary.cos.data_ptr()
        other.cos.zero_()
        assert rotary.cos.abs().sum() > 0


def test_scale_default_is_that_of_the_head_dim():
    inputs = make(Case(tokens=20, dim=24, scale=None))
    explicit = rope_attention(inputs.q, inputs.k, inputs.v, inputs.rotary(), scale=1 / math.sqrt(24))
    assert torch.equal(inputs.call("auto"), explicit)
    assert not torch.equal(
        inputs.call("auto"), rope_attention(inputs.q, inputs.k, inputs.v, inputs.rotary(), scale=0.2)
    )


def test_max_seqlen_changes_no_result():
    inputs = make(CASES["packed"])
    for backend in ["auto", *BACKENDS, "composed"]:
        got = rope_attention(inputs.q, inputs.k, inputs.v, inputs.rotary(), cu_seqlens=inputs.cu_seqlens,
                             max_seqlen=12, backend=backend)  # fmt: skip
        assert torch.equal(got, inputs.call(backend))


def test_import_leaves_dynamo_to_those_who_compile():
    """It takes as long as torch itself."""
    code = "import sys, spatial_pe; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_constants_are_what_torch_takes_for_constants():
    def ours(): ...
    def theirs(): ...

    assert assume_constant(ours).__dict__ == torch.compiler.assume_constant_result(theirs).__dict__ != {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", ["shared", "head", "both"])
@pytest.mark.parametrize("batch", [1, 2])
def test_fake_kernels_have_the_strides_of_the_real_ones(backend, table, batch):
    """Compilers lay out memory by what the fake kernels say: of views in (B, H, N, D) order too, with one sample."""
    inputs = make(Case(batch=batch, tokens=20, dim=24, layout="heads_first", table=table))
    args = (*(x.detach() for x in (inputs.q, inputs.k, inputs.v)), *arguments(inputs.case, backend)[3:5])
    args = (*(x.detach() for x in args), inputs.case.pairing, inputs.scale, None, None, None, backend)
    mode = FakeTensorMode()

    def faked(*args):
        return [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]

    def check(op, *args):
        real = op(*args)
        with mode:
            fake = op(*faked(*args))
        for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (real, fake)), strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        return real

    out, lse = check(OP, *args)
    dq, dk, _ = check(BACKWARD, torch.randn_like(out), out, lse, *args)
    q, k, _, cos, _, pairing, *_ = args
    check(torch.ops.spatial_pe.angle_gradient, q, k, dq, dk, cos, pairing, None, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_off_the_unit_circle_get_no_wrong_gradient(backend):
    """They are refused: the gradient that the kernels have is that of an angle."""
    inputs = make(Case(tokens=20, dim=24))
    cos, sin = ((1.5 * f(inputs.angles)).detach().requires_grad_() for f in (torch.cos, torch.sin))
    out = rope_attention(inputs.q, inputs.k, inputs.v, Rotary(cos, sin), backend=backend)
    with pytest.raises(ValueError, match=r"^spatial_pe: cos² \+ sin² is 2.25 in a table that requires a gradient"):
        out.backward(inputs.dout)
    q, k, v, tables = inputs.q.detach(), inputs.k.detach(), inputs.v.detach(), Rotary(cos, sin)
    composed = rope_attention(q, k, v, tables, backend="composed")
    dcos, dsin = torch.autograd.grad(composed, (cos, sin), inputs.dout)  # by autograd, with the part of the magnitude
    assert (cos * dcos + sin * dsin).abs().max() > 1e-3


def test_tables_off_the_unit_circle_in_a_graph():
    """Nobody can look at them there: their gradient is NaN."""
    inputs = make(Case(tokens=20, dim=24))
    cos, sin = ((1.5 * f(inputs.angles)).detach() for f in (torch.cos, torch.sin))

    def gradient(cos, sin):
        cos, sin = cos.requires_grad_(), sin.requires_grad_()
        return torch.autograd.grad(rope_attention(q, q, q, Rotary(cos, sin)).sum(), (cos, sin))

    q = inputs.q.detach()
    graph = torch.fx.experimental.proxy_tensor.make_fx(gradient)(cos, sin)
    assert all(x.isnan().all() for x in graph(cos, sin))
    assert all(x.isfinite().all() for x in graph(cos / 1.5, sin / 1.5))


def test_autocast_with_norms_in_front():
    """Under autocast a norm returns float32, and a projection bfloat16: they are cast before they are compared."""
    inputs = make(Case(batch=2, tokens=20, dim=24))
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    with torch.autocast("cpu", torch.bfloat16):
        out = rope_attention(q, k, v.bfloat16(), inputs.rotary())
        assert torch.equal(out, rope_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), inputs.rotary()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({1: lambda k: k[:, :-1]}, "k and v must have the same shape"),
        ({1: lambda k: k[:, :-1], 2: lambda v: v[:, :-1]}, "q and k must have the same batch and tokens"),
        ({2: lambda v: v.double()}, "must share a dtype"),
        ({0: lambda q: q.mT.contiguous().mT}, "contiguous in its last dimension"),
        ({3: lambda cos: cos[:, :-1], 4: lambda sin: sin[:, :-1]}, "rotary has 19 tokens, q has 20"),
        ({4: lambda sin: sin[..., :-1]}, "cos has shape .*, sin .*: they must be equal"),
        ({9: lambda _: torch.tensor([20, 20, 20], dtype=torch.int32)}, "seqlens must have an entry for each of the 2"),
        ({9: lambda _: torch.tensor([20, 21], dtype=torch.int32)}, "seqlens must lie between 0 and the 20 tokens"),
        ({9: lambda _: torch.tensor([20, 20])}, "seqlens must be int32"),
    ],
)
def test_the_op_checks_what_could_crash(backend, change, match):
    """A traced graph calls it with tensors that rope_attention has not seen."""
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(CASES["dense"], backend)]
    args = [change[i](x) if i in change else x for i, x in enumerate(args)]
    with pytest.raises((TypeError, ValueError), match=match):
        OP(*args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["dout", "out", "lse"])
def test_the_backward_op_checks_what_could_crash(backend, which):
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments(CASES["dense"], backend)]
    out, lse = OP(*args)
    given = {"dout": torch.randn_like(out), "out": out, "lse": lse}
    given[which] = given[which][:, :-1]
    with pytest.raises(ValueError, match=f"{which} must be"):
        BACKWARD(*given.values(), *args)


def test_patch_and_calls_under_a_default_device():
    """It says where new tensors are made; those that are given stay where they are."""
    inputs = make(CASES["packed"])
    expected = run(inputs, "auto")
    with torch.device("meta"):
        got = run(inputs, "auto")
    assert all(torch.equal(got[name], x) for name, x in expected.items())
