# SPDX-License-Identifier: Apache-2.0
"""The columns of the table: each takes a Function, does something to it, and compares with what it returns eagerly.

What is compared: outputs, or gradients of ``loss``, a fixed projection of the output. Eager outputs and gradients are
themselves held to float64 by the tests of the op and of the towers.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from functions import Function, randn
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import spatial_pe

# Float32 rounding, of a few layers where there is a tower.
TOLERANCE = 2e-5


class WrongNumberError(AssertionError):
    """A number that is not right: nothing excuses it."""


def close(got: Tensor | Iterable[Tensor], expected: Tensor | Iterable[Tensor], tolerance: float = TOLERANCE) -> None:
    """Equal to a rounding, each relative to the norm of what is expected."""
    if isinstance(got, Tensor):
        got, expected = [got], [expected]  # type: ignore[list-item]
    for x, y in zip(got, expected, strict=True):
        if x.shape != y.shape or not x.isfinite().all():
            raise WrongNumberError(
                f"{tuple(x.shape)} for {tuple(y.shape)}, {int((~x.isfinite()).sum())} of it NaN or Inf"
            )
        distance, norm = (float(z.detach().double().norm()) for z in (x - y, y))
        if not distance <= tolerance * norm + 1e-7:
            raise WrongNumberError(f"off by {distance}, of {norm}")


def leaves(f: Function) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in f.args)


def others(f: Function) -> tuple[Tensor, ...]:
    """Other values: a traced graph that holds what it saw would not notice the first ones."""
    return tuple(0.5 * x + 0.1 for x in f.args)


def weights(out: Tensor) -> Tensor:
    """As good as random, and no random operator to record."""
    return torch.arange(out.numel(), device=out.device).mul(1.7).sin().view(out.shape)


def loss(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def projected(*args: Tensor) -> Tensor:
        out = call(*args)
        return (out * weights(out)).sum()

    return projected


def gradients(call: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    args = tuple(x.detach().clone().requires_grad_() for x in args)
    return torch.autograd.grad(loss(call)(*args), args)


def argnums(f: Function) -> tuple[int, ...]:
    return tuple(range(len(f.args)))


class Wrapped(nn.Module):
    """A function as a module, for tracers, which see parameters only of the module that they trace."""

    def __init__(self, f: Function) -> None:
        super().__init__()
        self.call, self.inner = f.call, f.module

    def forward(self, *args: Tensor) -> Tensor:
        return self.call(*args)


# --------------------------------------------------------------------------------------------------- autograd modes


def no_grad(f: Function) -> None:
    with torch.no_grad():
        out = f.call(*f.args)
    close(out, f.call(*leaves(f)))


def inference_mode(f: Function) -> None:
    with torch.inference_mode():
        out = f.call(*(x.clone() for x in f.args))
    close(out.clone(), f.call(*leaves(f)))


def anomaly_detection(f: Function) -> None:
    with torch.autograd.detect_anomaly(check_nan=False):
        got = gradients(f.call, f.args)
    close(got, gradients(f.call, f.args))


def autocast(f: Function) -> None:
    """In bfloat16, near what it is in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        out = f.call(*f.args)
    close(out.float(), f.call(*f.args), 0.05)


# ----------------------------------------------------------------------------------------------------------- tracers


def jit_trace(f: Function) -> None:
    traced = torch.jit.trace(Wrapped(f).eval(), f.args, check_trace=False)
    close(traced(*others(f)), f.call(*others(f)))


def jit_trace_with_gradients(f: Function) -> None:
    traced = torch.jit.trace(Wrapped(f).eval(), leaves(f), check_trace=False)
    close(gradients(traced, others(f)), gradients(f.call, others(f)))


def jit_trace_saved(f: Function) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Wrapped(f).eval(), f.args, check_trace=False), buffer)
    buffer.seek(0)
    close(torch.jit.load(buffer)(*others(f)), f.call(*others(f)))


def fx_symbolic_trace(f: Function) -> None:
    names = ", ".join("abcde"[: len(f.args)])  # torch.fx looks at the signature
    named = type("Named", (Wrapped,), {"forward": eval(f"lambda self, {names}: self.call({names})")})
    graph = torch.fx.symbolic_trace(named(f).eval())
    close(graph(*others(f)), f.call(*others(f)))


def _made(f: Function, call: Callable, **options) -> Callable:
    # parameters come in as constants, as torch says
    return make_fx(call, _allow_non_fake_inputs=True, **options)(*f.args)


def make_fx_real(f: Function) -> None:
    close(_made(f, f.call)(*others(f)), f.call(*others(f)))


def make_fx_fake(f: Function) -> None:
    close(_made(f, f.call, tracing_mode="fake")(*others(f)), f.call(*others(f)))


def make_fx_symbolic(f: Function) -> None:
    close(_made(f, f.call, tracing_mode="symbolic")(*others(f)), f.call(*others(f)))


def make_fx_of_gradients(f: Function) -> None:
    graph = _made(f, lambda *args: gradients(f.call, args))
    close(graph(*others(f)), gradients(f.call, others(f)))


def make_fx_decomposed(f: Function) -> None:
    """Forward and backward as plain operators."""
    graph = _made(f, lambda *args: gradients(f.call, args), decomposition_table=spatial_pe.decompositions())
    assert "ops.spatial_pe" not in graph.code
    close(graph(*others(f)), gradients(f.call, others(f)))


# ----------------------------------------------------------------------------------------------------------- exports


def _exported(f: Function, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(Wrapped(f).eval(), f.args, strict=strict)


def export(f: Function) -> None:
    close(_exported(f).module()(*others(f)), f.call(*others(f)))


def export_strict(f: Function) -> None:
    close(_exported(f, strict=True).module()(*others(f)), f.call(*others(f)))


def export_run_decompositions(f: Function) -> None:
    close(_exported(f).run_decompositions().module()(*others(f)), f.call(*others(f)))


def export_decomposed(f: Function) -> None:
    program = _exported(f).run_decompositions(spatial_pe.decompositions())
    assert "ops.spatial_pe" not in program.graph_module.code
    close(program.module()(*others(f)), f.call(*others(f)))


def export_saved(f: Function) -> None:
    buffer = io.BytesIO()
    torch.export.save(_exported(f), buffer)
    buffer.seek(0)
    close(torch.export.load(buffer).module()(*others(f)), f.call(*others(f)))


def aot_inductor(f: Function) -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(_exported(f), package_path=f"{folder}/f.pt2")
        close(torch._inductor.aoti_load_package(path)(*others(f)), f.call(*others(f)))


def _onnx(f: Function, **options) -> list[str]:
    """Compares in ONNX Runtime; returns the operators of the graph."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(Path(folder) / "f.onnx")
        torch.onnx.export(Wrapped(f).eval(), f.args, path, verbose=False, **options)
        session = onnxruntime.InferenceSession(path)
        names = [x.name for x in session.get_inputs()]
        (out,) = session.run(None, {name: x.numpy() for name, x in zip(names, others(f), strict=True)})
        close(torch.from_numpy(out), f.call(*others(f)))
        return [node.op_type for node in onnx.load(path).graph.node]


def onnx_dynamo(f: Function) -> None:
    _onnx(f, dynamo=True)


def onnx_opset_23(f: Function) -> None:
    operators = _onnx(f, dynamo=True, opset_version=23, custom_translation_table=spatial_pe.onnx_translations())
    assert "Softmax" not in operators


def onnx_torchscript(f: Function) -> None:
    _onnx(f, dynamo=False)


# ----------------------------------------------------------------------------------------------------- torch.compile


def _compiled(f: Function, **options) -> None:
    torch._dynamo.reset()
    fast = torch.compile(f.call, fullgraph=True, **options)
    close(fast(*f.args), f.call(*f.args))
    close(gradients(fast, others(f)), gradients(f.call, others(f)))


def compiled(f: Function) -> None:
    _compiled(f, backend="aot_eager", dynamic=False)


def compiled_dynamic(f: Function) -> None:
    _compiled(f, backend="aot_eager", dynamic=True)


def compiled_inductor(f: Function) -> None:
    _compiled(f)


def compiled_transforms(f: Function) -> None:
    """A compiled function that differentiates and batches."""
    torch._dynamo.reset()
    batch = tuple(torch.stack([x, 0.5 * x]) for x in f.args)
    per_sample = torch.vmap(torch.func.grad(loss(f.call), argnums(f)))
    close(torch.compile(per_sample, backend="aot_eager", fullgraph=True)(*batch), per_sample(*batch))


# ----------------------------------------------------------------------------------------------- function transforms


def _lanes(f: Function) -> list[tuple[Tensor, ...]]:
    return [tuple((1 - 0.2 * i) * x for x in f.args) for i in range(3)]


def vmap(f: Function) -> None:
    lanes = _lanes(f)
    batch = tuple(torch.stack(xs) for xs in zip(*lanes, strict=True))
    close(torch.vmap(f.call)(*batch), torch.stack([f.call(*lane) for lane in lanes]))


def vmap_last_dimension(f: Function) -> None:
    """Lanes in the last dimension, which leaves no lane a stride of 1; all but the first argument are shared."""
    lanes = _lanes(f)
    first = torch.stack([lane[0] for lane in lanes], dim=-1)
    rest = f.args[1:]
    dims = (-1, *(None for _ in rest))
    close(torch.vmap(f.call, dims)(first, *rest), torch.stack([f.call(lane[0], *rest) for lane in lanes]))


def vmap_of_grad(f: Function) -> None:
    """Per-sample gradients."""
    lanes = _lanes(f)
    batch = tuple(torch.stack(xs) for xs in zip(*lanes, strict=True))
    got = torch.vmap(torch.func.grad(loss(f.call), argnums(f)))(*batch)
    each = [gradients(f.call, lane) for lane in lanes]
    close(got, [torch.stack(xs) for xs in zip(*each, strict=True)])


def grad_of_vmap(f: Function) -> None:
    lanes = _lanes(f)
    batch = tuple(torch.stack(xs) for xs in zip(*lanes, strict=True))
    got = torch.func.grad(lambda *args: torch.vmap(loss(f.call))(*args).sum(), argnums(f))(*batch)
    each = [gradients(f.call, lane) for lane in lanes]
    close(got, [torch.stack(xs) for xs in zip(*each, strict=True)])


def grad(f: Function) -> None:
    close(torch.func.grad(loss(f.call), argnums(f))(*f.args), gradients(f.call, f.args))


def vjp(f: Function) -> None:
    out, pull = torch.func.vjp(f.call, *f.args)
    close(out, f.call(*f.args))
    close(pull(weights(out)), gradients(f.call, f.args))


def _four(f: Function) -> Callable[..., Tensor]:
    """Four numbers of the output, so that a Jacobian is small."""
    return lambda *args: f.call(*args).flatten()[:: max(1, f.call(*f.args).numel() // 4)][:4]


def _jacobian(f: Function) -> list[Tensor]:
    args = leaves(f)
    rows = [torch.autograd.grad(x, args, retain_graph=True) for x in _four(f)(*args)]
    return [torch.stack(xs) for xs in zip(*rows, strict=True)]


def jacrev(f: Function) -> None:
    close(torch.func.jacrev(_four(f), argnums(f))(*f.args), _jacobian(f))


def batched_gradients(f: Function) -> None:
    """autograd.functional.jacobian(vectorize=True) and gradcheck's batched gradients."""
    close(torch.autograd.functional.jacobian(_four(f), f.args, vectorize=True), _jacobian(f))


def functionalize(f: Function) -> None:
    close(torch.func.functionalize(f.call)(*f.args), f.call(*f.args))


# ------------------------------------------------------------------------------------------------------ forward mode


def _tangents(f: Function) -> tuple[Tensor, ...]:
    return tuple(randn(*x.shape, seed=50 + i) for i, x in enumerate(f.args))


def _slope(f: Function) -> Tensor:
    """The directional derivative of the loss, by reverse mode."""
    return sum((g * t).sum() for g, t in zip(gradients(f.call, f.args), _tangents(f), strict=True))  # type: ignore[return-value]


def jvp(f: Function) -> None:
    out, tangent = torch.func.jvp(loss(f.call), f.args, _tangents(f))
    close(out, loss(f.call)(*f.args))
    close(tangent, _slope(f), 1e-4)


def jacfwd(f: Function) -> None:
    last = f.args[-1]  # one direction for each element: keep them few
    few = last.flatten()[:6].clone()

    def of_few(x: Tensor) -> Tensor:
        moved = torch.cat([x, last.flatten()[6:]]).view(last.shape)
        return loss(f.call)(*f.args[:-1], moved)

    close(torch.func.jacfwd(of_few)(few), gradients(f.call, f.args)[-1].flatten()[:6], 1e-4)


def dual_numbers(f: Function) -> None:
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, t) for x, t in zip(f.args, _tangents(f), strict=True))
        tangent = forward_ad.unpack_dual(loss(f.call)(*duals)).tangent
    assert tangent is not None
    close(tangent, _slope(f), 1e-4)


def linearize(f: Function) -> None:
    _, push = torch.func.linearize(loss(f.call), *f.args)
    close(push(*_tangents(f)), _slope(f), 1e-4)


# ------------------------------------------------------------------------------------------------- second derivatives


def _curvature(f: Function) -> list[Tensor]:
    """The Hessian times a direction, by central differences of eager gradients: good to a percent."""
    step = 3e-3
    up, down = (
        gradients(f.call, tuple(x + s * t for x, t in zip(f.args, _tangents(f), strict=True))) for s in (step, -step)
    )
    return [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]


def forward_over_reverse(f: Function) -> None:
    """jvp of grad; torch.func.hessian is made of this."""
    _, got = torch.func.jvp(torch.func.grad(loss(f.call), argnums(f)), f.args, _tangents(f))
    close(got, _curvature(f), 0.02)


def reverse_over_reverse(f: Function) -> None:
    def slope(*args: Tensor) -> Tensor:
        found = torch.func.grad(loss(f.call), argnums(f))(*args)
        return sum((g * t).sum() for g, t in zip(found, _tangents(f), strict=True))  # type: ignore[return-value]

    close(torch.func.grad(slope, argnums(f))(*f.args), _curvature(f), 0.02)


def create_graph(f: Function) -> None:
    """Eager second derivatives."""
    args = leaves(f)
    found = torch.autograd.grad(loss(f.call)(*args), args, create_graph=True)
    slope = sum((g * t).sum() for g, t in zip(found, _tangents(f), strict=True))
    if slope.requires_grad:  # a linear function has no second derivative
        close(torch.autograd.grad(slope, args), _curvature(f), 0.02)
    else:
        close(torch.zeros_like(slope), sum(x.norm() for x in _curvature(f)))


# --------------------------------------------------------------------------------------------------- tensors and modes


def fake(f: Function) -> None:
    expected = f.call(*f.args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = f.call(*(mode.from_tensor(x) for x in f.args))
    assert (out.shape, out.dtype, out.stride(), out.device) == (*_like(expected), expected.device)
    close(f.call(*f.args), expected)  # and nothing of it stays


def meta(f: Function) -> None:
    expected = f.call(*f.args)
    if f.module is not None:
        f.module.to("meta")
    out = f.call(*(x.to("meta") for x in f.args))
    assert (out.shape, out.dtype, out.stride(), out.device.type) == (*_like(expected), "meta")


def _like(x: Tensor) -> tuple:
    return x.shape, x.dtype, x.stride()


def default_device(f: Function) -> None:
    """A default device is where new tensors are made, not where given ones are."""
    with torch.device("meta"):
        out = f.call(*f.args)
    close(out, f.call(*f.args))


class Named(Tensor):
    """A subclass that changes nothing."""


def subclass(f: Function) -> None:
    out = f.call(*(x.as_subclass(Named) for x in f.args))
    assert type(out) is Named
    close(out.as_subclass(Tensor), f.call(*f.args))


class Boxed(Tensor):
    """A wrapper that knows torch's operators, as distributed and quantised tensors do: it unpacks and runs them."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace in ("aten", "prim"), f"{func} is not one of torch's operators"
        args, kwargs = tree_map_only(Boxed, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Boxed, func(*args, **kwargs))


def wrapper_subclass(f: Function) -> None:
    out = f.call(*(Boxed(x) for x in f.args))
    assert type(out) is Boxed
    close(out.inner, f.call(*f.args))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def dispatch_mode(f: Function) -> None:
    with Seen() as seen:
        out = f.call(*f.args)
    assert seen.names
    close(out, f.call(*f.args))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def function_mode(f: Function) -> None:
    with Functions() as seen:
        out = f.call(*f.args)
    assert seen.names
    close(out, f.call(*f.args))


def lazily_negated(f: Function) -> None:
    """Memory that holds the negative, with a bit that says so."""
    close(f.call(*(torch._neg_view(-x) for x in f.args)), f.call(*f.args))


# ---------------------------------------------------------------------------------------------- memory and checkpoints


def saved_tensors_hooks(f: Function) -> None:
    def unpack(kept):
        return kept if isinstance(kept, Tensor) else torch.from_numpy(kept)

    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.clone() if x.requires_grad else x.clone().numpy(), unpack
    ):
        args = leaves(f)
        value = loss(f.call)(*args)
    close(torch.autograd.grad(value, args), gradients(f.call, f.args))


def save_on_cpu(f: Function) -> None:
    args = leaves(f)
    with torch.autograd.graph.save_on_cpu():
        value = loss(f.call)(*args)
    close(torch.autograd.grad(value, args), gradients(f.call, f.args))


def checkpoint_reentrant(f: Function) -> None:
    args = leaves(f)
    loss(lambda *args: checkpoint(f.call, *args, use_reentrant=True))(*args).backward()
    close([x.grad for x in args], gradients(f.call, f.args))


def checkpoint_non_reentrant(f: Function) -> None:
    args = leaves(f)
    loss(lambda *args: checkpoint(f.call, *args, use_reentrant=False))(*args).backward()
    close([x.grad for x in args], gradients(f.call, f.args))


def checkpoint_selective(f: Function) -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(_context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "attention" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    args = leaves(f)
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    loss(lambda *args: checkpoint(f.call, *args, use_reentrant=False, context_fn=contexts))(*args).backward()
    close([x.grad for x in args], gradients(f.call, f.args))


# ------------------------------------------------------------------------------------------------------------ modules


def functional_call(f: Function) -> None:
    """Other parameters than the module's own; for functions that run one module."""
    module = f.module
    assert module is not None
    smaller = {name: 0.7 * x for name, x in module.named_parameters()}
    twin = copy.deepcopy(module)
    twin.load_state_dict(smaller, strict=False)
    if f.module is f.call:
        close(torch.func.functional_call(module, smaller, f.args), twin(*f.args))
        return
    wrapped = Wrapped(f)
    got = torch.func.functional_call(wrapped, {f"inner.{name}": x for name, x in smaller.items()}, f.args)
    before = {name: x.detach().clone() for name, x in module.named_parameters()}
    module.load_state_dict(smaller, strict=False)
    expected = f.call(*f.args).detach()
    module.load_state_dict(before, strict=False)
    close(got, expected)


def parameter_gradients(f: Function) -> None:
    """torch.func.grad of a functional call, per sample, against backward."""
    module = f.module
    assert module is not None and dict(module.named_parameters())
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    call = module if f.module is f.call else Wrapped(f)
    prefix = "" if f.module is f.call else "inner."

    def of(parameters: dict[str, Tensor]) -> Tensor:
        named = {prefix + name: x for name, x in parameters.items()}
        return loss(lambda *args: torch.func.functional_call(call, named, args))(*f.args)

    got = torch.func.grad(of)(parameters)
    names = [name for name, x in module.named_parameters()]
    expected = torch.autograd.grad(
        loss(f.call)(*f.args), list(module.parameters()), allow_unused=True, materialize_grads=True
    )
    # all of them as one: some are zero but for rounding, as that of a bias of k
    close(torch.cat([got[name].flatten() for name in names]), torch.cat([x.flatten() for x in expected]))


def deepcopy(f: Function) -> None:
    assert f.module is not None
    twin = copy.deepcopy(f.module)
    assert twin is not f.module
    if f.module is f.call:
        close(twin(*f.args), f.call(*f.args))


def pickled(f: Function) -> None:
    """In a fresh process, which knows only where the classes are."""
    assert f.module is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.pkl"
        expected = f.call(*f.args).detach() if f.module is f.call else None
        path.write_bytes(pickle.dumps((f.module, f.args, expected)))
        code = (
            "import sys, pickle, torch; torch.set_num_threads(1); sys.path += sys.argv[2:]\n"
            "module, args, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
            "if expected is not None: torch.testing.assert_close(module(*args), expected)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path), *sys.path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


TRANSFORMS: dict[str, Callable[[Function], None]] = {
    function.__name__: function
    for function in (
        no_grad, inference_mode, anomaly_detection, autocast,
        jit_trace, jit_trace_with_gradients, jit_trace_saved, fx_symbolic_trace,
        make_fx_real, make_fx_fake, make_fx_symbolic, make_fx_of_gradients, make_fx_decomposed,
        export, export_strict, export_run_decompositions, export_decomposed, export_saved, aot_inductor,
        onnx_dynamo, onnx_opset_23, onnx_torchscript,
        compiled, compiled_dynamic, compiled_inductor, compiled_transforms,
        vmap, vmap_last_dimension, vmap_of_grad, grad_of_vmap, grad, vjp, jacrev, batched_gradients, functionalize,
        jvp, jacfwd, dual_numbers, linearize, forward_over_reverse, reverse_over_reverse, create_graph,
        fake, meta, default_device, subclass, wrapper_subclass, dispatch_mode, function_mode, lazily_negated,
        saved_tensors_hooks, save_on_cpu, checkpoint_reentrant, checkpoint_non_reentrant, checkpoint_selective,
        functional_call, parameter_gradients, deepcopy, pickled,
    )
}  # fmt: skip
