# SPDX-License-Identifier: Apache-2.0
"""Proof that a patched attention computes what its original forward computes, on a tiny random input.

The reference is the original forward in float64. Errors are relative to it in the Frobenius norm, and it is itself
accurate to float32 only: many towers rotate in float32 in any dtype. Two rules:

        patched, in float64            error <= 4 roundings of float32
        patched, in the module's dtype error <= 1.5 x error of its original forward + 4 roundings in its dtype

The first finds what low precision hides (e.g. a bias that outweighs the attention), the second checks the kernel that
will run. Negative control: with negated angles the first rule must fail; otherwise it has no power, and the proof is
reported as inconclusive. All runs use copies that share the weights but no hooks and no mode: the model, the random
state and the gradients are not touched.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..rotary import Rotary
from . import proof_inputs as given
from .classes import swapped_class
from .cost import Cost, cost_of
from .forms import ForwardForm
from .fused_attention import Binding, FusedAttention
from .grid_hooks import Grids
from .layout import Layout
from .rotary_inputs import rope_of

# switches of modules that call flash-attn themselves (InternVL's and Kimi-VL's own code)
OTHER_THAN_FLASH = {"use_flash_attn": False, "attn_implementation": "sdpa"}


@dataclass(frozen=True)
class Proof:
    """error: of the patched forward; own_error: of the original one. pairing, returns, masks: for the Binding.

    failure: why this is no proof, or None. ran: False if nothing was found wrong, but nothing could be compared either.
    """

    error: float | None = None
    own_error: float | None = None
    failure: str | None = None
    ran: bool = True
    pairing: str = "half"
    returns: str = "tuple"
    masks: bool = False
    optional: bool = True  # a call without positions does not rotate
    example: int = 0  # index of the example


def prove(
    module: nn.Module, form: ForwardForm, layout: Layout, backend: str, packs_images: bool, pairings: tuple[str, ...]
) -> Proof:
    """Compare the forwards, for each pairing and each form that the arguments may have, until the rules hold."""
    weight = floating_weight(module)
    if any(p.is_meta for p in module.parameters()):
        return Proof(failure="its weights are not in memory", ran=False)
    found: list[Proof] = []
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        reference, own = _bare(module, torch.float64), _bare(module, None)
        for pairing in pairings:
            examples = given.examples(reference, form, layout, pairing, packs_images, weight.device, given.SMALL)
            proofs = []
            for example, inputs in enumerate(examples):
                proof = _compare(reference, own, form, layout, backend, pairing, inputs, weight.dtype)
                proofs.append(replace(proof, example=example))
                if proof.failure is None and not form.keys:
                    return proofs[-1]
            # to other tokens: every form of arguments that its own forward takes must hold
            compared = [proof for proof in proofs if proof.ran]
            if compared and all(proof.failure is None for proof in compared):
                return compared[0]
            found += proofs
    failed = [proof for proof in found if proof.ran and proof.failure is not None]
    return failed[0] if failed else found[0]


def prove_added(module: nn.Module, encoding: nn.Module, binding: Binding) -> None:
    """Run an attention module with an added encoding, on a grid of 3 x 5 patches. Raise ValueError if that fails, or if
    the kernel computes something else than the composed path in float64, by the second rule above."""
    weight = floating_weight(module)
    if any(p.is_meta for p in module.parameters()):
        return
    layout, form, grids = binding.layout, binding.form, binding.grids
    assert grids is not None
    tokens = binding.prefix + 15 + binding.suffix
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, layout.width, generator=generator, dtype=torch.float64, device="cpu").to(weight.device)
    name = f"rope={type(encoding).__name__}"
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        own, reference = _bare(module, None), _bare(module, torch.float64)
        x = x * given.spread(reference, layout, x)
        try:
            tables = encoding(grids.where(grids.example(3, 5), x, binding.prefix, binding.suffix)).to(x.device)
        except Exception as failed:
            raise ValueError(f"{name} fails on a grid of 3 x 5 patches: {_brief(failed)}") from failed
        if isinstance(tables, Rotary) and tables.num_tokens != tokens:
            raise ValueError(
                f"{name} must return a row for each token, {tokens} for 3 x 5 patches and {tokens - 15} other tokens, "
                f"got {tables.num_tokens}"
            )
        cls = swapped_class(FusedAttention, type(module))
        fixed = replace(binding, grids=Fixed(tables), strict=True)

        def run(twin: nn.Module, backend: str, dtype: torch.dtype) -> Tensor:
            call = given.self_attention(twin, form, x.to(dtype))
            return _first(_as_patched(twin, cls, replace(fixed, backend=backend))(**call))

        try:
            exact = run(reference, "composed", torch.float64)
            ours, composed = run(own, binding.backend, weight.dtype), run(own, "composed", weight.dtype)
        except Exception as failed:
            raise ValueError(f"{name} cannot run in {type(module).__name__}: {_brief(failed)}") from failed
    eps = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    error, allowed = _distance(ours, exact), 1.5 * _distance(composed, exact) + 4 * eps
    if not error <= allowed:
        raise ValueError(f"{name} in {type(module).__name__}: relative error {error:.2g}, {allowed:.2g} is allowed")


class Fixed(Grids):
    """The tables of one grid, whatever the tokens."""

    def __init__(self, tables: Any) -> None:
        super().__init__()
        self.tables = tables

    def rotary(self, module: Any, x: Tensor, prefix: int, suffix: int = 0) -> Any:
        return self.tables


def floating_weight(module: nn.Module) -> Tensor:
    """Return a parameter or buffer that shows the dtype and device of a module's computation: quantised weights are
    integers, or not tensors at all."""
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0, device=device))


def costs(module: nn.Module, binding: Binding, packs_images: bool, example: int) -> tuple[Cost, Cost] | None:
    """Return the costs of the original and patched forward on 960 tokens (one image, 15 windows); None if one fails."""
    weight = floating_weight(module)
    form, layout = binding.form, binding.layout
    if form.own_table:  # 960 is no square
        return None
    own = _bare(module, None)
    patched = _as_patched(own, swapped_class(FusedAttention, type(own)), replace(binding, strict=True))
    examples = list(given.examples(own, form, layout, binding.pairing, packs_images, weight.device, given.LARGE))
    inputs = examples[example]
    try:
        with torch.autocast(weight.device.type, enabled=False):
            return (
                cost_of(given.attention(own, form), given.own_inputs(inputs, weight.dtype, form), form.first),
                cost_of(given.attention(patched, form), given.cast(inputs, weight.dtype, form), form.first),
            )
    except (RuntimeError, TypeError, ValueError):
        return None


def _compare(
    reference: nn.Module,
    own: nn.Module,
    form: ForwardForm,
    layout: Layout,
    backend: str,
    pairing: str,
    inputs: dict[str, Any],
    dtype: torch.dtype,
) -> Proof:
    cls = swapped_class(FusedAttention, type(reference))
    rotates = bool(form.rotation) and not (form.calls and rope_of(reference, form) is None)
    try:
        exact, inverse = (
            _first(given.attention(twin, form)(**given.own_inputs(case, torch.float64, form)))
            for twin, case in (
                (reference, inputs),
                (_negated_table(reference, form), given.negated(inputs, form)),
            )
        )
        result = given.attention(own, form)(**given.own_inputs(inputs, dtype, form))
    except Exception as failed:
        return Proof(failure=f"its own forward fails on a test input ({_brief(failed)})", ran=False)
    theirs, returns = _first(result), "tuple" if isinstance(result, tuple) else "tensor"
    binding = Binding(layout, form, pairing, returns, backend, strict=True)
    try:
        wide = given.attention(_as_patched(reference, cls, replace(binding, backend="composed")), form)(**inputs)
        ours = given.attention(_as_patched(own, cls, binding), form)(**given.cast(inputs, dtype, form))
    except Exception as failed:
        return Proof(failure=f"the patched forward fails on a test input ({_brief(failed)})")
    if _first(ours).shape != exact.shape:
        shapes = tuple(exact.shape), tuple(_first(ours).shape)
        return Proof(failure=f"its own forward returns {shapes[0]}, the patched one {shapes[1]}")
    allowed = 4 * torch.finfo(torch.float32).eps
    if rotates and not _distance(inverse, exact) > allowed:  # true also for NaN, e.g. if all weights are zero
        return Proof(failure="its output does not depend on the rotation", ran=False)
    error = _distance(_first(wide), exact)
    if not error <= allowed:
        return Proof(error, 0.0, f"relative error {error:.2g} in float64")
    error, own_error = _distance(_first(ours), exact), _distance(theirs, exact)
    if not error <= 1.5 * own_error + 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps):
        return Proof(error, own_error, f"relative error {error:.2g}, its own forward has {own_error:.2g} ({dtype})")
    composed = replace(binding, backend="composed")
    masks = _takes_padding(reference, cls, replace(composed, masks=True, pads=True), inputs, exact)
    optional = not (rotates and form.calls) or _rotates_only_with_positions(reference, cls, composed, inputs)
    return Proof(error, own_error, pairing=pairing, returns=returns, masks=masks, optional=optional)


def _rotates_only_with_positions(
    reference: nn.Module, cls: type[FusedAttention], binding: Binding, inputs: dict[str, Any]
) -> bool:
    """Return whether the original forward takes a call without positions, and does not rotate there."""
    form = binding.form
    without = {**inputs, form.rotation: None, **({form.rotation_k: None} if form.rotation_k else {})}
    try:
        theirs = _first(reference(**without))
    except Exception:
        return False
    ours = _first(_as_patched(reference, cls, binding)(**without))
    return _distance(ours, theirs) <= 4 * torch.finfo(torch.float32).eps


def _takes_padding(
    reference: nn.Module, cls: type[FusedAttention], binding: Binding, inputs: dict[str, Any], exact: Tensor
) -> bool:
    """Return whether the original forward supports a padding mask, at the end of one sample, scattered in another."""
    name = binding.form.mask
    takes = signature(type(reference).forward).parameters
    if binding.form.keys or exact.ndim != 3 or exact.shape[0] != 2 or name not in takes:
        return False
    tokens = exact.shape[1]
    valid = torch.ones(2, tokens, dtype=torch.bool, device=exact.device)
    valid[0, -4:], valid[1, 4:9:2] = False, False
    masked = {**inputs, name: valid[:, None, None].expand(2, 1, tokens, tokens)}
    try:
        theirs = _first(reference(**masked))
        ours = _first(_as_patched(reference, cls, binding)(**masked))
    except Exception:
        return False
    uses_it = _distance(theirs[valid], exact[valid]) > 4 * torch.finfo(torch.float32).eps
    return uses_it and _distance(ours[valid], theirs[valid]) <= 4 * torch.finfo(torch.float32).eps


# ------------------------------------------------------------------------------------------------------------- copies


def _negated_table(reference: nn.Module, form: ForwardForm) -> nn.Module:
    """Return a module whose own table has every angle negated, or whose own positions are those of other tokens; the
    module itself, if it has none."""
    if not (form.own_table or form.places):
        return reference
    twin = _bare(reference, None)
    if form.own_table:
        setattr(twin, form.rotation, getattr(reference, form.rotation).conj().resolve_conj())
    else:
        found = getattr(reference, form.places)
        twin.__dict__[form.places] = lambda x, masks=None: tuple(p.flip(-1) for p in found(x, masks=masks))
    return twin


def _bare(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy in eval mode that shares the weights (or holds them in dtype), without hooks and wrappers."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    state = twin.__dict__
    for name in ("forward", "_old_forward", "_hf_hook", "_spatial_pe"):
        state.pop(name, None)
    for name, value in list(state.items()):
        if "_hooks" in name and isinstance(value, OrderedDict):
            state[name] = OrderedDict()
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: _converted(value, dtype) for name, value in state[kind].items()}
    children = state["_modules"].items()
    state["_modules"] = {name: None if child is None else _bare(child, dtype) for name, child in children}
    state["training"] = False
    if dtype is not None or not torch.cuda.is_available():  # flash-attn has no float64, and no CPU
        for name, other in OTHER_THAN_FLASH.items():
            if state.get(name) is True or "flash" in str(state.get(name)):
                state[name] = other
    config: Any = state.get("config")
    if hasattr(config, "_attn_implementation") and (dtype is not None or config._attn_implementation != "eager"):
        # the reference must run in float64, and flash attention may not support this input at all
        if config._attn_implementation == "eager":
            state.setdefault("is_causal", False)  # a class that is never run with sdpa may lack it
        state["config"] = copy.copy(config)
        state["config"]._attn_implementation = "sdpa"
    return twin


def _as_patched(twin: nn.Module, cls: type[FusedAttention], binding: Binding) -> nn.Module:
    patched = type(twin).__new__(cls)
    patched.__dict__.update(twin.__dict__)
    patched._spatial_pe = binding  # type: ignore[assignment]
    return patched


def _converted(value: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if value is None:
        return None
    value = value.detach()
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


# ------------------------------------------------------------------------------------------------------------ results


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


def _brief(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:120]}" if text else type(error).__name__
