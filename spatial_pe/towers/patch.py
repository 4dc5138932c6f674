# SPDX-License-Identifier: Apache-2.0
"""patch, unpatch, inspect: attention of a vision tower computed by ``rope_attention``, in place and reversible."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..backends.call import Call
from ..backends.select import check_backend, select
from ..rotary import PAIRINGS
from .adapters import NO_GRID, Binding, FusedAttention, Known, tested
from .classes import Swapped
from .discover import Found, discover
from .grids import grid_source
from .hooks import remove_hooks
from .layout import Layout, scale_of
from .legacy import warn_of_legacy
from .report import PatchedRow, PatchReport, SkippedRow
from .request import Request, check_encoding
from .saved import MARK, forget, marking, remember
from .swap import restore, swap, swap_tower
from .verify import Proof, costs, floating_weight, prove

ABSOLUTE = re.compile(r"(^|\.)((mid_)?position_embeddings?|pos_embed(_[yx])?)(\.weight)?$")


def patch(
    model: nn.Module,
    *,
    rope: str | nn.Module | None = None,
    start: str = "identity",
    keep_absolute: bool = True,
    legacy: str | None = None,
    backend: str = "auto",
    verify: bool = True,
) -> PatchReport:
    """Let ``rope_attention`` compute the attention of a model's vision towers, in place.

    Without ``rope`` nothing that the model computes changes: towers with RoPE keep theirs, with the rotation fused into
    the attention; towers without get plain attention. With ``rope``, towers that have no RoPE get one.

    The class of each attention module is replaced by a subclass; parameters, state dict keys, hooks and isinstance
    stay, and the model can be copied, pickled, trained and saved as before (``from_pretrained`` loads what was saved).
    Attention outside of a vision tower (CLIP's text model) is not touched. A call that the fused op does not serve
    (attention weights asked for, masks that are not padding, dropout in training) is computed by the module's own
    forward, with one warning. Padding is served where the tower drops what attention returns for it, which is then 0.
    Tables that do not rotate the pairs that were proven are noticed in a module's first call, and left to its own
    forward. Where that call is traced (torch.compile, export) they cannot be looked at, and the output is NaN: call a
    tower that is not part of the tests once before.

    Args:
        model: a model that holds a vision tower, or the tower.
        rope: "axial", "mixed", or a module that maps a PatchGrid to a Rotary, of which each layer gets a copy (its own
            parameters; a module without parameters is shared). Registered as ``rope`` on each attention module, so its
            parameters are in ``model.parameters()`` and in the state dict. CLS and register tokens are not rotated.
        start: "identity": the model computes at first what it did, and learns to rotate: "axial" has a learnable
            strength that starts at 0, "mixed" frequencies that start at 0; a module given as ``rope`` must rotate by
            nothing. cos is then 1 and sin 0, and the outputs are those of ``patch(model)`` on the same backend: bit
            for bit if it sums the channels in one order with and without RoPE (composed, reference), else to a
            rounding (the cpu kernels order them by pairs, which depends on pairing and dtype).
            "full": "axial" is fixed, without parameters, "mixed" starts from random frequencies.
        keep_absolute: False sets the learned absolute position embedding to zero and freezes it, until ``unpatch``.
        legacy: "2601.09954" adds, in place of ``rope``, what the public code of that paper computes, which is not a
            rotation (see ``towers/legacy.py``), and drops the absolute position embedding as it does. It warns.
        backend: see ``rope_attention``.
        verify: prove each kind of module right before anything is changed, see ``towers/verify.py``. Without it only
            classes that are part of this package's tests are patched.

    Returns:
        PatchReport. Modules that are already patched in the same way are reported as skipped.

    Raises:
        ValueError: nothing can be patched (says what was found), a wrong argument, or the model is already patched in
            another way: ``unpatch`` it first.
        RuntimeError: a module computes something else when patched; nothing was changed.
    """
    request = Request(rope, start, keep_absolute, legacy)
    request.check()
    request.check_start()
    report = apply(model, request, backend, verify)
    if legacy is not None:
        warn_of_legacy()
    return report


def unpatch(model: nn.Module) -> None:
    """Undo ``patch`` bit for bit: original classes, no hooks, no added encodings, the absolute position embedding back.

    Weights trained in between stay. A model that is not patched is left as it is.
    """
    _check_model(model)
    for module in list(model.modules()):
        if isinstance(module, Swapped):
            restore(module)
        remove_hooks(module)
        forget(module)
        for name, (value, requires_grad) in module.__dict__.pop("_spatial_pe_absolute", {}).items():
            parameter = module.get_parameter(name)
            with torch.no_grad():
                if not parameter.is_meta and not parameter.any():  # else a checkpoint was loaded since: that is its own
                    parameter.copy_(value)
            parameter.requires_grad_(requires_grad)


def inspect(model: nn.Module, *, backend: str = "auto", verify: bool = True) -> PatchReport:
    """What ``patch(model)`` would do, proofs included, with nothing changed.

    The report also counts the kernels that a layer launches and the memory that it needs (the tensors that it makes
    and that are alive at once), before and after, on 960 tokens: one image, or 15 windows of 64 where the tower packs.
    """
    check_backend(backend)
    found, proofs = _examine(model, Request(), backend, verify)
    report = _report(found, proofs, backend, Request())
    counted: dict[tuple, tuple | None] = {}
    for i, row in enumerate(report.patched):
        f = next(f for f in found if f.name == row.name)
        if row.error is not None:  # proven, so it can be run
            kind = (type(f.module), f.layout, f.packs_images)
            if kind not in counted:
                proof = proofs[f.name]
                counted[kind] = costs(f.module, _binding(f, proof, backend, Request()), f.packs_images, proof.form)
            if (found_costs := counted[kind]) is not None:
                report.patched[i] = row._replace(own_cost=found_costs[0], cost=found_costs[1])
    return report


def apply(model: nn.Module, request: Request, backend: str, verify: bool) -> PatchReport:
    """patch, for a request that may come from a config.json."""
    request.check()
    check_backend(backend)
    found, proofs = _examine(model, request, backend, verify)
    _check_repeated(found, request, backend)
    chosen = [f for f in found if f.reason is None]
    report = _report(found, proofs, backend, request)
    if not chosen:
        if any(isinstance(f.module, FusedAttention) for f in found):
            return report
        raise ValueError(f"nothing to patch in {type(model).__name__}: {_summary(found)}")
    if request.adds:
        _add_rope(chosen, proofs, backend, request)
        added = {id(p): p for f in chosen for p in f.module.rope.parameters()}  # type: ignore[union-attr]
        report._added.extend(added.values())
    else:
        _swap_all(chosen, proofs, backend, request)
    for name in {f.tower_name for f in chosen}:
        remember(model, name, request, backend)
    return report


# ------------------------------------------------------------------------------------------------------------ examine


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _examine(model: nn.Module, request: Request, backend: str, verify: bool) -> tuple[list[Found], dict[str, Proof]]:
    """Discover, and prove one module of each kind. Raises where a class that must be right is not."""
    _check_model(model)
    found: list[Found] = []
    proofs: dict[str, Proof] = {}
    by_kind: dict[tuple, Proof] = {}
    for f in discover(model):
        if f.reason is None:
            reason, proof = _judge(f, request, backend, verify, by_kind)
            proofs[f.name] = proof
            f = f if reason is None else Found(f.name, f.module, f.tower_name, f.tower, reason=reason)
        found.append(f)
    return found, proofs


def _judge(
    f: Found, request: Request, backend: str, verify: bool, by_kind: dict[tuple, Proof]
) -> tuple[str | None, Proof]:
    """Why this module is skipped after all, or None; and what was proven."""
    assert f.shape is not None and f.layout is not None
    known = tested(type(f.module))
    if request.adds:
        if f.rotates:
            return "has RoPE of its own", Proof()
        if f.shape.bounds:
            return "its images are packed, and nothing tells the grid of each", Proof()
        if hasattr(f.module, "rope"):
            return "has an attribute rope", Proof()
        if type(f.module).__name__ in NO_GRID:
            return NO_GRID[type(f.module).__name__], Proof()
    if not verify:
        return (None if known else "its class is not part of the tests: needs verify=True"), _trusted(f, known)
    weight = floating_weight(f.module)
    # modules of a tested class differ only in what the layout says; of an unknown class, each one is asked
    which = None if known else f.name
    pairings = _pairings(f, known)
    kind = (type(f.module), f.layout, f.packs_images, pairings, weight.dtype, weight.device.type, which)
    if kind not in by_kind:
        by_kind[kind] = prove(f.module, f.shape, f.layout, backend, f.packs_images, pairings)
    proof = by_kind[kind]
    if proof.failure is None:
        return None, proof
    if known and not proof.ran:
        return None, replace(_trusted(f, known), failure=proof.failure, ran=False)
    if known:
        raise RuntimeError(
            f"{f.name} ({type(f.module).__name__}) computes something else when patched: {proof.failure}. "
            "Nothing was changed; please report this with the model's configuration."
        )
    return f"it has the form of {f.shape.name} attention, but {proof.failure}", proof


def _trusted(f: Found, known: Known | None) -> Proof:
    """What a Binding needs, for a module that is not verified."""
    assert f.shape is not None
    known = known or Known()
    return Proof(pairing=_pairings(f, known)[0], returns=known.returns or f.shape.returns, masks=known.pads, ran=False)


def _pairings(f: Found, known: Known | None) -> tuple[str, ...]:
    """Those that the module may use."""
    assert f.shape is not None and f.layout is not None
    if not f.shape.rotation:
        return ("half",)
    says = getattr(f.module, "rotate_half", None)  # timm
    if isinstance(says, bool):
        return ("half",) if says else ("interleaved",)
    if known is not None:
        return (known.pairing,)
    return tuple(p for p in PAIRINGS if p != "axis_half" or f.layout.head_dim % 4 == 0)


def _check_repeated(found: list[Found], request: Request, backend: str) -> None:
    for f in found:
        if isinstance(f.module, FusedAttention):
            bound = f.module._spatial_pe
            if (bound.request, bound.backend) != (request, backend):
                raise ValueError(
                    f"{f.name} is already patched with {bound.request}, backend={bound.backend}, now asked for "
                    f"{request}, backend={backend}: call unpatch(model) first"
                )


def _summary(found: list[Found]) -> str:
    if not found:
        return "it has no attention modules"
    counts = Counter((type(f.module).__name__, f.reason) for f in found)
    return "; ".join(f"{count} {name}: {reason}" for (name, reason), count in counts.items())


# -------------------------------------------------------------------------------------------------------------- apply


def _binding(f: Found, proof: Proof, backend: str, request: Request) -> Binding:
    assert f.shape is not None and f.layout is not None
    known = tested(type(f.module))
    pads = known is not None and known.pads and f.pads
    return Binding(f.layout, f.shape, proof.pairing, proof.returns, backend, proof.masks, pads, request=request)


def _swap_all(chosen: list[Found], proofs: dict[str, Proof], backend: str, request: Request) -> None:
    for f in chosen:
        swap(f.module, _binding(f, proofs[f.name], backend, request))
    for tower in {id(f.tower): f.tower for f in chosen if f.packs_images}.values():
        assert tower is not None
        swap_tower(tower)


def _add_rope(chosen: list[Found], proofs: dict[str, Proof], backend: str, request: Request) -> None:
    towers: dict[int, list[Found]] = {}
    for f in chosen:
        towers.setdefault(id(f.tower), []).append(f)
    # all that can raise, out of memory say, comes first
    additions = [_Addition(members, proofs, backend, request) for members in towers.values()]
    try:
        for addition in additions:
            addition.apply()
    except BaseException:
        for addition in additions:
            unpatch(addition.tower)
        raise


class _Addition:
    """All that one tower gets, ready to be put in place."""

    def __init__(self, members: list[Found], proofs: dict[str, Proof], backend: str, request: Request) -> None:
        assert members[0].tower is not None
        self.tower: nn.Module = members[0].tower
        self.modules = [f.module for f in members]
        self.hook_up = grid_source(self.tower)
        self.bindings = [_binding(f, proofs[f.name], backend, request) for f in members]
        self.encodings: list[nn.Module] = []
        for f in members:
            assert f.layout is not None
            device = floating_weight(f.module).device
            # weights that are elsewhere for now (accelerate's offloading) say nothing about where tokens will be
            device = torch.device("cpu") if device.type == "meta" else device
            with torch.device("cpu"):  # whatever the default device is: the weights say where it belongs
                encoding = request.encoding(f.layout).to(device).train(f.module.training)
                check_encoding(encoding, f.layout)
            self.encodings.append(encoding)
        if not self.encodings[0].state_dict() and not list(self.encodings[0].parameters()):
            self.encodings = [self.encodings[0]] * len(members)
        self.marks = [marking(floating_weight(module).device) for module in self.modules]
        absolute = {} if request.keeps_absolute else _absolute(self.tower)
        self.absolute = {name: (p.detach().clone(), p.requires_grad) for name, p in absolute.items()}

    def apply(self) -> None:
        grids = self.hook_up(self.modules)
        around = _other_tokens(self.tower)
        for module, binding, encoding, mark in zip(
            self.modules, self.bindings, self.encodings, self.marks, strict=True
        ):
            binding.grids, (binding.prefix, binding.suffix) = grids, around
            swap(module, binding)
            module.rope = encoding
            module.register_buffer(MARK, mark)
        if self.absolute:
            self.tower.__dict__["_spatial_pe_absolute"] = self.absolute
            for name in self.absolute:
                self.tower.get_parameter(name).requires_grad_(False).zero_()


def _other_tokens(tower: nn.Module) -> tuple[int, int]:
    """How many tokens come before the patches (CLS, distillation, registers) and after them (YOLOS's detections)."""
    before = after = 0
    for name, parameter in tower.named_parameters():
        holder, _, last = name.rpartition(".")
        if holder.rpartition(".")[2] == "head":  # AIMv2's pooling
            continue
        if last in ("cls_token", "class_embedding", "distillation_token", "register_tokens", "reg_token", "dist_token"):
            before += parameter.shape[1] if parameter.ndim == 3 else 1
        elif last == "detection_tokens":
            after += parameter.shape[1]
    return before, after


def _absolute(tower: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in tower.named_parameters() if ABSOLUTE.search(name)}
    if not found:
        raise ValueError(f"keep_absolute=False: {type(tower).__name__} has no absolute position embedding")
    return found


# ------------------------------------------------------------------------------------------------------------- report


def _report(found: list[Found], proofs: dict[str, Proof], backend: str, request: Request) -> PatchReport:
    report = PatchReport()
    for f in found:
        attention = type(f.module).__name__
        if f.reason is not None:
            report.skipped.append(SkippedRow(f.name, f.reason, attention))
            continue
        assert f.shape is not None and f.layout is not None
        proof = proofs[f.name]
        packed = ", packed" if f.shape.bounds else ""
        own = f"own RoPE{packed} ({proof.pairing})" if f.rotates else f"no RoPE{packed}"
        tower = f"{f.tower_name or 'model'} ({type(f.tower).__name__})"
        serves = _serving_backend(f.module, f.layout, backend)
        note = proof.failure or ""
        errors = (None, None) if note else (proof.error, proof.own_error)
        convention = request.name if request.adds else own
        report.patched.append(PatchedRow(f.name, tower, attention, convention, serves, *errors, note))
    return report


def _serving_backend(module: nn.Module, layout: Layout, backend: str) -> str:
    """Who serves a call of one sample in the module's dtype and on its device, if that is known by now."""
    weight = floating_weight(module)
    if weight.is_meta:
        return backend

    def empty(heads: int) -> Tensor:
        return torch.empty(1, 1, heads, layout.head_dim, dtype=weight.dtype, device=weight.device)

    keys = empty(layout.kv_heads)
    return select(Call(empty(layout.heads), keys, keys, None, scale_of(module, layout), None, None, None), backend)
