# SPDX-License-Identifier: Apache-2.0
"""Decide whether a call must go through torch's dispatcher, and which operators it may use.

An eager call skips torch's dispatcher, whose path through Python costs 15 us, 65 us with a gradient: more than the
kernel of a small image (`python -m tools.host_overhead`). It may do so only if nothing intercepts the call.
Tracers, modes and function transforms set dispatch keys of the thread, special tensors have their own keys, so these
are compared with those of a plain call: interceptors that torch adds later are noticed without being listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.nn import Parameter

F = TypeVar("F", bound=Callable)
_C: Any = torch._C
_KEY = _C.DispatchKey


def _keys(*keys: Any) -> int:
    keyset = _C.DispatchKeySet(keys[0])
    for key in keys[1:]:
        keyset = keyset | _C.DispatchKeySet(key)
    return keyset.raw_repr()


# Keys that a thread includes by default, also inside torch.inference_mode.
_QUIET = frozenset({_keys(_KEY.BackendSelect), _keys(_KEY.BackendSelect, _KEY.ADInplaceOrView)})
# Keys of an ordinary strided tensor, made outside or inside of torch.inference_mode.
_PLAIN = frozenset(
    _keys(backend, autocast, *autograd)
    for backend, autocast, grad in (
        (_KEY.CPU, _KEY.AutocastCPU, _KEY.AutogradCPU),
        (_KEY.CUDA, _KEY.AutocastCUDA, _KEY.AutogradCUDA),
    )
    for autograd in ((), (grad, _KEY.ADInplaceOrView))
)


def is_intercepted() -> bool:
    """Return whether a tracer, a mode, a function transform or forward mode is active in this thread."""
    if torch.compiler.is_compiling() or _C._dispatch_tls_local_include_set().raw_repr() not in _QUIET:
        return True
    return forward_ad._current_level >= 0 or _C._len_torch_function_stack() > 0  # neither is among the keys


def are_special(tensors: Sequence[Tensor]) -> bool:
    """Return whether one of the tensors is not plain memory: fake, meta, distributed, batched, lazily negated, ..."""
    keys_of = _C._dispatch_keys
    for x in tensors:  # noqa: SIM110, a generator inside any() costs a microsecond
        if keys_of(x).raw_repr() not in _PLAIN:
            return True
    return False


def needs_dispatcher(tensors: Sequence[Tensor]) -> bool:
    """Return whether the call must be a torch op."""
    return is_intercepted() or are_special(tensors)


def needs_plain_ops(tensors: Sequence[Tensor]) -> str | None:
    """Return why the call must be made of plain torch operators, or None. Call only where the dispatcher is needed."""
    if reason := derivatives_beyond_reverse():
        return reason
    if in_torchscript_export():
        return "for the TorchScript exporter of ONNX"
    for x in tensors:
        kind = type(x)
        if kind is not Tensor and kind is not Parameter and _dispatches(kind):
            return f"tensors of the subclass {kind.__name__}"
    return None


def in_torchscript_export() -> bool:
    """Return whether torch.onnx.export(dynamo=False) records, which decomposes no op; dynamo=True traces in modes."""
    return torch.onnx.is_in_onnx_export() and not _C._len_torch_dispatch_stack()


def derivatives_beyond_reverse() -> str | None:
    """Return which derivatives a transform requests that fused kernels (torch's and ours) lack: they have first
    derivatives in reverse mode only."""
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives (torch.func.jvp, dual numbers)"
    if in_transform():
        levels = _C._functorch.get_interpreter_stack()
        if sum(level.key() == _C._functorch.TransformType.Grad for level in levels) > 1:
            return "second derivatives (nested torch.func.grad, vjp or jacrev)"
    return None


def _dispatches(kind: Any) -> bool:
    """Return whether the class computes operators on its tensors itself, instead of torch when tracing."""
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not kind.__module__.startswith(("torch._subclasses.", "torch._export", "torch.fx."))


def in_transform() -> bool:
    """Return whether a function transform (torch.func) is active."""
    return not torch.compiler.is_compiling() and _C._functorch.peek_interpreter_stack() is not None


def is_traced(x: Tensor) -> bool:
    """Return whether the values of x cannot be read: there are none, or a tracer or transform is in between."""
    if torch.compiler.is_compiling() or (type(x) is not Tensor and type(x) is not Parameter) or x.is_meta:
        return True
    if _C._is_tracing() or in_transform():
        return True
    return bool(_C._len_torch_dispatch_stack()) and any(_C._get_dispatch_mode(mode) for mode in _TRACING_MODES)


_TRACING_MODES = tuple(
    getattr(_C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
)  # modes that intercept operators


def has_values(x: Tensor) -> bool:
    """Return whether the values of x can be read cheaply: on a GPU it would wait for the device."""
    return x.device.type == "cpu" and not is_traced(x)


def requires_grad(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and _C._any_requires_grad(*tensors)


def unrecorded(function: Callable, *args: Any) -> Any:
    """Return function(*args), hidden from a running torch.jit.trace, which would record each size that is read as a
    tensor and warn of each comparison."""
    state = None if torch.compiler.is_compiling() else _C._get_tracing_state()
    if state is None:
        return function(*args)
    _C._set_tracing_state(None)
    try:
        return function(*args)
    finally:
        _C._set_tracing_state(state)


def fx_node(target: Callable | torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return a torch.fx node that calls the function or module, if it is being traced symbolically; else None.

    Functions of this package depend on shapes and tensor properties, which a symbolic trace does not have.
    """
    proxy = None
    for x in (*args, *kwargs.values()):
        if isinstance(x, fx.Proxy):
            proxy = x
    if proxy is None:
        return None
    if isinstance(target, torch.nn.Module):
        name = proxy.tracer.path_of_module(target)  # type: ignore[attr-defined]
        return proxy.tracer.create_proxy("call_module", name, args, kwargs)
    return proxy.tracer.create_proxy("call_function", target, args, kwargs)


def assume_constant(function: F) -> F:
    """Mark a function as torch.compiler.assume_constant_result does, without importing dynamo, which takes as long as
    importing torch: 1.5 s, also for those who never compile."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assume_constant
def has_autocast(device: str) -> bool:
    """Return whether a device type supports autocast. meta does not, and torch.is_autocast_enabled raises on it."""
    return torch.amp.is_autocast_available(device)
