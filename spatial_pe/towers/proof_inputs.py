# SPDX-License-Identifier: Apache-2.0
"""Arguments of attention modules for the proof: small random inputs in all variants that modules of a form take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from ..rotary import join_pairs
from .forms import ForwardForm
from .layout import Layout, project, scale_of

PREFIX = 3  # unrotated tokens
SMALL = (0, 5, 6, 15)  # cu_seqlens of three sequences, one of a single token
GRID = (3, 5)  # of as many patches
LARGE = tuple(range(0, 961, 64))  # 960 tokens in windows of 64


def attention(module: nn.Module, form: ForwardForm) -> Callable[..., Any]:
    """Return the method that is attention; called without hooks, which these copies do not have."""
    return getattr(module, form.method or "forward")


def examples(
    reference: nn.Module,
    form: ForwardForm,
    layout: Layout,
    pairing: str,
    packs: bool,
    device: torch.device,
    starts: tuple[int, ...],
) -> Iterator[dict[str, Any]]:
    """Yield arguments of the patched forward, in float64, in the variants that attention modules of a form take."""
    if form.keys:
        yield from _examples_of_other_tokens(reference, form, layout, pairing, device, starts)
        return
    packed = bool(form.bounds) or packs
    bounds = torch.tensor(starts, dtype=torch.int32, device=device)
    tokens = starts[-1]
    forms: list[tuple[tuple[int, ...], tuple[int, ...]]]
    if form.bounds:
        forms = [((tokens,), (tokens,)), ((1, tokens), (tokens,))]
    elif packs:
        forms = [((1, tokens), (tokens,))]
    elif not form.rotation:
        forms = [((2, tokens), (tokens,))]
    elif form.places:
        forms = [((2, tokens), (2, tokens))]
    elif form.positions == "grid":
        forms = [((2, tokens), (2, tokens)), ((2, tokens + 1), (2, tokens + 1))]  # with a CLS token
    elif form.calls:  # rows: batch, and axes
        forms = [((2, tokens), (batch, axes)) for axes in (2, 3) for batch in (2, 1)]
    else:
        prefix = getattr(reference, "num_prefix_tokens", PREFIX)  # as timm has it
        forms = [
            ((2, tokens), (tokens - prefix,)),  # DINOv3, timm
            ((2, tokens), (tokens,)),  # MLCD, Llama 4
            ((2, tokens), (2, tokens)),  # Gemma 4
            ((2, 3, tokens // 3), (tokens,)),  # SAM 3
        ]
    for lead, rows in forms:
        generator = torch.Generator().manual_seed(0)
        x, angles = (
            torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(device)
            for size in ((*lead, layout.width), (*rows, layout.head_dim // 2))
        )
        inputs: dict[str, Any] = {form.first: x if starts is LARGE else x * spread(reference, layout, x)}
        if form.calls:
            inputs[form.rotation] = _positions(form, rows[0], lead[1], rows[1], layout.head_dim, device)
        elif form.rotation:
            inputs[form.rotation] = _rotation(angles, form.tables, pairing)
        if packed:
            inputs[form.bounds or "cu_seq_lens_q"] = bounds
        for name, parameter in signature(attention(reference, form)).parameters.items():
            if name == "position_ids":  # Gemma 4 reads the number of axes
                inputs[name] = torch.zeros(2, tokens, 2, dtype=torch.long, device=device)
            elif parameter.default is Parameter.empty and parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
                inputs.setdefault(name, None)
        if form.bounds and form.rotation and form.tables == "cos_sin":
            # most packed towers pass float32 tables in any dtype, some pass their own dtype
            yield {**inputs, form.rotation: tuple(t.float() for t in inputs[form.rotation])}
        yield inputs
        if form.bounds and not form.rotation:  # HunYuan-VL forwards it without naming it
            yield {**inputs, form.mask: None}


def _examples_of_other_tokens(
    reference: nn.Module,
    form: ForwardForm,
    layout: Layout,
    pairing: str,
    device: torch.device,
    starts: tuple[int, ...],
) -> Iterator[dict[str, Any]]:
    """Yield the same for attention to other tokens: those of memories, which are repeated and not all rotated, those of
    another view, and the tokens themselves."""
    tokens = starts[-1] + 1 if starts is SMALL else starts[-1]  # 16 is a square, as a table of its own has it
    shown = 5 if form.groups else tokens  # rows of the keys' table
    parameters = signature(type(reference).forward).parameters
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(device)

    def of_batch(x: Tensor) -> Tensor:
        if form.tables == "cos_sin" and form.rotation:
            return x[:, None]  # objects of an image
        return x if getattr(reference, "batch_first", True) else x.transpose(0, 1)

    memory = 2 * (shown + 3) + 4 if form.groups else 2 * shown + 4
    others = [memory, tokens] if form.excluded else [tokens + 9, tokens]
    angles = [random(rows, layout.head_dim // 2) for rows in (tokens, shown)]
    x = random(2, tokens, layout.width)
    for number in others:
        y = random(2, number, layout.key_width)
        if starts is not LARGE:
            factor = spread(reference, layout, x, y)
            x, y = x * factor, y * factor
        inputs: dict[str, Any] = {form.first: of_batch(x), form.keys: of_batch(y), form.values: of_batch(y)}
        if form.calls:
            inputs[form.rotation] = _positions(form, 2, tokens, 2, layout.head_dim, device)
            inputs[form.rotation_k] = _positions(form, 2, number, 2, layout.head_dim, device)
        elif form.rotation and not form.own_table:
            inputs[form.rotation] = _rotation(angles[0], form.tables, pairing)
            if form.rotation_k:
                inputs[form.rotation_k] = _rotation(angles[1], form.tables, pairing)
        if form.excluded in parameters:
            inputs[form.excluded] = 4 if number == memory else 0
        if form.groups:
            inputs[form.groups] = 2 if number == memory else 1
        yield {**inputs, **_options(reference, form)}
    if layout.width == layout.key_width and not form.excluded and not form.calls:
        yield self_attention(reference, form, x)


def self_attention(module: nn.Module, form: ForwardForm, x: Tensor) -> dict[str, Any]:
    """Return the arguments of a call on the tokens x (B, N, C) alone, without a rotation."""
    x = x if getattr(module, "batch_first", True) else x.transpose(0, 1)
    return {name: x for name in (form.first, form.keys, form.values) if name} | _options(module, form)


def _options(module: nn.Module, form: ForwardForm) -> dict[str, Any]:
    """Return arguments that fused calls have: torch's returns weights by default."""
    return {"need_weights": False} if "need_weights" in signature(type(module).forward).parameters else {}


def _positions(form: ForwardForm, batch: int, tokens: int, axes: int, dim: int, device: torch.device) -> Any:
    """Return what a callable of this form rotates by."""
    generator = torch.Generator().manual_seed(tokens)
    if form.places:
        return None
    if form.positions == "grid":
        return GRID
    if form.positions == "angles":  # each twice
        angles = torch.randn(batch, tokens, dim // 2, generator=generator, dtype=torch.float64, device="cpu")
        return torch.cat([angles, angles], dim=-1).to(device)
    found = torch.randint(0, 30, (batch, tokens, axes), generator=generator, device="cpu")
    found[:, :PREFIX] = 0  # tokens without a place
    return found.to(device)


def spread(reference: nn.Module, layout: Layout, x: Tensor, keys: Tensor | None = None) -> float:
    """Return a factor for x (and keys) that gives the logits a spread of 2: with logits near zero every attention is
    uniform and every rotation looks right. q kᵀ grows with the square of x."""
    try:
        q, k, _ = project(reference, layout, x, keys)
    except Exception:  # then the original forward fails too, and reports it
        return 1.0
    k = k.repeat_interleave(layout.heads // layout.kv_heads, dim=-2)
    pairs = q * k if keys is None else q * k[:, : q.shape[1]] if k.shape[1] >= q.shape[1] else q[:, : k.shape[1]] * k
    deviation = float(pairs.sum(-1).std()) * scale_of(reference, layout)
    return min(max((2 / deviation) ** 0.5, 1e-3), 1e3) if math.isfinite(deviation) and deviation > 0 else 1.0


def _rotation(angles: Tensor, tables: str, pairing: str) -> Any:
    """Return (..., N, D/2) angles in one of the formats of ``TABLES``."""
    if tables == "complex":
        return torch.polar(torch.ones_like(angles), angles)
    if tables == "angles":
        return angles
    angles = join_pairs(angles, angles, pairing)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([sin, cos], dim=-1) if tables == "sin_cos_cat" else (cos, sin)


def negated(inputs: dict[str, Any], form: ForwardForm) -> dict[str, Any]:
    """Return the inputs with every angle negated; where they are positions, with those of other tokens."""
    if form.calls:
        names = [name for name in (form.rotation, form.rotation_k) if name]
        flipped = {name: inputs[name].flip(1) for name in names if isinstance(inputs[name], Tensor)}
        return {**inputs, **flipped, **({form.rotation: GRID[::-1]} if form.positions == "grid" else {})}
    value = inputs.get(form.rotation)
    if isinstance(value, tuple):
        value = (value[0], -value[1])
    elif isinstance(value, Tensor) and value.is_complex():
        value = value.conj().resolve_conj()
    elif isinstance(value, Tensor) and form.tables == "angles":
        value = -value
    elif isinstance(value, Tensor):
        sin, cos = value.chunk(2, dim=-1)
        value = torch.cat([-sin, cos], dim=-1)
    return inputs if value is None else {**inputs, form.rotation: value}


def cast(inputs: dict[str, Any], dtype: torch.dtype, form: ForwardForm) -> dict[str, Any]:
    """Cast to the module's dtype; a float32 table stays float32, and one tensor in two arguments is one afterwards."""
    tokens = {id(inputs[name]): inputs[name].to(dtype) for name in (form.first, form.keys, form.values) if name}
    found = {name: tokens.get(id(value), value) for name, value in inputs.items()}
    for name in (form.rotation, form.rotation_k):
        value = inputs.get(name)
        if isinstance(value, tuple) and isinstance(value[0], Tensor):
            wide = dtype != torch.float64 and value[0].dtype == torch.float32
            found[name] = value if wide else tuple(t.to(dtype) for t in value)
        elif isinstance(value, Tensor) and value.is_complex():
            found[name] = value if dtype == torch.float64 else value.to(torch.complex64)
        elif isinstance(value, Tensor) and value.is_floating_point():
            found[name] = value.to(dtype)
    return found


def own_inputs(inputs: dict[str, Any], dtype: torch.dtype, form: ForwardForm) -> dict[str, Any]:
    """Return the inputs of the original forward, which takes packed images as a mask."""
    own = cast(inputs, dtype, form)
    if "cu_seq_lens_q" in own:
        bounds = own.pop("cu_seq_lens_q")
        image = torch.searchsorted(bounds, torch.arange(own[form.first].shape[-2], device=bounds.device), right=True)
        mask = torch.zeros(len(image), len(image), dtype=dtype, device=image.device)
        own["attention_mask"] = mask.masked_fill_(image[:, None] != image, torch.finfo(dtype).min)[None, None]
    return own
