# SPDX-License-Identifier: Apache-2.0
"""Right or refused: every public function and patched tower under every tracer, transform and export of torch.

A cell is right, or it is in ``REFUSED`` and raises an error that names spatial_pe and the way out; docs/transforms.md
lists those. A tower may also raise where it does before it is patched. A wrong number fails, wherever it is met.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import functions
import pytest
import torch
from functions import FUNCTIONS, TOWERS, Function, constant_table, qkv, randn
from torch.autograd import forward_ad
from transforms import TRANSFORMS, Seen, Wrapped, WrongNumberError, others

import spatial_pe
from spatial_pe import Rotary, rope_attention
from spatial_pe._utils import dispatcher
from spatial_pe.backends import cpu

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

OF_MODULES = {"functional_call", "parameter_gradients", "deepcopy", "pickled"}
EXPORTS_TO_ONNX = {"onnx_dynamo", "onnx_opset_23", "onnx_torchscript"}
# Minutes all together, and the same machinery as a faster column.
SLOW = {
    "aot_inductor",
    "compiled_transforms",
    "export_run_decompositions",
    "compiled_inductor",
    "compiled_dynamic",
    "export_strict",
    "export_saved",
    "pickled",
}
# Of the towers that repeat another one, and of the encodings, these columns are enough in `make test`.
FEW = {
    "jit_trace",
    "export",
    "onnx_dynamo",
    "compiled",
    "vmap_of_grad",
    "jvp",
    "inference_mode",
    "checkpoint_reentrant",
}
REPEATS = {
    "tower",
    "tower, own RoPE",
    "tower, padded",
    "tower, mixed added",
    "tower, padded, axial added",
    "RoPE2DAttention, packed",
    "apply_rotary",
    "rope_attention, other tokens, packed",
    "rope_attention, other tokens, padded",
}
# Single cells of the others whose column is slow, and has another row that calls the op, or rotates, as they do.
REPEATED_CELLS = {
    "onnx_opset_23": {
        "rope_attention, no rotary",
        "RoPE2DAttention, axial",
        "RoPE2DAttention, mixed",
        "AxialRoPE",
        "MixedRoPE",
    },
    "linearize": {"tower, packed", "RoPE2DAttention, axial"},
    "export_decomposed": {"tower, packed", "RoPE2DAttention, axial"},
    "make_fx_decomposed": {"tower, packed", "RoPE2DAttention, axial"},
}

# What the fused op refuses, wherever it is used.
NO_DOUBLE_BACKWARD = r'spatial_pe.rope_attention has no double backward: use backend="composed"'
REFUSED = {"create_graph": NO_DOUBLE_BACKWARD}
# These do not call the op, or differentiate nothing.
NOT_THE_OP = {"apply_rotary", "apply_rotary_qk", "AxialRoPE", "MixedRoPE"}


def cells():
    for name in FUNCTIONS:
        for transform in TRANSFORMS:
            if transform in OF_MODULES and name.startswith(("rope_attention", "apply_rotary")):
                continue
            yield pytest.param(name, transform, marks=[pytest.mark.slow] if is_slow(name, transform) else [])


def is_slow(name: str, transform: str) -> bool:
    return (
        transform in SLOW
        or (name in REPEATS and transform not in FEW)
        or (name in REPEATS & TOWERS.keys() and transform == "compiled")
        or name in REPEATED_CELLS.get(transform, ())
        or (name in TOWERS and transform in EXPORTS_TO_ONNX and name != "tower, axial added")
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch):
    """dynamo remembers sizes that it once took for dynamic, in its cache and on the tensors themselves, those of our
    module's tables too: a strict export then has guards of them that it cannot evaluate (torch 2.13)."""
    torch.compiler.reset()
    monkeypatch.setattr(functions, "ANGLES", functions.ANGLES.clone())


@pytest.mark.parametrize(("name", "transform"), list(cells()))
def test_right_or_refused(name, transform):
    if transform in EXPORTS_TO_ONNX:
        pytest.importorskip("onnxscript")
    f = FUNCTIONS[name]()
    apply = TRANSFORMS[transform]
    if transform in REFUSED and name not in NOT_THE_OP:
        with pytest.raises(Exception, match=REFUSED[transform]):
            apply(f)
        return
    try:
        apply(f)
    except WrongNumberError:
        raise
    except Exception:
        if f.own is None:
            raise
        with pytest.raises(Exception) as raised:  # it could not be done before either
            apply(Function(f.own, f.args, f.own))
        assert not isinstance(raised.value, WrongNumberError)


def test_what_is_refused_is_in_the_docs():
    text = (Path(__file__).parents[3] / "docs" / "transforms.md").read_text(encoding="utf-8")
    assert all(f"`{transform}`" in text for transform in TRANSFORMS)
    refused = text.split("## Refused")[1]
    assert all(f"`{transform}`" in refused for transform in REFUSED)


# ---------------------------------------------------------------------------------------------------------- who listens

# A name that is not here came with a newer torch: it wants a column in transforms.py, and a line in docs/transforms.md
# if it is refused.
KNOWN = {
    "function transforms": (
        torch._C._functorch.TransformType.__members__,
        {"Torch", "Vmap", "Grad", "Jvp", "Functionalize"},
    ),
    "dispatch modes of torch": (
        torch._C._TorchDispatchModeKey.__members__,
        {"FAKE", "PROXY", "FUNCTIONAL"},
    ),
    "torch.func": (
        torch.func.__all__,
        {
            "grad", "grad_and_value", "vmap", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "functionalize", "linearize",
            "functional_call", "rearrange", "stack_module_state", "replace_all_batch_norm_modules_", "debug_unwrap",
        },
    ),
    "torch.autograd.forward_ad": (
        torch.autograd.forward_ad.__all__,
        {"UnpackedDualTensor", "enter_dual_level", "exit_dual_level", "make_dual", "unpack_dual", "dual_level"},
    ),
    "questions to torch.compiler": (
        [name for name in dir(torch.compiler) if name.startswith("is_")],
        {"is_compiling", "is_dynamo_compiling", "is_exporting"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN)
def test_torch_has_no_listener_that_nobody_knows(kind):
    found, known = KNOWN[kind]
    assert set(found) <= known


def _inside_jit_trace(ask):
    torch.jit.trace(lambda x: (ask(), x + 1)[1], torch.zeros(2), check_trace=False)


def _inside_dual_level(ask):
    with forward_ad.dual_level():
        ask()


def _inside_dispatch_mode(ask):
    with Seen():
        ask()


def _inside_default_device(ask):
    with torch.device("meta"):
        ask()


def _inside_unknown_key(ask):
    """As a listener of a future torch would announce itself: by a key of the thread. None is asked for by its name."""
    with torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.PreDispatch):
        ask()


LISTENERS = {
    "jit.trace": _inside_jit_trace,
    "dual level": _inside_dual_level,
    "dispatch mode": _inside_dispatch_mode,
    "default device": _inside_default_device,
    "grad": lambda ask: torch.func.grad(lambda x: (ask(), x.sum())[1])(torch.zeros(2)),
    "vmap": lambda ask: torch.vmap(lambda x: (ask(), x)[1])(torch.zeros(2)),
    "functionalize": lambda ask: torch.func.functionalize(lambda x: (ask(), x)[1])(torch.zeros(2)),
    "unknown": _inside_unknown_key,
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_a_listener_is_noticed(listener):
    """By a thread that has only plain tensors, some of which it may have from outside."""
    answers = []
    x = torch.zeros(2)
    LISTENERS[listener](lambda: answers.append(dispatcher.needs_dispatcher((x,))))
    assert answers == [True]
    assert not dispatcher.needs_dispatcher((x,))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode,
                                     lambda: torch.autocast("cpu", torch.bfloat16)])  # fmt: skip
def test_nobody_pays_where_nobody_listens(context):
    with context():
        x, parameter = torch.zeros(2), torch.nn.Parameter(torch.zeros(2))
        assert not dispatcher.needs_dispatcher((x, x[1:], parameter, x.bfloat16()))
    assert not dispatcher.needs_dispatcher((x,))


def test_special_tensors_are_noticed():
    fake = torch._subclasses.FakeTensorMode().from_tensor(torch.zeros(2))
    special = [fake, torch.zeros(2, device="meta"), torch._neg_view(torch.zeros(2)), torch._efficientzerotensor((2,))]
    assert all(dispatcher.needs_dispatcher((torch.zeros(2), x)) for x in special)


# ----------------------------------------------------------------------------------------- calls that are not as traced


def test_a_traced_graph_refuses_tensors_of_another_size():
    """The tables in it are of the size that was traced: a kernel would read past them."""
    q, k, v = qkv(1, 12)
    for graph in (
        torch.jit.trace(lambda q, k, v: rope_attention(q, k, v, constant_table(q)), (q, k, v)),
        torch.fx.experimental.proxy_tensor.make_fx(lambda q, k, v: rope_attention(q, k, v, constant_table(q)))(q, k, v),
    ):
        with pytest.raises(Exception, match="rotary has 12 tokens, q has 13: did you forget prefix=1"):
            graph(*qkv(1, 13))


@pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled extension")
def test_the_op_itself_refuses_what_does_not_fit():
    q, k, v = qkv(1, 12)
    table = randn(1, 11, 1, 8)
    with pytest.raises(ValueError, match="rotary has 11 tokens"):
        torch.ops.spatial_pe.rope_attention(q, k, v, table, table, "half", 1.0, None, None, None, "cpu")


@pytest.mark.parametrize("grid", [(2, 8), (8, 2)])
def test_a_traced_tower_is_nan_for_another_grid_of_as_many_patches(grid):
    """jit.trace holds the coordinates of the grid that it saw, and no check of sizes."""
    f = FUNCTIONS["tower, axial added"]()
    traced = torch.jit.trace(Wrapped(f).eval(), f.args, check_trace=False)
    height, width = f.args[0].shape[-2:]
    patch = f.module.model.embeddings.patch_size if hasattr(f.module.model, "embeddings") else 8
    assert height * width // patch**2 == 16
    assert traced(*others(f)).isfinite().all()
    out = traced(randn(2, 3, grid[0] * patch, grid[1] * patch))
    assert out.isnan().any()


@pytest.mark.parametrize(
    ("cu_seqlens", "bad"),
    [((0, 5, 9), slice(9, 12)), ((0, 5, 15), None), ((2, 5, 12), slice(0, 2))],
)
def test_packed_lengths_that_nobody_could_read(cu_seqlens, bad):
    """In a graph of plain operators the tokens of no sequence are NaN; eagerly such lengths raise."""
    q, k, v = qkv(12)

    def call(q, k, v, cu_seqlens):
        return rope_attention(q, k, v, cu_seqlens=cu_seqlens, backend="composed")

    right = torch.tensor([0, 5, 12], dtype=torch.int32)
    wrong = torch.tensor(cu_seqlens, dtype=torch.int32)
    graph = torch.jit.trace(call, (q, k, v, right), check_trace=False)
    torch.testing.assert_close(graph(q, k, v, right), call(q, k, v, right))
    out = graph(q, k, v, wrong)
    expected = torch.zeros(12, dtype=torch.bool)
    if bad is not None:
        expected[bad] = True
    assert torch.equal(out.isnan().all(-1).all(-1), expected)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        call(q, k, v, wrong)


@pytest.mark.parametrize("backend", ["auto", "composed", "reference"])
def test_max_seqlen_is_an_upper_bound(backend):
    q, k, v = qkv(12)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    rope_attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=7, backend=backend)
    with pytest.raises(ValueError, match=r"max_seqlen must be at least .*, got 6: sequence 1 has 7 tokens"):
        rope_attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=6, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_backend_that_was_asked_for_refuses_forward_mode(backend):
    q, k, v = qkv(1, 12)
    if backend == "cpu" and cpu.unavailable() is not None:
        pytest.skip("needs the compiled extension")
    with pytest.raises(ValueError, match=rf'^spatial_pe: backend="{backend}" does not compute forward-mode.*composed"'):
        torch.func.jvp(lambda q: rope_attention(q, k, v, backend=backend), (q,), (q,))


def test_tracing_warns_of_nothing_of_ours():
    q, k, v = qkv(2, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(lambda q, k, v: rope_attention(q, k, v, constant_table(q)), (q, k, v))


def test_jit_trace_of_tables_that_are_learned():
    """The traced graph holds the parameters, not what they were."""
    f = FUNCTIONS["RoPE2DAttention, mixed"]()
    wrapped = Wrapped(f).eval()
    traced = torch.jit.trace(wrapped, f.args, check_trace=False)
    with torch.no_grad():
        traced.inner.rope.frequencies.mul_(0.5)
    torch.testing.assert_close(traced(*f.args), f.call(*f.args))


def test_decompositions_are_those_of_every_op():
    ops = {name for name in dir(torch.ops.spatial_pe) if not name.startswith("_") and name != "name"}
    listed = {op._schema.name.split("::")[1] for op in spatial_pe.decompositions()}
    assert (
        listed == {"rope_attention", "rope_attention_backward", "angle_gradient", "rotate", "rotate_"} >= ops - listed
    )
    assert all(op in torch._decomp.decomposition_table for op in spatial_pe.decompositions())


def test_rotary_in_a_symbolic_trace():
    angles = randn(12, 8)
    graph = torch.fx.symbolic_trace(lambda q, a: rope_attention(q, q, q, Rotary.from_angles(a)))
    q = qkv(1, 12)[0]
    torch.testing.assert_close(graph(q, angles), rope_attention(q, q, q, Rotary.from_angles(angles)))
