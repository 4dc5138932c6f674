# SPDX-License-Identifier: Apache-2.0
"""patch, unpatch, inspect: attention of a vision tower computed by ``rope_attention``, in place and reversible."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.call import Call
from ..backends.select import select
from ..encodings import AxialRoPE, MixedRoPE
from ..grid import PatchGrid
from .adapters import TESTED, Adapter, Binding
from .discover import Found, discover, is_patch_convolution
from .grids import GridRecorder, PackImages, add_hooks, remove_hooks
from .layout import Layout
from .report import PatchedRow, PatchReport, SkippedRow
from .swap import restore, swap
from .verify import Proof, prove

ABSOLUTE = re.compile(r"(^|\.)(position_embeddings?|pos_embed)(\.weight)?$")


def patch(
    model: nn.Module,
    *,
    rope: str | nn.Module | None = None,
    start: str = "identity",
    keep_absolute: bool = True,
    backend: str = "auto",
    verify: bool = True,
) -> PatchReport:
    """Let ``rope_attention`` compute the attention of a model's vision towers, in place.

    Without ``rope`` nothing that the model computes changes: towers with RoPE keep theirs, with the rotation fused into
    the attention; towers without get plain attention. With ``rope``, towers that have no RoPE get one.

    The class of each attention module is replaced by a subclass; parameters, state dict keys, hooks and isinstance
    stay, and the model can be copied, pickled and trained as before. Attention outside of a vision tower (CLIP's text
    model) is not touched. A call that the fused op does not serve (attention weights asked for, masks, dropout in
    training) is computed by the module's own forward, with one warning.

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
    _check_arguments(rope, start)
    request = (rope, start, keep_absolute)
    found, proofs = _examine(model, rope, backend, verify)
    _check_repeated(found, request, backend)
    chosen = [f for f in found if f.reason is None]
    report = _report(found, proofs, backend, rope, start)
    if not chosen:
        if any(isinstance(f.module, Adapter) for f in found):
            return report
        raise ValueError(f"nothing to patch in {type(model).__name__}: {_summary(found)}")
    if rope is None:
        _swap_all(chosen, backend, request)
    else:
        _add_rope(chosen, backend, request)
        added = {id(p): p for f in chosen for p in f.module.rope.parameters()}  # type: ignore[union-attr]
        report._added.extend(added.values())
    return report


def unpatch(model: nn.Module) -> None:
    """Undo ``patch`` bit for bit: original classes, no hooks, no added encodings, the absolute position embedding back.

    Weights trained in between stay. A model that is not patched is left as it is.
    """
    for module in list(model.modules()):
        if isinstance(module, Adapter):
            restore(module)
        remove_hooks(module)
        for name, (value, requires_grad) in module.__dict__.pop("_spatial_pe_absolute", {}).items():
            parameter = module.get_parameter(name)
            with torch.no_grad():
                parameter.copy_(value)
            parameter.requires_grad_(requires_grad)


def inspect(model: nn.Module, *, backend: str = "auto", verify: bool = True) -> PatchReport:
    """What ``patch(model)`` would do, proofs included, with nothing changed."""
    found, proofs = _examine(model, None, backend, verify)
    return _report(found, proofs, backend, None, "identity")


# ------------------------------------------------------------------------------------------------------------ examine


def _examine(model: nn.Module, rope: Any, backend: str, verify: bool) -> tuple[list[Found], dict[str, Proof]]:
    """Discover, and prove one module of each kind. Raises where a class that must be right is not."""
    found: list[Found] = []
    proofs: dict[str, Proof] = {}
    by_kind: dict[tuple, Proof] = {}
    for f in discover(model):
        if f.reason is None:
            reason, proof = _judge(f, rope, backend, verify, by_kind)
            proofs[f.name] = proof
            f = f if reason is None else Found(f.name, f.module, f.tower_name, f.tower, reason=reason)
        found.append(f)
    return found, proofs


def _judge(f: Found, rope: Any, backend: str, verify: bool, by_kind: dict[tuple, Proof]) -> tuple[str | None, Proof]:
    """Why this module is skipped after all, or None; and what was proven."""
    assert f.shape is not None and f.layout is not None
    tested = type(f.module).__name__ in TESTED and type(f.module).__module__.startswith("transformers.")
    if rope is not None and f.shape.has_rope:
        return "has RoPE of its own", Proof()
    if rope is not None and hasattr(f.module, "rope"):
        return "has an attribute rope", Proof()
    if not verify:
        return (None if tested else "its class is not part of the tests: needs verify=True"), Proof()
    weight = next(f.module.parameters())
    # modules of a tested class differ only in what the layout says; of an unknown class, each one is asked
    which = None if tested else f.name
    kind = (type(f.module), f.layout, f.packs_images, weight.dtype, weight.device.type, which)
    if kind not in by_kind:
        by_kind[kind] = prove(f.module, f.shape, Binding(f.layout, backend), f.packs_images)
    proof = by_kind[kind]
    if proof.failure is None or (tested and not proof.ran):
        return None, proof
    if tested:
        raise RuntimeError(
            f"{f.name} ({type(f.module).__name__}) computes something else when patched: {proof.failure}. "
            "Nothing was changed; please report this with the model's configuration."
        )
    return f"it has the form of {f.shape.name} attention, but {proof.failure}", proof


def _check_arguments(rope: Any, start: str) -> None:
    if not (rope in (None, "axial", "mixed") if rope is None or isinstance(rope, str) else isinstance(rope, nn.Module)):
        raise ValueError(f'rope must be "axial", "mixed", a module or None, got {rope!r}')
    if start not in ("identity", "full"):
        raise ValueError(f'start must be "identity" or "full", got {start!r}')
    if isinstance(rope, nn.Module) and start == "identity":
        table = rope(PatchGrid(3, 5))
        if not bool((table.cos == 1).all() and (table.sin == 0).all()):
            raise ValueError(
                f'start="identity" needs a rope that rotates by nothing at first, but {type(rope).__name__} rotates: '
                'build it with strength=0.0 or init="identity", or pass start="full"'
            )


def _check_repeated(found: list[Found], request: tuple, backend: str) -> None:
    for f in found:
        if isinstance(f.module, Adapter):
            bound = f.module._spatial_pe
            if (bound.request, bound.backend) != (request, backend):
                raise ValueError(
                    f"{f.name} is already patched with {_words(bound.request, bound.backend)}, now asked for "
                    f"{_words(request, backend)}: call unpatch(model) first"
                )


def _words(request: tuple, backend: str) -> str:
    rope, start, keep_absolute = request
    name = type(rope).__name__ if isinstance(rope, nn.Module) else rope
    return f"rope={name}, start={start}, keep_absolute={keep_absolute}, backend={backend}"


def _summary(found: list[Found]) -> str:
    if not found:
        return "it has no attention modules"
    counts = Counter((type(f.module).__name__, f.reason) for f in found)
    return "; ".join(f"{count} {name}: {reason}" for (name, reason), count in counts.items())


# -------------------------------------------------------------------------------------------------------------- apply


def _swap_all(chosen: list[Found], backend: str, request: tuple) -> None:
    packing = {id(f.tower): f.tower for f in chosen if f.packs_images}
    for f in chosen:
        swap(f.module, f.shape.adapter, Binding(f.layout, backend, request=request))  # type: ignore[union-attr, arg-type]
    for tower in packing.values():
        assert tower is not None
        add_hooks(tower, PackImages())


def _add_rope(chosen: list[Found], backend: str, request: tuple) -> None:
    rope, start, keep_absolute = request
    towers: dict[int, list[Found]] = {}
    for f in chosen:
        towers.setdefault(id(f.tower), []).append(f)
    # all that can raise comes first
    plans = []
    for members in towers.values():
        tower = members[0].tower
        assert tower is not None
        convolution, absolute = _patch_convolution(tower), {} if keep_absolute else _absolute(tower)
        encodings = [_encoding(rope, start, f.layout) for f in members]  # type: ignore[arg-type]
        plans.append((tower, members, convolution, absolute, encodings))
    for tower, members, convolution, absolute, encodings in plans:
        recorder, prefix = GridRecorder(), _prefix_tokens(tower)
        convolution.register_forward_hook(recorder)
        shared = encodings[0] if not encodings[0].state_dict() and not list(encodings[0].parameters()) else None
        for f, encoding in zip(members, encodings, strict=True):
            weight = next(f.module.parameters())
            binding = Binding(f.layout, backend, recorder, prefix, request)  # type: ignore[arg-type]
            swap(f.module, f.shape.adapter, binding)  # type: ignore[union-attr]
            f.module.rope = (shared or encoding).to(weight.device).train(f.module.training)
        if absolute:
            tower.__dict__["_spatial_pe_absolute"] = saved = {}
            for name, parameter in absolute.items():
                saved[name] = (parameter.detach().clone(), parameter.requires_grad)
                parameter.requires_grad_(False).zero_()


def _encoding(rope: str | nn.Module, start: str, layout: Layout) -> nn.Module:
    if isinstance(rope, nn.Module):
        return copy.deepcopy(rope)
    if rope == "axial":
        return AxialRoPE(layout.head_dim, strength=0.0 if start == "identity" else None)
    return MixedRoPE(layout.head_dim, layout.heads, init="identity" if start == "identity" else "random")


def _patch_convolution(tower: nn.Module) -> nn.Conv2d:
    found = [m for m in tower.modules() if is_patch_convolution(m) and isinstance(m, nn.Conv2d)]
    if len(found) != 1:
        raise ValueError(
            f"cannot add RoPE to {type(tower).__name__}: it has {len(found)} convolutions over disjoint patches, the "
            "grid is read from exactly one"
        )
    return found[0]


def _prefix_tokens(tower: nn.Module) -> int:
    """CLS, distillation and register tokens, which come before the patches."""
    count = 0
    for name, parameter in tower.named_parameters():
        last = name.rpartition(".")[2]
        if last in ("cls_token", "class_embedding", "distillation_token"):
            count += 1
        elif last == "register_tokens":
            count += parameter.shape[1]
    return count


def _absolute(tower: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in tower.named_parameters() if ABSOLUTE.search(name)}
    if not found:
        raise ValueError(f"keep_absolute=False: {type(tower).__name__} has no absolute position embedding")
    return found


# ------------------------------------------------------------------------------------------------------------- report


def _report(found: list[Found], proofs: dict[str, Proof], backend: str, rope: Any, start: str) -> PatchReport:
    report = PatchReport()
    for f in found:
        attention = type(f.module).__name__
        if f.reason is not None:
            report.skipped.append(SkippedRow(f.name, f.reason, attention))
            continue
        assert f.shape is not None and f.layout is not None
        proof = proofs[f.name]
        name = rope if isinstance(rope, str) else type(rope).__name__
        convention = f.shape.convention if rope is None else f"{name} RoPE added, start={start}"
        tower = f"{f.tower_name or 'model'} ({type(f.tower).__name__})"
        serves = _serving_backend(f.module, f.layout, backend)
        note = proof.failure or ""
        errors = (None, None) if note else (proof.error, proof.own_error)
        report.patched.append(PatchedRow(f.name, tower, attention, convention, serves, *errors, note))
    return report


def _serving_backend(module: nn.Module, layout: Layout, backend: str) -> str:
    """Who serves a call of one sample in the module's dtype and on its device, if that is known by now."""
    weight = next(module.parameters())
    if weight.is_meta:
        return backend

    def empty(heads: int) -> Tensor:
        return torch.empty(1, 1, heads, layout.head_dim, dtype=weight.dtype, device=weight.device)

    keys = empty(layout.kv_heads)
    return select(Call(empty(layout.heads), keys, keys, None, layout.scale, None, None, None), backend)
