# SPDX-License-Identifier: Apache-2.0
"""Map token coordinates to rotation angles.

Every 2D RoPE made of 2 x 2 rotations is one formula; models differ only in the frequencies and the coordinates:

    angle[head, token, pair] = row[token] * f_row[head, pair] + column[token] * f_column[head, pair]

``AxialRoPE``: each pair depends on one axis, with fixed frequencies. ``MixedRoPE``: each pair depends on both,
with learned frequencies per head. ``CONVENTIONS``: the options of the published model families, as data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._utils.dispatcher import fx_node, has_values, is_traced
from .grid import PatchGrid
from .rotary import PAIRINGS, Pairing, Rotary

AxisOrder = Literal["hw", "wh"]
Layout = Literal["block", "split", "alternating"]
Frequency = Literal["inverse", "period"]
Normalize = Literal["separate", "min", "max"]

_CYCLE = 2.0 * math.pi

# Devices without float64 (some xpu have it): angles are computed in float32 there.
_WITHOUT_FLOAT64 = ("mps", "xpu")

_WIDE = (torch.float32, torch.float64)


class _Float32(nn.Module):
    """Base of the encodings: keeps parameters and buffers in float32 (or float64) in a model of any dtype.

    bfloat16 keeps 8 bits: it rounds by up to 0.4 %, which is 0.4 radians of an angle at 100 patches.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32:
        """Keep float32 through casts and moves: ``fn`` is applied to each tensor and each gradient."""
        if recurse:
            for child in self.children():  # of a subclass: cast as usual
                child._apply(fn)
        without_values = self._on_meta()
        # to_empty allocates uninitialised memory, e.g. for a tower that was patched on meta
        empties = getattr(fn, "__qualname__", "").startswith("Module.to_empty")
        super()._apply(lambda x: _uncast(x, fn(x), empties and not x.is_meta), recurse=False)
        if without_values and not self._on_meta():
            self.reset_parameters()
        return self

    def _on_meta(self) -> bool:
        return any(p is not None and p.is_meta for p in self._parameters.values())

    def reset_parameters(self) -> None:
        """Reset the parameters to their initial values."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Convert to float32 before loading: with ``assign=True`` the saved tensors replace the module's."""
        own = {name: state_dict.get(prefix + name) for name in (*self._parameters, *self._buffers)}
        wide = {prefix + name: at_least_float32(value) for name, value in own.items() if isinstance(value, Tensor)}
        super()._load_from_state_dict({**state_dict, **wide}, prefix, *args, **kwargs)

    def _exact(self, name: str) -> Tensor:
        """Return the parameter of this name; raise if something rounded it without a cast of the module."""
        value = getattr(self, name)
        if value.dtype in _WIDE:
            return value
        kind = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__).__name__
        raise TypeError(
            f"spatial_pe: {kind}.{name} is {value.dtype} in forward, and rounded values are another encoding. FSDP "
            f"hands out rounded copies under a param_dtype: call `[fully_shard(m, mp_policy=MixedPrecisionPolicy()) "
            f"for m in model.modules() if isinstance(m, spatial_pe.{kind})]` before any other fully_shard, with the "
            "same mesh; with FullyShardedDataParallel use torch.autocast instead of param_dtype. If a loader rounded "
            "the parameters, load them again in float32, or accept them with encoding.float()"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float32, float64 or not floating-point."""
    return x.detach().float() if x.is_floating_point() and x.dtype not in _WIDE else x


def _uncast(before: Tensor, after: Tensor, lost: bool = False) -> Tensor:
    """Return the result of a cast or a move, with the original values where it rounded or lost them.

    Values that were already rounded stay in half precision, so that forward still refuses them.
    """
    rounds = before.dtype in _WIDE and after.dtype not in _WIDE
    if lost:
        return before.to(after.device, copy=True)
    return before.to(after.device, torch.float32) if rounds else after


class AxialRoPE(_Float32):
    """Axial 2D RoPE: the angle of every channel pair is proportional to the row or to the column of its token.

    With rotary dim R there are R/2 pairs. Each axis has a geometric sequence of n frequencies, l[i] = theta^(-i/n) for
    i = 0 .. n-1. ``layout`` assigns the frequencies to the pairs; ``axis_order`` says which axis (h: the row, w: the
    column) comes first:

    - ``"block"``: n = R/4, pairs are [l of the first axis | l of the second] (Qwen-VL, DINOv3, EVA-02, most);
    - ``"split"``: n = R/2, one sequence, alternating: [l[0], l[2], .. of the first | l[1], l[3], .. of the second]
      (Pixtral);
    - ``"alternating"``: n = R/4, pairs are first l[0], second l[0], first l[1], second l[1], .. (MoonViT).

    Coordinates x of a patch grid are made from the patch index i = 0 .. size-1 along each axis, size being the
    image's own height or width in patches:

    - default: x = i + offset;
    - ``reference_size`` r: x = (i + offset) / size * r, the grid is stretched to the one of pretraining (EVA-02);
    - ``normalize``: x = 2 (i + 0.5) / s - 1, the patch centre, with s the size of that axis (``"separate"``), or
      the smaller (``"min"``) or larger (``"max"``) of both (DINOv3);

    and then multiplied by ``scale`` (SAM 3's global layers: window / size). Tokens with ``grid.rotated`` False get
    angle 0, whatever the offset.

    Frequencies and ``strength`` are float32 and stay so when the module is cast to half precision or loads a
    checkpoint in it; the frequencies move with ``.to(device)`` and are not in the state dict. For the families in
    ``CONVENTIONS`` they equal those of transformers, bit for bit where the head_dim is a power of two, to a relative
    2e-7 otherwise.

    Angles are computed in float64: cos and sin are within 3e-7 of the exact ones for coordinates of up to 10^8, and a
    shift of all coordinates does not change attention (5e-7 for a shift by 2^24). transformers rounds angles to
    float32, and its cos and sin differ from these by 6e-8 of the angle, 1e-6 for an image of 16 x 16 patches. The same
    holds for tables made on a device without float64 (mps, xpu): 6e-5 at 1,000 radians, 4e-3 at 65,536. Subtract a
    common offset from large coordinates before moving them to such a device.

    Args:
        head_dim: D, channels of a head.
        theta: base of the frequencies, > 0.
        rotary_dim: R, number of rotated channels, a multiple of 4, at most D (default: D).
        pairing: which channels make a pair, see ``Rotary``.
        axis_order, layout: see above.
        frequency: ``"inverse"``: l is in radians per unit of x (RoFormer); ``"period"``: in cycles per unit of x, so
            that 1/l is a period and the angle is 2 pi x l (DINOv3).
        period_range: (shortest, longest) period, log-spaced, instead of theta; needs ``frequency="period"``.
        offset: added to the patch index: 1 in Llama 4 and Perception Encoder. It cancels between two patches, not
            between a patch and a token that is not rotated.
        scale, reference_size, normalize: see above. ``reference_size`` is one size or (height, width).
        strength: if given, a learnable multiplier of the angles, one per pair, with this initial value: 0 is the
            identity, 1 the full encoding. Per pair, because the angles span four orders of magnitude: a single
            multiplier would follow the few fastest pairs. It enters linearly, so its gradient at 0 does not vanish.

    Raises:
        TypeError, ValueError: naming the argument and what it must be.

    The frequencies are RoFormer's (arXiv 2104.09864), split over two axes as in rope-vit (arXiv 2403.13298)
    and DINOv3 (arXiv 2508.10104); the options of each family are in ``CONVENTIONS``.
    """

    frequencies: Tensor  # (2, 1, R/2): of the row, of the column
    strength: nn.Parameter | None

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        *,
        rotary_dim: int | None = None,
        pairing: Pairing = "half",
        axis_order: AxisOrder = "hw",
        layout: Layout = "block",
        frequency: Frequency = "inverse",
        period_range: tuple[float, float] | None = None,
        offset: float = 0.0,
        scale: float = 1.0,
        reference_size: int | tuple[int, int] | None = None,
        normalize: Normalize | None = None,
        strength: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.rotary_dim = _check_dims(head_dim, rotary_dim)
        self.theta = _check_number("theta", theta, positive=True)
        self.pairing: Pairing = _check_choice("pairing", pairing, PAIRINGS)
        self.axis_order = _check_choice("axis_order", axis_order, ("hw", "wh"))
        self.layout = _check_choice("layout", layout, ("block", "split", "alternating"))
        self.frequency = _check_choice("frequency", frequency, ("inverse", "period"))
        self.period_range = _check_period_range(period_range, frequency)
        self.offset = _check_number("offset", offset)
        self.scale = _check_number("scale", scale)
        self.reference_size = _check_reference_size(reference_size)
        self.normalize = _check_choice("normalize", normalize, (None, "separate", "min", "max"))
        if normalize is not None and (offset or reference_size is not None):
            raise ValueError(
                f"normalize={normalize!r} maps patch centres to [-1, 1] and takes neither offset nor reference_size, "
                f"got {offset=}, {reference_size=}: use scale"
            )
        self.register_buffer("frequencies", self._make_frequencies(), persistent=False)
        self.strength = None
        if strength is not None:
            self._start = _check_number("strength", strength)
            self.strength = nn.Parameter(torch.full((self.rotary_dim // 2,), self._start, dtype=torch.float32))

    def forward(self, where: PatchGrid | Tensor) -> Rotary:
        """Return the table of a grid, or of raw coordinates.

        Args:
            where: a PatchGrid with N tokens, or (row, column) coordinates in patches, (N, 2) or (B, N, 2), float32,
                float64 or integer. Raw coordinates replace the patch index: ``offset`` and ``scale`` apply to them,
                    every token is rotated; ``reference_size`` and ``normalize`` need a grid.

        Returns:
            Rotary with tables (1, N, 1, R/2), or (B, N, 1, R/2), in float32; float64 for float64 coordinates or
            after ``.double()``. Gradients flow to ``strength`` and to raw coordinates.

        Raises:
            TypeError: ``strength`` is in half precision, set by FSDP or a loader; the message says how to fix it.
        """
        if (node := fx_node(self, where)) is not None:
            return node
        dtype = _table_dtype(where, self.frequencies)
        frequencies = self._frequencies()
        if self.strength is not None:
            frequencies = frequencies * self._exact("strength").to(frequencies.dtype)
        return _table(self._coordinates(where), frequencies, dtype, self.pairing, cycles=self.frequency == "period")

    def _frequencies(self) -> Tensor:
        """Return (2, 1, R/2) in radians or cycles per x, float64 where the device has it."""
        made = self.frequencies
        if made.dtype not in _WIDE:  # FSDP1 with a buffer_dtype sets the data of buffers
            made = self._make_frequencies().to(made.device)
        return made.to(widest(made.device))

    def _coordinates(self, where: PatchGrid | Tensor) -> Tensor:
        """Return (N, 2) or (B, N, 2) of x, float64 where the device has it."""
        device = self.frequencies.device
        wide = widest(device)
        if not isinstance(where, PatchGrid):
            for name in ("reference_size", "normalize"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs the size of the image: pass a PatchGrid, or scale the "
                        f"coordinates yourself and build the encoding without {name}"
                    )
            return (_check_coordinates(where).to(wide).to(device) + self.offset) * self.scale
        index = where.coordinates().double()
        if self.normalize is not None:
            size = where.sizes()
            if self.normalize != "separate":
                pick = torch.amin if self.normalize == "min" else torch.amax
                size = pick(size, dim=1, keepdim=True)
            x = 2.0 * ((index + 0.5) / size) - 1.0
        elif self.reference_size is not None:
            x = (index + self.offset) / where.sizes() * torch.tensor(self.reference_size, dtype=torch.float64)
        else:
            x = index + self.offset
        # a coordinate of 0 is an angle of 0 for every frequency
        return torch.where(where.rotated[:, None], x * self.scale, 0.0).to(wide).to(device)

    def _make_frequencies(self) -> Tensor:
        """Return (2, 1, R/2) float32, on the CPU even under ``torch.device("meta")``, rounded as the models round."""
        pairs = self.rotary_dim // 2
        count = pairs if self.layout == "split" else pairs // 2
        if self.period_range is not None:
            shortest, longest = self.period_range
            steps = torch.linspace(0, 1, count, dtype=torch.float32, device="cpu")
            ladder = 1.0 / (shortest * (longest / shortest) ** steps)
        else:
            exponent = torch.arange(0, 2 * count, 2, dtype=torch.float32, device="cpu") / (2 * count)
            ladder = 1.0 / (self.theta**exponent)
        first, second = (ladder[0::2], ladder[1::2]) if self.layout == "split" else (ladder, ladder)
        frequencies = torch.zeros(2, pairs, dtype=torch.float32, device="cpu")
        if self.layout == "alternating":
            frequencies[0, 0::2], frequencies[1, 1::2] = first, second
        else:
            frequencies[0, : pairs // 2], frequencies[1, pairs // 2 :] = first, second
        return (frequencies if self.axis_order == "hw" else frequencies.flip(0))[:, None]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset ``strength`` to its initial value, e.g. after ``to_empty``."""
        if self.strength is not None:
            self.strength.fill_(self._start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AxialRoPE:
        """Keep the values of the frequencies through ``to_empty``, and recompute them if there are none."""
        before = self.frequencies
        super()._apply(fn, recurse)
        after = self.frequencies
        kept = self._make_frequencies() if before.is_meta or before.dtype not in _WIDE else before
        self.frequencies = kept.to(after.device, after.dtype if after.dtype in _WIDE else torch.float32)
        return self

    def extra_repr(self) -> str:
        shown = [f"{self.head_dim}", f"theta={self.theta:g}", f"pairing={self.pairing!r}"]
        plain = {
            "rotary_dim": self.head_dim,
            "axis_order": "hw",
            "layout": "block",
            "frequency": "inverse",
            "period_range": None,
            "offset": 0.0,
            "scale": 1.0,
            "reference_size": None,
            "normalize": None,
        }
        shown += [f"{name}={getattr(self, name)!r}" for name, value in plain.items() if getattr(self, name) != value]
        if self.strength is not None:
            shown.append("learnable strength")
        return ", ".join(shown)


class MixedRoPE(_Float32):
    """Mixed 2D RoPE: every pair of every head has its own learned direction and frequency (rope-vit).

    The parameter ``frequencies``, (2, H, R/2), holds f_row and f_column in radians per patch. (rope-vit's checkpoints
    hold x, the column, first: ``frequencies = freqs.flip(0)``.)

    ``frequencies`` is float32 and stays so when the module is cast to half precision, or loads a checkpoint in it; its
    gradient is float32. Angles are formed in float64 (float32 on a device without it), see ``AxialRoPE``.

    Mixed precision of FSDP gives a module rounded copies of its parameters, which forward refuses. Sharded for itself,
    before the modules around it, the encoding keeps float32: ``fully_shard(rope, mp_policy=MixedPrecisionPolicy())``.
    The same holds for the ``strength`` of ``AxialRoPE``.

    Args:
        head_dim: D, channels of a head.
        num_heads: H.
        theta: base of the frequencies for ``init="random"``, > 0.
        init: ``"random"``: pairs k and k + R/4 of a head get the frequency theta^(-4k/R) along two perpendicular
            directions, rotated by one uniformly random angle per head (drawn from torch's default generator);
            ``"identity"``: zero, so that the encoding starts as the identity. The gradient at zero does not vanish:
            the angle is linear in the frequencies.
        rotary_dim: R, number of rotated channels, a multiple of 4, at most D (default: D).
        pairing: which channels make a pair, see ``Rotary``.

    Raises:
        TypeError, ValueError: naming the argument and what it must be.

    Source: Heo et al., "Rotary Position Embedding for Vision Transformer", arXiv 2403.13298.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        theta: float = 10.0,
        init: Literal["random", "identity"] = "random",
        *,
        rotary_dim: int | None = None,
        pairing: Pairing = "interleaved",
    ) -> None:
        super().__init__()
        self.head_dim, self.rotary_dim = _check_dims(head_dim, rotary_dim)
        self.num_heads = _check_int("num_heads", num_heads)
        self.theta = _check_number("theta", theta, positive=True)
        self.init = _check_choice("init", init, ("random", "identity"))
        self.pairing: Pairing = _check_choice("pairing", pairing, PAIRINGS)
        self.frequencies = nn.Parameter(torch.empty(2, self.num_heads, self.rotary_dim // 2, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init == "identity":
            self.frequencies.zero_()
            return
        device = self.frequencies.device
        magnitude = 1.0 / self.theta ** (torch.arange(0, self.rotary_dim, 4, device=device).float() / self.rotary_dim)
        direction = _CYCLE * torch.rand(self.num_heads, 1, device=device, dtype=torch.float32)
        perpendicular = direction + math.pi / 2
        row = torch.cat([magnitude * direction.sin(), magnitude * perpendicular.sin()], dim=1)
        column = torch.cat([magnitude * direction.cos(), magnitude * perpendicular.cos()], dim=1)
        self.frequencies.copy_(torch.stack([row, column]))

    def forward(self, where: PatchGrid | Tensor) -> Rotary:
        """Return the table of a grid, or of raw (row, column) coordinates in patches, (N, 2) or (B, N, 2).

        Returns:
            Rotary with tables (1, N, H, R/2), or (B, N, H, R/2), in float32; float64 for float64 coordinates or
            frequencies. Tokens with ``grid.rotated`` False have angle 0. Gradients flow to ``frequencies`` and to raw
            coordinates.

        Raises:
            TypeError: ``frequencies`` are in half precision, set by FSDP or a loader; the message says how to fix it.
        """
        if (node := fx_node(self, where)) is not None:
            return node
        frequencies = self._exact("frequencies")
        device, wide = frequencies.device, widest(frequencies.device)
        # PatchGrid gives tokens that are not rotated the coordinates (0, 0)
        coordinates = where.coordinates() if isinstance(where, PatchGrid) else _check_coordinates(where)
        dtype = _table_dtype(where, frequencies)
        return _table(coordinates.to(wide).to(device), frequencies.to(wide), dtype, self.pairing)

    def extra_repr(self) -> str:
        rotary_dim = "" if self.rotary_dim == self.head_dim else f", rotary_dim={self.rotary_dim}"
        return (
            f"{self.head_dim}, num_heads={self.num_heads}, theta={self.theta:g}, pairing={self.pairing!r}{rotary_dim}"
        )


# --------------------------------------------------------------------- shared


def _table(
    coordinates: Tensor, frequencies: Tensor, dtype: torch.dtype, pairing: Pairing, cycles: bool = False
) -> Rotary:
    """Return tables (B|1, N, H|1, R/2) for (N, 2) or (B, N, 2) coordinates.

    ``frequencies`` (2, H|1, R/2) are in radians per unit, or in cycles; coordinates have their dtype: float64, or
    float32 on a device without it.
    """
    points = coordinates if coordinates.ndim == 3 else coordinates[None]
    if points.dtype == torch.float64:
        onnx = torch.onnx.is_in_onnx_export()  # rounds numbers to float32, 0.5 radians at 2^24, but not tensors
        cycle = torch.tensor(_CYCLE, dtype=torch.float64, device="cpu") if onnx else _CYCLE
        angles = points @ (frequencies if cycles else frequencies / cycle).flatten(1)
        # Whole cycles are removed while they are exact, so that one float32 rounding is left, of less than a cycle. In
        # place, as new memory costs more than arithmetic: forward and backward of (1, 1024, 16, 32) take 1.3 times as
        # long as in float32, and 2.6 times with float64 cos and sin.
        if onnx:
            angles = (angles - angles.floor()) * cycle  # dynamo=False has no frac
        elif is_traced(angles):
            angles = angles.frac() * cycle  # torch.func.linearize supports no in-place operators
        else:
            angles = angles.frac_().mul_(cycle)
        angles = angles.to(dtype).unflatten(-1, frequencies.shape[1:])
    else:
        row, column = points.unbind(-1)
        if cycles:
            frequencies = frequencies * _CYCLE
        # two products and not a matrix product, which autocast runs in half precision
        angles = row[..., None, None] * frequencies[0] + column[..., None, None] * frequencies[1]
    return Rotary.from_angles(angles, pairing)


def widest(device: torch.device) -> torch.dtype:
    """Return the dtype that angles are computed in on a device."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def _table_dtype(where: PatchGrid | Tensor, frequencies: Tensor) -> torch.dtype:
    """Return float64 if coordinates or frequencies are, else float32."""
    return torch.float64 if torch.float64 in (getattr(where, "dtype", None), frequencies.dtype) else torch.float32


def _check_coordinates(where: object) -> Tensor:
    if not isinstance(where, Tensor):
        raise TypeError(f"forward takes a PatchGrid or a coordinates tensor (N, 2), got {type(where).__name__}")
    if where.ndim not in (2, 3) or where.shape[-1] != 2:
        raise ValueError(
            f"coordinates must be (row, column) pairs, (N, 2) or (B, N, 2), got shape {tuple(where.shape)}"
        )
    dtype = where.dtype
    if dtype not in (torch.float32, torch.float64) and (
        dtype.is_floating_point or dtype.is_complex or dtype == torch.bool
    ):
        raise TypeError(f"coordinates must be float32, float64 or integer, got {dtype}: use coordinates.float()")
    if has_values(where) and not torch.isfinite(where.detach()).all():
        bad = int((~torch.isfinite(where.detach())).any(-1).sum())
        raise ValueError(
            f"coordinates hold NaN or Inf in {bad} of {where[..., 0].numel()} tokens: give padding tokens 0"
        )
    return where


def _check_dims(head_dim: object, rotary_dim: object) -> tuple[int, int]:
    dim = _check_int("head_dim", head_dim)
    rotary = dim if rotary_dim is None else _check_int("rotary_dim", rotary_dim)
    if rotary % 4:
        name = "head_dim" if rotary_dim is None else "rotary_dim"
        lower = rotary - rotary % 4
        hint = f": pass rotary_dim={lower} to leave {rotary - lower} channels unrotated" if lower else ""
        raise ValueError(f"{name} must be a multiple of 4 (two axes, two channels a pair), got {rotary}{hint}")
    if rotary > dim:
        raise ValueError(f"rotary_dim must be at most head_dim={dim}, got {rotary}")
    return dim, rotary


def _check_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _check_number(name: str, value: Any, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite, got {value}")
    return float(value)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    return value


def _check_period_range(value: Any, frequency: str) -> tuple[float, float] | None:
    if value is None:
        return None
    if frequency != "period":
        raise ValueError(f'period_range={value} needs frequency="period", got {frequency=}')
    try:
        shortest, longest = value
    except (TypeError, ValueError):
        raise ValueError(f"period_range must be (shortest, longest), got {value!r}") from None
    shortest = _check_number("period_range[0]", shortest, positive=True)
    longest = _check_number("period_range[1]", longest, positive=True)
    if shortest > longest:
        raise ValueError(f"period_range must be (shortest, longest), got {value!r}")
    return shortest, longest


def _check_reference_size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"reference_size must be an int or (height, width), got {value!r}")
    return _check_int("reference_size", pair[0]), _check_int("reference_size", pair[1])
