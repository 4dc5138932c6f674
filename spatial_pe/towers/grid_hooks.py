# SPDX-License-Identifier: Apache-2.0
"""Hooks that pass the patch grid of a forward to its layers with an added RoPE.

The grid belongs to one forward of the tower and is stored where only that forward can read it:

- in the thread that runs it, from the tower's entry to its exit (``Forward``, on a stack, so that forwards may nest);
- with the activations: inputs and outputs of the modules that contain attention, and of their siblings (the norm before
  it), are tagged, in their storage, with the forward that made them. What checkpointing recomputes in backward gets
  the saved input of a block, maybe detached, maybe in another thread, after other forwards: the tag is still the right
  one, and the norm forwards it. If an input has none (it was cast or moved since), the call raises.

Hooks are objects of importable classes, so that a patched model can be copied and pickled, and are found by their class
when the model is unpatched. Compiled code reads an attribute instead, which torch.compile guards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.dispatcher import is_traced, needs_dispatcher, unrecorded
from ..encodings import AxialRoPE
from ..grid import PatchGrid
from ..rotary import Rotary


class Forward:
    """One forward of a tower: its grid, and the tables made from it.

    owner: its Grids. task: the backward in which it runs, -1 outside: a recomputation is another forward of a grid.
    matches: in a torch.jit.trace, whether the grid is the recorded one, as a bool tensor.
    """

    def __init__(self, owner: Grids, task: int, grid: Any = None) -> None:
        self.owner, self.task, self.grid = owner, task, grid
        self.tables: dict[Any, Any] = {}
        self.matches: Tensor | None = None
        self.users: set[int] = set()  # modules that have read it, if nothing marks the end of the forward

    def again(self, task: int) -> Forward:
        return Forward(self.owner, task, self.grid)


class _Stack:
    """Calls of one thread: of the tower, and of the modules inside of it, innermost last."""

    def __init__(self) -> None:
        self.calls: list[Forward] = []
        self.inside: list[Forward | None] = []
        self.loose: Forward | None = None  # of an embedding that was called without its tower (timm's forward_features)


class _Here(threading.local):
    """Stack of the current thread."""

    def __init__(self) -> None:
        self.stack = _Stack()


class Grids:
    """Provider of the patch grid of the current forward, for the layers of a tower with an added RoPE."""

    def __init__(self) -> None:
        self.compiled: Any = None  # for compiled code: the last grid, compared by its guards
        self.read_by_compiled = False
        self.running: dict[int, Forward] = {}  # by thread
        self.kept: tuple[Any, Any] | None = None
        self.local = _Here()

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: a copy belongs to another tower, and has seen no forward."""
        return {**self.__dict__, "compiled": None, "running": {}, "kept": None, "local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "running": {}, "local": _Here()})

    @property
    def here(self) -> _Stack:
        return self.local.stack

    # ------------------------------------------------------------------------------------------ what the hooks tell

    def enter(self) -> None:
        stack = self.here
        stack.calls.append(Forward(self, _task()))
        self.running[threading.get_ident()] = stack.calls[-1]

    def leave(self) -> None:
        calls = self.here.calls
        if calls:  # empty if another hook raised before ours was called
            calls.pop()
        if calls:
            self.running[threading.get_ident()] = calls[-1]
        else:
            self.running.pop(threading.get_ident(), None)

    def record(self, grid: Any, matches: Tensor | None = None) -> None:
        """Set the grid of the current forward."""
        if not torch.compiler.is_compiling():
            stack, task = self.here, _task()
            if stack.calls and stack.calls[-1].task == task:
                forward = stack.calls[-1]
            else:
                forward = stack.loose = Forward(self, task)
            forward.grid, forward.matches, forward.tables = grid, matches, {}
            if self.read_by_compiled:
                self._refuse_other_grids(grid)
        self.compiled = grid

    def _refuse_other_grids(self, grid: Any) -> None:
        me = threading.get_ident()
        for thread, forward in list(self.running.items()):
            if thread != me and isinstance(forward.grid, tuple) and forward.grid != grid:
                raise RuntimeError(
                    f"two threads run a tower with compiled layers on grids of {forward.grid} and {grid} patches at "
                    "once, which compiled code cannot tell apart: compile the whole tower, or let one thread wait"
                )

    def begin(self, module: nn.Module, x: Tensor | None) -> None:
        """Enter a module that contains attention, or is one, called with x."""
        forward = self._forward_of(module, x)
        self.here.inside.append(forward)
        if forward is not None:
            self._tag(x, forward)

    def hand_on(self, x: Tensor | None, output: Tensor | None) -> None:
        """Forward the tag from x to output, of a module beside attention."""
        if (forward := self._tagged(x)) is not None:
            self._tag(output, forward)

    def end(self, output: Tensor | None) -> None:
        inside = self.here.inside
        forward = inside.pop() if inside else None
        if forward is not None:
            self._tag(output, forward)

    # ------------------------------------------------------------------------------------------------ whose call it is

    def _forward_of(self, module: nn.Module, x: Tensor | None) -> Forward | None:
        stack, task = self.here, _task()
        if stack.inside and (outer := stack.inside[-1]) is not None and outer.task == task:
            return outer
        if (current := self._current(stack)) is not None:
            return current
        if (carried := self._tagged(x)) is not None:
            return carried if carried.task == task else carried.again(task)
        loose = stack.loose
        if loose is None or loose.task != task or id(module) in loose.users:  # the second read is another forward
            return None
        loose.users.add(id(module))
        return loose

    @staticmethod
    def _current(stack: _Stack) -> Forward | None:
        """Return the current call of the tower, unless this is a backward that began in it."""
        current = stack.calls[-1] if stack.calls else None
        return current if current is not None and current.task == _task() and current.grid is not None else None

    def _tag(self, x: Tensor | None, forward: Forward) -> None:
        if x is None or not (torch.is_grad_enabled() or x.requires_grad) or is_traced(x):
            return  # no gradient, so nothing is recomputed
        tags = x.untyped_storage().__dict__.setdefault("_spatial_pe", {})
        tags[id(self), x.storage_offset(), x.shape] = forward

    def _tagged(self, x: Tensor | None) -> Forward | None:
        if x is None or is_traced(x):
            return None
        tags = x.untyped_storage().__dict__.get("_spatial_pe", {})
        forward = tags.get((id(self), x.storage_offset(), x.shape))
        return forward if forward is not None and forward.owner is self else None

    # ------------------------------------------------------------------------------------------------------ the tables

    def where(self, grid: Any, x: Tensor, prefix: int, suffix: int) -> Any:
        """Return the argument of the encoding for tokens x (B, N, C), from a recorded grid."""
        raise NotImplementedError

    def example(self, height: int, width: int) -> Any:
        """Return the grid of one image as ``record`` gets it."""
        raise NotImplementedError

    def rotary(self, module: Any, x: Tensor, prefix: int, suffix: int = 0) -> Any:
        """Return the tables of one attention module, called with x (B, N, C), or windows of it; for an encoding without
        parameters they are computed once for all layers."""
        rope = module.rope
        if torch.compiler.is_compiling():
            self.read_by_compiled = True
            return rope(self.where(self.compiled, x, prefix, suffix)).to(x.device)
        forward = self._forward_of(module, x)
        if forward is None:
            raise RuntimeError(
                "attention with an added RoPE was called outside of a forward of its tower, or is recomputed from "
                "an input that was cast or moved since, so its patch grid is unknown. Call the tower; checkpoint whole "
                "blocks, and do not move or cast the tensors that they save"
            )
        if next(rope.parameters(), None) is not None or needs_dispatcher((x,)):
            # tensors made in a trace belong to the trace
            tables = rope(unrecorded(self.where, forward.grid, x, prefix, suffix)).to(x.device)
            return _only_there(tables, forward.matches)
        key = (id(rope), x.shape[1], x.device, x.dtype == torch.float64, torch.is_inference_mode_enabled())
        if key not in forward.tables:
            forward.tables[key] = self._made(rope, self.where(forward.grid, x, prefix, suffix), x, key)
        return forward.tables[key]

    def _made(self, rope: nn.Module, where: Any, x: Tensor, key: Any) -> Any:
        """Return the tables; those of fixed frequencies are cached for the next forward on the same grid."""
        if type(rope) is not AxialRoPE or not isinstance(where, PatchGrid) or rope.frequencies.is_inference():
            return rope(where).to(x.device)
        key = (key, where, id(rope.frequencies), rope.frequencies._version)
        kept = self.kept
        if kept is None or kept[0] != key:
            self.kept = kept = (key, rope(where).to(x.device))
        return kept[1]


def _task() -> int:
    return torch._C._current_graph_task_id()


def _only_there(tables: Any, matches: Tensor | None) -> Any:
    """Return the tables; in a torch.jit.trace NaN for another grid of as many patches, which the trace cannot check."""
    if matches is None or not isinstance(tables, Rotary):
        return tables
    cos, sin = (torch.where(matches.to(x.device), x, torch.nan) for x in (tables.cos, tables.sin))
    return Rotary._unchecked(cos, sin, tables.pairing)


class GridRecorder(Grids):
    """Forward hook on a tower's patch embedding convolution: its output (B, C, h, w) is the grid."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if not isinstance(output, Tensor):  # a node of torch.fx: the graph module records when it runs
            return
        height, width = unrecorded(_last_two, output)
        matches = None
        if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # reads of a size are recorded
            rows, columns = (torch.as_tensor(size) for size in _last_two(output))
            matches = (rows == height) & (columns == width)
        self.record((height, width), matches)

    def example(self, height: int, width: int) -> Any:
        return height, width

    def where(self, grid: Any, x: Tensor, prefix: int, suffix: int) -> Any:
        patches = x.shape[1] - prefix - suffix
        if not isinstance(grid, tuple) or grid[0] * grid[1] != patches:
            known = "{} x {}".format(*grid) if isinstance(grid, tuple) else "none"
            raise ValueError(
                f"attention got {x.shape[1]} tokens, {prefix + suffix} of them not patches, but the patch grid of this "
                f"forward is not of {patches} patches (it is {known}): RoPE needs every patch of the image, in order"
            )
        height, width = grid
        make = PatchGrid if torch.compiler.is_compiling() else _patch_grid
        return make(height, width, prefix, suffix)


class ShapesRecorder(Grids):
    """Forward pre-hook on a tower that gets the grid of each padded image as ``spatial_shapes`` (B, 2) (SigLIP 2).

    The encoding gets (row, column) coordinates (B, N, 2); tokens past an image's own get (0, 0).
    """

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position  # position of spatial_shapes among the arguments

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shapes = kwargs.get("spatial_shapes", args[self.position] if len(args) > self.position else None)
        if shapes is not None:
            # a copy: the caller may overwrite it before backward recomputes a layer
            self.record(shapes.clone() if isinstance(shapes, Tensor) else torch.tensor(shapes, device="cpu"))

    def example(self, height: int, width: int) -> Tensor:
        return torch.tensor([[height, width]], device="cpu")

    def where(self, grid: Any, x: Tensor, prefix: int, suffix: int) -> Tensor:
        batch, tokens = x.shape[0], x.shape[1]
        if grid is None or grid.shape[0] != batch:
            raise ValueError(f"attention got a batch of {batch} images, but no spatial_shapes for that many were given")
        height, width = grid.to(x.device)[:, :, None].unbind(1)
        token = torch.arange(tokens, device=x.device)
        row, column = token // width.clamp(min=1), token % width.clamp(min=1)
        inside = token < height * width
        return torch.stack([row, column], dim=-1) * inside[..., None]


class CoordinatesRecorder(GridRecorder):
    """Forward hook on the embedding of timm's NaFlexVit: it gets ``patch_coord`` (B, N, 2), the row and column of each
    patch of a padded batch, or makes patches of images and returns their grid."""

    def __call__(  # type: ignore[override]
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, Any]
    ) -> None:
        places = kwargs.get("patch_coord", args[1] if len(args) > 1 else None)
        self.record(places.clone() if places is not None else tuple(output[1]))

    def where(self, grid: Any, x: Tensor, prefix: int, suffix: int) -> Any:
        if not isinstance(grid, Tensor):
            return super().where(grid, x, prefix, suffix)
        if grid.shape[:2] != (x.shape[0], x.shape[1] - prefix - suffix):
            raise ValueError(
                f"attention got tokens {tuple(x.shape[:2])}, {prefix + suffix} of them not patches, but patch_coord is "
                f"{tuple(grid.shape)}"
            )
        return torch.nn.functional.pad(grid, (0, 0, prefix, suffix)).to(x.device)


# cached: a grid caches its coordinates
_patch_grid = lru_cache(16)(PatchGrid)


def _last_two(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]


# --------------------------------------------------------------------------------------------------------------- hooks


class Hook:
    def __init__(self, grids: Grids) -> None:
        self.grids = grids


class Enter(Hook):
    """Forward pre-hook of the tower."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.grids.enter()


class Leave(Hook):
    """Forward hook of the tower, called also when the forward raises."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.grids.leave()


class Begin(Hook):
    """Forward pre-hook of a module that holds attention."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.grids.begin(module, _first_tensor((*args, *kwargs.values())))


class End(Hook):
    """Forward hook of a module that holds attention, called also when the forward raises."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.grids.end(_first_tensor(output if isinstance(output, tuple | list) else (output,)))


class HandOn(Hook):
    """Forward hook of a module beside attention."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling() and isinstance(output, Tensor) and output.requires_grad:
            self.grids.hand_on(_first_tensor(args), output)


def _first_tensor(values: Any) -> Tensor | None:
    return next((x for x in values if isinstance(x, Tensor)), None)


def grid_source(tower: nn.Module) -> Callable[[list[nn.Module]], Grids]:
    """Return a function that registers the grid hook; raise if the tower's patch grid cannot be determined."""
    takes = {m: list(signature(type(m).forward).parameters)[1:] for m in tower.modules()}
    if "spatial_shapes" in takes[tower]:
        shapes = ShapesRecorder(takes[tower].index("spatial_shapes"))
        return lambda attention: _hooked(tower, attention, shapes, tower.register_forward_pre_hook, with_kwargs=True)
    embedding = next((m for m, names in takes.items() if "patch_coord" in names and m is not tower), None)
    if embedding is not None:
        register = embedding.register_forward_hook
        return lambda attention: _hooked(tower, attention, CoordinatesRecorder(), register, with_kwargs=True)
    found = [m for m in tower.modules() if isinstance(m, nn.Conv2d) and is_patch_convolution(m)]
    if len(found) != 1:
        raise ValueError(
            f"cannot add RoPE to {type(tower).__name__}: it has {len(found)} convolutions over disjoint patches, the "
            "grid is read from exactly one"
        )
    return lambda attention: _hooked(tower, attention, GridRecorder(), found[0].register_forward_hook)


def _hooked(tower: nn.Module, attention: list[nn.Module], recorder: Any, register: Callable, **options: Any) -> Grids:
    tower.register_forward_pre_hook(Enter(recorder))  # before that of spatial_shapes, which records
    register(recorder, **options)
    tower.register_forward_hook(Leave(recorder), always_call=True)
    # not on the attention itself: having no hooks tells it, when compiled, that its weights are not collected
    wanted = set(map(id, attention))
    holders = [m for m in tower.modules() if id(m) not in wanted and any(id(inner) in wanted for inner in m.modules())]
    held = set(map(id, holders)) | wanted
    for module in holders:
        if module is not tower:
            module.register_forward_pre_hook(Begin(recorder), with_kwargs=True)
            module.register_forward_hook(End(recorder), always_call=True)
            for beside in module.children():
                if id(beside) not in held and "norm" in type(beside).__name__.lower():
                    beside.register_forward_hook(HandOn(recorder))
    return recorder


def is_patch_convolution(module: nn.Module) -> bool:
    """Return whether the module is a convolution over disjoint patches."""
    if not isinstance(module, nn.Conv2d | nn.Conv3d):
        return False
    kernel, stride = module.kernel_size, module.stride
    return kernel == stride and max(kernel) > 1
