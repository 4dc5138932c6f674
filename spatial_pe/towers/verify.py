# SPDX-License-Identifier: Apache-2.0
"""The proof that a patched attention computes what its own forward computes, on a tiny random input.

The reference is the module's own forward in float64. Errors are relative to it in the Frobenius norm, and it is itself
good to float32 only: many towers rotate in float32 whatever they run in. Two rules:

    patched, in float64           error <= 4 roundings of float32
    patched, as the module is     error <= 1.5 x error of its own forward + 4 roundings in its dtype

The first sees what low precision hides (a bias that outweighs the attention, say), the second proves the kernel that
will serve. The reference turned the other way must break the first rule: else the proof could not have failed, and it
says so. All runs use copies that share the weights but no hooks and no mode: the model, the random state and the
gradients are not touched.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapter, Binding, Shape, patched_class
from .layout import project

PREFIX, BOUNDS = 3, (0, 5, 6, 15)  # unrotated tokens; three sequences, one of a single token


@dataclass(frozen=True)
class Proof:
    """error: of the patched forward; own_error: of the module's own.

    failure: why this is no proof, or None. ran: False if nothing was found wrong, but nothing could be compared either.
    """

    error: float | None = None
    own_error: float | None = None
    failure: str | None = None
    ran: bool = True


def prove(module: nn.Module, shape: Shape, binding: Binding, packs_images: bool) -> Proof:
    """Run all three and apply the rule."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None or weight.is_meta:
        return Proof(failure="its weights are not in memory", ran=False)
    cls, dtype = patched_class(shape.adapter, type(module)), weight.dtype
    plain = Binding(binding.layout, binding.backend)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            reference, own = _bare(module, torch.float64), _bare(module, None)
            inputs = _inputs(reference, shape, plain, packs_images, weight.device)
            exact, turned = (
                _first(reference(**_own_inputs(given, torch.float64, shape, packs_images)))
                for given in (inputs, _turned_back(inputs))
            )
            theirs = own(**_own_inputs(inputs, dtype, shape, packs_images))
        except Exception as failed:
            return Proof(failure=f"its own forward fails on a test input ({_brief(failed)})", ran=False)
        try:
            wide = _as_patched(reference, cls, Binding(binding.layout, "composed"))(**inputs)
            ours = _as_patched(own, cls, plain)(**_cast(inputs, dtype, shape))
        except Exception as failed:
            return Proof(failure=f"the patched forward fails on a test input ({_brief(failed)})")
    if isinstance(ours, tuple) != isinstance(theirs, tuple) or _first(ours).shape != exact.shape:
        return Proof(failure=f"its own forward returns {_form(theirs)}, the patched one {_form(ours)}")
    allowed = 4 * torch.finfo(torch.float32).eps
    if shape.has_rope and not _distance(turned, exact) > allowed:  # true also for NaN, as of weights that are all zero
        return Proof(failure="its output does not depend on the rotation", ran=False)
    error = _distance(_first(wide), exact)
    if not error <= allowed:
        return Proof(error, 0.0, f"relative error {error:.2g} in float64")
    error, own_error = _distance(_first(ours), exact), _distance(_first(theirs), exact)
    if not error <= 1.5 * own_error + 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps):
        return Proof(error, own_error, f"relative error {error:.2g}, its own forward has {own_error:.2g} ({dtype})")
    return Proof(error, own_error)


# ------------------------------------------------------------------------------------------------------------- inputs


def _inputs(reference: nn.Module, shape: Shape, plain: Binding, packs: bool, device: torch.device) -> dict[str, Any]:
    """Arguments of the patched forward, in float64."""
    layout = plain.layout
    generator = torch.Generator().manual_seed(0)
    packed = shape.name == "packed" or packs
    tokens = BOUNDS[-1]
    rows = tokens if packed or not shape.has_rope else tokens - PREFIX
    lead = (tokens,) if shape.name == "packed" else (1 if packs else 2, tokens)
    x = torch.randn(*lead, layout.width, generator=generator, dtype=torch.float64, device="cpu").to(device)
    angles = torch.randn(rows, layout.head_dim // 2, generator=generator, dtype=torch.float64, device="cpu")
    angles = torch.cat([angles, angles], dim=-1).to(device)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
    # Logits near zero would make every attention uniform and every rotation look right: give them a spread of 2,
    # which q kᵀ reaches where x is scaled by the root of what is missing.
    q, k, _ = project(reference, layout, x)
    spread = float((q * k.repeat_interleave(layout.heads // layout.kv_heads, dim=-2)).sum(-1).std()) * layout.scale
    if math.isfinite(spread) and spread > 0:
        x = x * min(max((2 / spread) ** 0.5, 1e-3), 1e3)
    inputs: dict[str, Any] = {"hidden_states": x}
    if shape.has_rope:
        inputs["position_embeddings"] = (angles.cos(), angles.sin())
    if shape.name == "packed":
        inputs["cu_seqlens"] = bounds
    elif packs:
        inputs["cu_seq_lens_q"] = bounds
    return inputs


def _turned_back(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with every angle negated."""
    if "position_embeddings" not in inputs:
        return inputs
    cos, sin = inputs["position_embeddings"]
    return {**inputs, "position_embeddings": (cos, -sin)}


def _cast(inputs: dict[str, Any], dtype: torch.dtype, shape: Shape) -> dict[str, Any]:
    """In the module's dtype; the tables of packed towers arrive in float32 whatever it is."""
    cast = {**inputs, "hidden_states": inputs["hidden_states"].to(dtype)}
    if shape.has_rope:
        table = torch.float32 if shape.name == "packed" and dtype != torch.float64 else dtype
        cast["position_embeddings"] = tuple(t.to(table) for t in inputs["position_embeddings"])
    return cast


def _own_inputs(inputs: dict[str, Any], dtype: torch.dtype, shape: Shape, packs: bool) -> dict[str, Any]:
    """The same for the module's own forward, which takes packed images as a mask."""
    cast = _cast(inputs, dtype, shape)
    if packs:
        bounds = cast.pop("cu_seq_lens_q")
        image = torch.searchsorted(bounds, torch.arange(BOUNDS[-1], device=bounds.device), right=True)
        mask = torch.zeros(len(image), len(image), dtype=dtype, device=image.device)
        cast["attention_mask"] = mask.masked_fill_(image[:, None] != image, torch.finfo(dtype).min)[None, None]
    return cast


# ------------------------------------------------------------------------------------------------------------- copies


def _bare(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy in eval mode that shares the weights (or holds them in dtype), without hooks and wrappers."""
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
    config: Any = state.get("config")
    if hasattr(config, "_attn_implementation") and (dtype is not None or config._attn_implementation != "eager"):
        # the reference must run in float64, and flash attention may not run on this input at all
        state["config"] = copy.copy(config)
        state["config"]._attn_implementation = "sdpa"
    return twin


def _as_patched(twin: nn.Module, cls: type[Adapter], binding: Binding) -> nn.Module:
    twin.__class__ = cls
    twin._spatial_pe = binding  # type: ignore[assignment]
    return twin


def _converted(value: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if value is None:
        return None
    value = value.detach()
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


# ------------------------------------------------------------------------------------------------------------ results


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _form(result: Any) -> str:
    shape = tuple(_first(result).shape)
    return f"a tuple with {shape}" if isinstance(result, tuple) else f"a tensor {shape}"


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


def _brief(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:120]}" if text else type(error).__name__
