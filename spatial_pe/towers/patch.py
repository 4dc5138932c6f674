# SPDX-License-Identifier: Apache-2.0
"""patch, unpatch, inspect: compute the attention of vision towers by ``rope_attention``, in place and reversibly."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..backends.base import AttentionCall
from ..ops.select import check_backend, select
from ..rotary import PAIRINGS
from .classes import Swapped
from .config_entry import MARK, forget, marking, remember
from .discover import Candidate, Embedding, Skipped, discover, discover_embeddings
from .equivalence import Proof, costs, floating_weight, prove, prove_added
from .forms import NO_GRID, OWN, Known, tested
from .fused_attention import Binding, FusedAttention
from .grid_hooks import grid_source
from .layout import Layout, scale_of
from .legacy import warn_of_legacy
from .options import PatchOptions, check_encoding
from .patch_embedding import product_errors
from .report import PatchedRow, PatchReport, SkippedRow
from .saved_encodings import Lost, added_encodings, fill, lost_encodings
from .swap import remove_hooks, restore, swap, swap_embedding, swap_tower

ABSOLUTE = re.compile(r"(^|\.)((mid_)?position_embeddings?|positional_embedding|pos_embed(ding)?(_[yx])?)(\.weight)?$")

# parameters that are tokens before the patches
OTHER_TOKENS = {
    "cls_token",
    "class_token",
    "class_embedding",
    "distillation_token",
    "register_tokens",
    "reg_token",
    "dist_token",
}


def patch(
    model: nn.Module,
    *,
    rope: str | nn.Module | None = None,
    start: str = "identity",
    keep_absolute: bool = True,
    legacy: str | None = None,
    backend: str = "auto",
    verify: bool = True,
    patch_embed: bool = True,
) -> PatchReport:
    """Compute the attention of a model's vision towers by ``rope_attention``, in place.

    Without ``rope`` nothing that the model computes changes: towers with RoPE keep theirs, with the rotation fused into
    the attention; towers without get plain attention. With ``rope``, towers that have no RoPE get one.

    The class of each attention module is replaced by a subclass; parameters, state dict keys, hooks and isinstance
    stay, and the model can be copied, pickled, trained and saved as before (``from_pretrained`` loads what was saved).
    Attention outside of a vision tower (CLIP's text model) is not touched. A call that the fused op does not support
    (attention weights requested, masks that are not padding, dropout in training) falls back to the module's original
    forward, with one warning. Padding is supported where the tower drops what attention returns for it, which is then
    0. Tables that do not match the verified pairing are noticed in a module's first call, which then falls back. If
    that call is traced (torch.compile, export) they cannot be read, and the output is NaN: call a tower that is not
    part of the tests once before.

    Args:
        model: a model that holds a vision tower, or the tower. Attention that takes positions, or other tokens with a
            rotation of their own (CroCo's and DUSt3R's decoders, SAM 2's memory), is found outside of one too.
        rope: "axial", "mixed", or a module that maps a PatchGrid to a Rotary, of which each layer gets a copy (its own
            parameters; a module without parameters is shared). Registered as ``rope`` on each attention module, so its
            parameters are in ``model.parameters()`` and in the state dict. CLS and register tokens are not rotated.
        start: "identity": the patched model starts as the same function, and learns to rotate: "axial" has a learnable
            strength that starts at 0, "mixed" frequencies that start at 0; a module given as ``rope`` must be the
            identity. cos is then 1 and sin 0, and the outputs are those of ``patch(model)`` on the same backend: bit
            for bit if it sums the channels in one order with and without RoPE (composed, reference), else to a
            rounding (the cpu kernels order them by pairs, which depends on pairing and dtype).
            "full": "axial" is fixed, without parameters, "mixed" starts from random frequencies.
        keep_absolute: False sets the learned absolute position embedding to zero and freezes it, until ``unpatch``.
        legacy: "2601.09954" adds, instead of ``rope``, what the public code of that paper computes, which is not a
            rotation (see ``towers/legacy.py``), and drops the absolute position embedding as it does. It warns.
        backend: see ``rope_attention``.
        patch_embed: compute patch embeddings whose input is already cut (Qwen-VL's Conv3d) as the matrix product that
            they are, equal to rounding; any other input is left to the convolution.
        verify: verify each kind of module before anything is changed, see ``towers/equivalence.py``. Without it
            only classes that are part of this package's tests are patched.

    Returns:
        PatchReport. Modules that are already patched in the same way are reported as skipped. A model that was saved
        with the same encoding, and loaded by transformers alone, which leaves it out, gets its saved weights back.

    Raises:
        ValueError: nothing can be patched (says what was found), a wrong argument, or the model is already patched, or
            was saved patched, in another way: ``unpatch`` it first.
        RuntimeError: a module computes something else when patched; nothing was changed.
    """
    options = PatchOptions(rope, start, keep_absolute, legacy)
    options.check()
    _check_model(model)
    saved = _to_restore(model, options)
    report = apply(model, options, backend, verify, patch_embed)
    for lost, tensors in saved:
        try:
            fill(added_encodings(lost.tower), tensors, lost.path)
        except BaseException:
            unpatch(model)
            lost.remember()
            raise
        report.notes.append(f"the weights of the added RoPE are those in {lost.path}")
    if legacy is not None:
        warn_of_legacy()
    return report


def unpatch(model: nn.Module) -> None:
    """Undo ``patch`` bit for bit: original classes, no hooks, no added encodings, the absolute position embedding back.

    Weights trained in between are kept. A model that is not patched is unchanged.
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
                if not parameter.is_meta and not parameter.any():  # else a checkpoint was loaded since
                    parameter.copy_(value)
            parameter.requires_grad_(requires_grad)


def inspect(model: nn.Module, *, backend: str = "auto", verify: bool = True) -> PatchReport:
    """Return the report of ``patch(model)``, verification included, without changing anything.

    The report also counts the kernels that a layer launches and the memory that it needs (the tensors that it allocates
    and that are alive at once), before and after, on 960 tokens: one image, or 15 windows of 64 where the tower packs.
    """
    check_backend(backend)
    patching = _Patching(PatchOptions(), backend, verify)
    candidates, skipped = patching.examine(model)
    report = patching.report(candidates, skipped)
    report.embeddings.extend(map(_embedding_row, _embeddings(model, candidates)))
    report.notes.extend(str(lost) for lost in lost_encodings(model) if lost.tensors() != {})
    counted: dict[tuple, tuple | None] = {}
    for i, candidate in enumerate(candidates):
        proof = candidate.proof
        if proof is None or proof.failure or proof.error is None:  # only verified modules can be run
            continue
        kind = (type(candidate.module), candidate.layout, candidate.packs_images)
        if kind not in counted:
            binding = patching.binding(candidate)
            counted[kind] = costs(candidate.module, binding, candidate.packs_images, proof.example)
        if (found := counted[kind]) is not None:
            report.patched[i] = report.patched[i]._replace(own_cost=found[0], cost=found[1])
    return report


def apply(model: nn.Module, options: PatchOptions, backend: str, verify: bool, patch_embed: bool = True) -> PatchReport:
    """Run ``patch`` with options that may come from a config.json."""
    options.check()
    check_backend(backend)
    patching = _Patching(options, backend, verify)
    candidates, skipped = patching.examine(model)
    patching.check_repeated(skipped)
    report = patching.report(candidates, skipped)
    if not candidates:
        if any(isinstance(s.module, FusedAttention) for s in skipped):
            return report
        raise ValueError(f"nothing to patch in {type(model).__name__}: {_summary(skipped)}")
    embeddings = _embeddings(model, candidates) if patch_embed else []
    report.embeddings.extend(map(_embedding_row, embeddings))
    if options.adds:
        patching.add_rope(candidates)
        report._attention.update({c.name: c.module for c in candidates})
    else:
        patching.swap_all(candidates)
    for embedding in embeddings:
        swap_embedding(embedding.module)
    for name in {c.tower_name for c in candidates}:
        remember(model, name, options, backend, patch_embed)
    return report


def _embeddings(model: nn.Module, candidates: list[Candidate]) -> list[Embedding]:
    return discover_embeddings(model, {c.tower_name: c.tower for c in candidates})


def _embedding_row(embedding: Embedding) -> PatchedRow:
    """Return the row of the report, and raise if the product is not the convolution."""
    module = embedding.module
    found = product_errors(module)
    eps = torch.finfo(floating_weight(module).dtype).eps
    if not isinstance(found, str) and not found[0] <= 1.5 * found[1] + 4 * eps:
        raise RuntimeError(
            f"{embedding.name} computes something else as a matrix product: relative error {found[0]:.2g}, as a "
            f"convolution {found[1]:.2g}. Nothing was changed; please report this with the model's configuration."
        )
    tower = f"{embedding.tower_name or 'model'} ({type(embedding.tower).__name__})"
    error, own_error = (None, None) if isinstance(found, str) else found
    note = found if isinstance(found, str) else ""
    return PatchedRow(
        embedding.name, tower, type(module).__name__, "patch embedding", "product", error, own_error, note
    )


def _to_restore(model: nn.Module, options: PatchOptions) -> list[tuple[Lost, dict[str, Tensor]]]:
    """Return the saved weights of the encodings that these options add again. Raise if others were saved, or if theirs
    cannot be found: a trained encoding would start again from 0."""
    found = []
    for lost in lost_encodings(model):
        tensors = lost.tensors()
        if tensors and lost.is_of(options):
            found.append((lost, tensors))
        elif tensors != {}:  # a config that is shared with a patched model, or was copied from it, has lost nothing
            raise ValueError(str(lost))
    return found


@dataclass(frozen=True)
class _Patching:
    """One call of ``patch`` or ``inspect``: the modules that it patches, their changes, and the report."""

    options: PatchOptions
    backend: str
    verify: bool

    # -------------------------------------------------------------------------------------------------------- examine

    def examine(self, model: nn.Module) -> tuple[list[Candidate], list[Skipped]]:
        """Discover, and verify one module of each kind. Raise if a tested class computes something else."""
        _check_model(model)
        candidates: list[Candidate] = []
        skipped: list[Skipped] = []
        by_kind: dict[tuple, Proof] = {}
        for found in discover(model):
            judged = self._judge(found, by_kind) if isinstance(found, Candidate) else found
            if isinstance(judged, Candidate):
                candidates.append(judged)
            else:
                skipped.append(judged)
        return candidates, skipped

    def _judge(self, candidate: Candidate, by_kind: dict[tuple, Proof]) -> Candidate | Skipped:
        """Return the candidate with its proof, or why it is skipped."""
        module, layout = candidate.module, candidate.layout
        known = tested(type(module))
        if self.options.adds and (reason := _no_added_rope(candidate)) is not None:
            return candidate.skipped(reason)
        if not self.verify:
            if known is None:
                return candidate.skipped("its class is not part of the tests: needs verify=True")
            return replace(candidate, proof=_trusted(candidate, known))
        weight = floating_weight(module)
        # modules of a tested class differ only in their layout; of an unknown class, each one is verified
        which = None if known else candidate.name
        pairings = _pairings(candidate, known)
        kind = (type(module), layout, candidate.packs_images, pairings, weight.dtype, weight.device.type, which)
        if kind not in by_kind:
            by_kind[kind] = prove(module, candidate.form, layout, self.backend, candidate.packs_images, pairings)
        proof = by_kind[kind]
        if proof.failure is None:
            return replace(candidate, proof=proof)
        if known and not proof.ran:
            return replace(candidate, proof=replace(_trusted(candidate, known), failure=proof.failure, ran=False))
        if known:
            raise RuntimeError(
                f"{candidate.name} ({type(module).__name__}) computes something else when patched: {proof.failure}. "
                "Nothing was changed; please report this with the model's configuration."
            )
        return candidate.skipped(f"it has the form of {candidate.form.name} attention, but {proof.failure}")

    def check_repeated(self, skipped: list[Skipped]) -> None:
        """Raise if a module is already patched in another way."""
        for found in skipped:
            if isinstance(found.module, FusedAttention):
                bound = found.module._spatial_pe
                if (bound.options, bound.backend) != (self.options, self.backend):
                    raise ValueError(
                        f"{found.name} is already patched with {bound.options}, backend={bound.backend}, now asked for "
                        f"{self.options}, backend={self.backend}: call unpatch(model) first"
                    )

    # ---------------------------------------------------------------------------------------------------------- apply

    def binding(self, candidate: Candidate) -> Binding:
        proof = candidate.proof or Proof()
        known = tested(type(candidate.module))
        return Binding(
            candidate.layout,
            candidate.form,
            proof.pairing,
            proof.returns,
            self.backend,
            proof.masks,
            pads=known is not None and known.pads and candidate.pads,
            optional=proof.optional,
            options=self.options,
        )

    def swap_all(self, candidates: list[Candidate]) -> None:
        for candidate in candidates:
            swap(candidate.module, self.binding(candidate))
        for tower in {id(c.tower): c.tower for c in candidates if c.packs_images}.values():
            swap_tower(tower)

    def add_rope(self, candidates: list[Candidate]) -> None:
        towers: dict[int, list[Candidate]] = {}
        for candidate in candidates:
            towers.setdefault(id(candidate.tower), []).append(candidate)
        # everything that can raise (e.g. out of memory) comes first
        additions = [_Addition(members, self) for members in towers.values()]
        try:
            for addition in additions:
                addition.apply()
        except BaseException:
            for addition in additions:
                unpatch(addition.tower)
            raise

    # --------------------------------------------------------------------------------------------------------- report

    def report(self, candidates: list[Candidate], skipped: list[Skipped]) -> PatchReport:
        report = PatchReport()
        own = {type(c.module).__name__ for c in candidates if c.rotates and c.proof and c.proof.pairing == OWN}
        report.notes.extend(
            f"{name}: what it does to q and k is not a rotation of pairs (spatial_pe.verify_rotary says how it "
            "differs). It is applied as it is, by the module's own function; the attention alone is fused"
            for name in sorted(own)
        )
        report.skipped.extend(SkippedRow(s.name, s.reason, type(s.module).__name__) for s in skipped)
        report.patched.extend(map(self._row, candidates))
        return report

    def _row(self, candidate: Candidate) -> PatchedRow:
        module, proof = candidate.module, candidate.proof or Proof()
        packed = ", packed" if candidate.form.bounds else ""
        own = f"own RoPE{packed} ({proof.pairing})" if candidate.rotates else f"no RoPE{packed}"
        if candidate.rotates and proof.pairing == OWN:
            own = f"own encoding, no rotation{packed}"
        tower = f"{candidate.tower_name or 'model'} ({type(candidate.tower).__name__})"
        selected = _selected_backend(module, candidate.layout, self.backend)
        note = proof.failure or ""
        errors = (None, None) if note else (proof.error, proof.own_error)
        convention = self.options.name if self.options.adds else own
        return PatchedRow(candidate.name, tower, type(module).__name__, convention, selected, *errors, note)


# ------------------------------------------------------------------------------------------------------------ examine


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _no_added_rope(candidate: Candidate) -> str | None:
    """Return why this module gets no RoPE, or None."""
    if candidate.rotates:
        return "has RoPE already"
    if candidate.form.bounds:
        return "its images are packed, and the grid of each is unknown"
    if hasattr(candidate.module, "rope"):
        return "has an attribute rope"
    return NO_GRID.get(type(candidate.module).__name__)


def _trusted(candidate: Candidate, known: Known) -> Proof:
    """Return the proof of a tested module, without verification."""
    pairing = _pairings(candidate, known)[0]
    return Proof(pairing=pairing, returns=known.returns or candidate.form.returns, masks=known.pads, ran=False)


def _pairings(candidate: Candidate, known: Known | None) -> tuple[str, ...]:
    """Return the pairings that the module may use."""
    if not candidate.form.rotation or (candidate.form.calls and not candidate.rotates):
        return ("half",)
    says = getattr(candidate.module, "rotate_half", None)  # timm's
    if isinstance(says, bool):
        return ("half",) if says else ("interleaved",)
    if known is not None:
        return (known.pairing,)
    pairings = tuple(p for p in PAIRINGS if p != "axis_half" or candidate.layout.head_dim % 4 == 0)
    return (*pairings, OWN) if candidate.form.calls else pairings


def _summary(skipped: list[Skipped]) -> str:
    if not skipped:
        return "it has no attention modules"
    counts = Counter((type(s.module).__name__, s.reason) for s in skipped)
    return "; ".join(f"{count} {name}: {reason}" for (name, reason), count in counts.items())


def _selected_backend(module: nn.Module, layout: Layout, backend: str) -> str:
    """Return the backend for a call of one sample in the module's dtype and on its device, if known."""
    weight = floating_weight(module)
    if weight.is_meta:
        return backend

    def empty(heads: int) -> Tensor:
        return torch.empty(1, 1, heads, layout.head_dim, dtype=weight.dtype, device=weight.device)

    keys = empty(layout.kv_heads)
    call = AttentionCall(empty(layout.heads), keys, keys, None, scale_of(module, layout), None, None, None)
    return select(call, backend)


# ------------------------------------------------------------------------------------------------------ an added RoPE


class _Addition:
    """Changes to one tower, prepared and not yet applied."""

    def __init__(self, members: list[Candidate], patching: _Patching) -> None:
        options = patching.options
        self.tower = members[0].tower
        self.modules = [c.module for c in members]
        self.hook_up = grid_source(self.tower)
        self.bindings = [patching.binding(c) for c in members]
        self.verify = patching.verify
        self.encodings: list[nn.Module] = []
        for candidate in members:
            device = floating_weight(candidate.module).device
            # weights that are elsewhere for now (accelerate's offloading) do not show the device of the tokens
            device = torch.device("cpu") if device.type == "meta" else device
            with torch.device("cpu"):  # whatever the default device is: the weights say where it belongs
                encoding = options.encoding(candidate.layout).to(device).train(candidate.module.training)
                check_encoding(encoding, candidate.layout)
                options.check_start()
            self.encodings.append(encoding)
        if not self.encodings[0].state_dict() and not list(self.encodings[0].parameters()):
            self.encodings = [self.encodings[0]] * len(members)
        self.marks = [marking(floating_weight(module).device) for module in self.modules]
        absolute = {} if options.keeps_absolute else _absolute(self.tower)
        self.absolute = {name: (p.detach().clone(), p.requires_grad) for name, p in absolute.items()}

    def apply(self) -> None:
        grids = self.hook_up(self.modules)
        around = _other_tokens(self.tower)
        proven = set()
        for module, binding, encoding, mark in zip(
            self.modules, self.bindings, self.encodings, self.marks, strict=True
        ):
            binding.grids, (binding.prefix, binding.suffix) = grids, around
            kind = (type(module), binding.layout, floating_weight(module).dtype)
            if self.verify and kind not in proven:
                prove_added(module, encoding, binding)
                proven.add(kind)
            swap(module, binding)
            module.rope = encoding
            module.register_buffer(MARK, mark)
        if self.absolute:
            self.tower.__dict__["_spatial_pe_absolute"] = self.absolute
            for name in self.absolute:
                self.tower.get_parameter(name).requires_grad_(False).zero_()


def _other_tokens(tower: nn.Module) -> tuple[int, int]:
    """Return the number of tokens before the patches (CLS, distillation, registers) and after (YOLOS's detections)."""
    before = after = 0
    for name, parameter in tower.named_parameters():
        holder, _, last = name.rpartition(".")
        if holder.rpartition(".")[2] == "head":  # AIMv2's pooling
            continue
        if last in OTHER_TOKENS:
            before += parameter.shape[1] if parameter.ndim == 3 else 1
        elif last == "detection_tokens":
            after += parameter.shape[1]
    return before, after


def _absolute(tower: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in tower.named_parameters() if ABSOLUTE.search(name)}
    if not found:
        raise ValueError(f"keep_absolute=False: {type(tower).__name__} has no absolute position embedding")
    return found
