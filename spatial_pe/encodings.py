# SPDX-License-Identifier: Apache-2.0
"""From where tokens sit to the angles that turn them.

Every 2D RoPE made of 2 x 2 rotations is one formula; models differ only in the frequencies and the coordinates:

    angle[head, token, pair] = row[token] * f_row[head, pair] + column[token] * f_column[head, pair]

``AxialRoPE``: each pair listens to one axis, with fixed frequencies. ``MixedRoPE``: each pair listens to both,
with learned frequencies per head. ``CONVENTIONS``: what the published model families chose, as data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .grid import PatchGrid
from .rotary import PAIRINGS, Pairing, Rotary, _has_values

AxisOrder = Literal["hw", "wh"]
Layout = Literal["block", "split", "alternating"]
Frequency = Literal["inverse", "period"]
Normalize = Literal["separate", "min", "max"]


class AxialRoPE(nn.Module):
    """Axial 2D RoPE: every channel pair turns with the row or with the column of its token.

    With rotary dim R there are R/2 pairs. A geometric ladder of n frequencies, l[i] = theta^(-i/n) for
    i = 0 .. n-1, serves each axis, and ``layout`` says which pair gets which entry; ``axis_order`` which axis
    (h: the row, w: the column) comes first:

    - ``"block"``: n = R/4, pairs are [l of the first axis | l of the second] (Qwen-VL, DINOv3, EVA-02, most);
    - ``"split"``: n = R/2, one ladder dealt out: [l[0], l[2], .. of the first | l[1], l[3], .. of the second]
      (Pixtral);
    - ``"alternating"``: n = R/4, pairs are first l[0], second l[0], first l[1], second l[1], .. (MoonViT).

    Coordinates x of a patch grid are made from the patch index i = 0 .. size-1 along each axis, size being the
    image's own height or width in patches:

    - default: x = i + offset;
    - ``reference_size`` r: x = (i + offset) / size * r, the grid is stretched to the one of pretraining (EVA-02);
    - ``normalize``: x = 2 (i + 0.5) / s - 1, the patch centre, with s the size of that axis (``"separate"``), the
      smaller (``"min"``) or the larger (``"max"``) of both (DINOv3);

    and then multiplied by ``scale`` (SAM 3's global layers: window / size). Tokens with ``grid.rotated`` False get
    angle 0, whatever the offset.

    The frequencies are float32 and stay so when the module is cast to half precision (bfloat16 keeps 8 bits: 0.2 %
    of an angle, 0.2 radians at 100 patches); they move with ``.to(device)`` and are not in the state dict. On the CPU
    the tables of the families in ``CONVENTIONS`` equal those of transformers bit for bit where the head_dim is a
    power of two, and to a float32 rounding of the angle (relative 2e-7) otherwise.

    Args:
        head_dim: D, channels of a head.
        theta: base of the ladder, > 0.
        rotary_dim: R, how many channels are turned, a multiple of 4, at most D (default: D).
        pairing: which channels make a pair, see ``Rotary``.
        axis_order, layout: see above.
        frequency: ``"inverse"``: l is in radians per unit of x (RoFormer); ``"period"``: in turns, so that 1/l is
            a period and the angle is 2 pi x l (DINOv3).
        period_range: (shortest, longest) period, log-spaced, in place of theta; needs ``frequency="period"``.
        offset: added to the patch index: 1 in Llama 4 and Perception Encoder. It cancels between two patches, not
            between a patch and a token that is not rotated.
        scale, reference_size, normalize: see above. ``reference_size`` is one size or (height, width).
        strength: if given, a learnable multiplier of the angles, one per pair, starts at this value: 0 is the
            identity, 1 the full encoding. Per pair, because the angles span four orders of magnitude: a single
            multiplier would follow the few fastest pairs. It enters linearly, so its gradient at 0 does not vanish.

    Raises:
        TypeError, ValueError: naming the argument and what it must be.

    The ladder is RoFormer's (arXiv 2104.09864), split over two axes as in rope-vit (arXiv 2403.13298)
    and DINOv3 (arXiv 2508.10104); what each family does is in ``CONVENTIONS``.
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
            start = _check_number("strength", strength)
            self.strength = nn.Parameter(torch.full((self.rotary_dim // 2,), start, dtype=torch.float32))

    def forward(self, where: PatchGrid | Tensor) -> Rotary:
        """The table of a grid, or of raw coordinates.

        Args:
            where: a PatchGrid with N tokens, or (row, column) coordinates in patches, (N, 2) or (B, N, 2), float32,
                float64 or integer. Raw coordinates take the place of the patch index: ``offset`` and ``scale``
                apply to them, every token is rotated; ``reference_size`` and ``normalize`` need a grid.

        Returns:
            Rotary with tables (1, N, 1, R/2), or (B, N, 1, R/2), in float32; float64 for float64 coordinates or
            after ``.double()``. Gradients flow to ``strength`` and to raw coordinates.
        """
        angles = _angles(self._coordinates(where), self.frequencies)
        if self.strength is not None:
            angles = angles * self.strength.to(angles.dtype)
        return Rotary.from_angles(angles, self.pairing)

    def _coordinates(self, where: PatchGrid | Tensor) -> Tensor:
        device = self.frequencies.device
        if not isinstance(where, PatchGrid):
            for name in ("reference_size", "normalize"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs the size of the image: pass a PatchGrid, or scale the "
                        f"coordinates yourself and build the encoding without {name}"
                    )
            return (_check_coordinates(where).to(device) + self.offset) * self._unit
        index = where.coordinates()
        if self.normalize is not None:
            size = where.sizes()
            if self.normalize != "separate":
                pick = torch.amin if self.normalize == "min" else torch.amax
                size = pick(size, dim=1, keepdim=True)
            x = 2.0 * ((index + 0.5) / size) - 1.0
        elif self.reference_size is not None:
            x = (index + self.offset) / where.sizes() * torch.tensor(self.reference_size, dtype=torch.float32)
        else:
            x = index + self.offset
        # a coordinate of 0 is an angle of 0 for every frequency
        return torch.where(where.rotated[:, None], x * self._unit, 0.0).to(device)

    @property
    def _unit(self) -> float:
        """Radians are turns times 2 pi; applied to x before l, as DINOv3 does, so that the roundings agree."""
        return self.scale * (2.0 * math.pi if self.frequency == "period" else 1.0)

    def _make_frequencies(self) -> Tensor:
        """(2, 1, R/2) float32, on the CPU even under ``torch.device("meta")``, in float32 steps as the models do."""
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AxialRoPE:
        """Every cast and move of a module passes here: keep the frequencies' values, take the device."""
        before = self.frequencies
        super()._apply(fn, recurse)
        after = self.frequencies
        kept = self._make_frequencies() if before.is_meta else before
        dtype = after.dtype if after.dtype in (torch.float32, torch.float64) else torch.float32
        self.frequencies = kept.to(after.device, dtype)
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


class MixedRoPE(nn.Module):
    """Mixed 2D RoPE: every pair of every head has its own learned direction and frequency (rope-vit).

    The parameter ``frequencies``, (2, H, R/2), holds f_row and f_column in radians per patch. (rope-vit's checkpoints
    hold x, the column, first: ``frequencies = freqs.flip(0)``.)

    Half precision: ``frequencies`` is a parameter and is cast like any other by ``model.to(torch.bfloat16)``, which
    rounds what was learned by up to 0.2 %; the result is another, still exactly relative, encoding. The angles are
    computed in float32 from whatever it holds. Under autocast nothing is rounded.

    Args:
        head_dim: D, channels of a head.
        num_heads: H.
        theta: base of the ladder that ``init="random"`` starts from, > 0.
        init: ``"random"``: pairs k and k + R/4 of a head get the frequency theta^(-4k/R) along two perpendicular
            directions, which are turned by one uniformly random angle per head (drawn from torch's default
            generator); ``"identity"``: zero, so that nothing is rotated until training moves it. The gradient at
            zero does not vanish: the angle is linear in the frequencies.
        rotary_dim: R, how many channels are turned, a multiple of 4, at most D (default: D).
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
        direction = 2.0 * math.pi * torch.rand(self.num_heads, 1, device=device)
        perpendicular = direction + math.pi / 2
        row = torch.cat([magnitude * direction.sin(), magnitude * perpendicular.sin()], dim=1)
        column = torch.cat([magnitude * direction.cos(), magnitude * perpendicular.cos()], dim=1)
        self.frequencies.copy_(torch.stack([row, column]))

    def forward(self, where: PatchGrid | Tensor) -> Rotary:
        """The table of a grid, or of raw (row, column) coordinates in patches, (N, 2) or (B, N, 2).

        Returns:
            Rotary with tables (1, N, H, R/2), or (B, N, H, R/2), in float32; float64 for float64 coordinates or
            frequencies. Tokens with ``grid.rotated`` False have angle 0. Gradients flow to ``frequencies``.
        """
        # PatchGrid gives tokens that are not rotated the coordinates (0, 0)
        coordinates = where.coordinates() if isinstance(where, PatchGrid) else _check_coordinates(where)
        return Rotary.from_angles(_angles(coordinates.to(self.frequencies.device), self.frequencies), self.pairing)

    def extra_repr(self) -> str:
        rotary_dim = "" if self.rotary_dim == self.head_dim else f", rotary_dim={self.rotary_dim}"
        return (
            f"{self.head_dim}, num_heads={self.num_heads}, theta={self.theta:g}, pairing={self.pairing!r}{rotary_dim}"
        )


# --------------------------------------------------------------------- the model families


@dataclass(frozen=True)
class Convention:
    """What a model family chose: the class, its options, and where that was read."""

    encoding: type[AxialRoPE | MixedRoPE]
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


_QWEN = Convention(AxialRoPE, {}, "transformers: Qwen2VLVisionRotaryEmbedding; position ids in merge blocks")
_DINOV3 = Convention(
    AxialRoPE,
    {"theta": 100.0, "frequency": "period", "normalize": "separate"},
    "facebookresearch/dinov3 rope_position_encoding.py; transformers: DINOv3ViTRopePositionEmbedding (inference)",
)
_SAM = Convention(
    AxialRoPE,
    {"pairing": "interleaved", "axis_order": "wh"},
    "transformers: Sam3ViTRotaryEmbedding, Sam2VideoVisionRotaryEmbedding; SAM 3's global layers add "
    "scale=window_size / width",
)
_MUSE = Convention(
    AxialRoPE, {"axis_order": "wh", "offset": 1.0}, "transformers: MuseGlimmerVisionModel (position ids flipped, + 1)"
)

CONVENTIONS: dict[str, Convention] = {
    "qwen2_5_vl": _QWEN,
    "pixtral": Convention(AxialRoPE, {"layout": "split"}, "transformers: PixtralVisionRotaryEmbedding"),
    "dinov3": _DINOV3,
    "llama4": Convention(
        AxialRoPE,
        {"pairing": "interleaved", "axis_order": "wh", "offset": 1.0},
        "transformers: Llama4VisionRotaryEmbedding; CLS comes last: PatchGrid(..., suffix=1)",
    ),
    "sam3": _SAM,
    "gemma4": Convention(
        AxialRoPE,
        {"theta": 100.0, "pairing": "axis_half", "axis_order": "wh"},
        "transformers: Gemma4VisionRotaryEmbedding, apply_multidimensional_rope; position ids are (x, y)",
    ),
    "kimi": Convention(
        AxialRoPE,
        {"axis_order": "wh", "layout": "alternating"},
        "transformers: Kimi_K25VisionRotaryEmbedding, whose weights are permuted on loading; the original MoonViT "
        'code has pairing="interleaved"',
    ),
    "eva02": Convention(
        AxialRoPE,
        {"pairing": "interleaved", "reference_size": 16},
        "baaivision/EVA EVA-02/asuka/rope.py VisionRotaryEmbeddingFast, pretrained on 16 x 16; timm: "
        "RotaryEmbeddingCat(in_pixels=False, ref_feat_shape=(16, 16))",
    ),
    "perception_encoder": Convention(
        AxialRoPE,
        {"pairing": "interleaved", "axis_order": "wh", "offset": 1.0},
        "facebookresearch/perception_models core/vision_encoder/rope.py Rope2D; offset 0 without CLS; timm: "
        'RotaryEmbeddingCat(in_pixels=False, grid_offset=1, grid_indexing="xy")',
    ),
    "rope_vit_axial": Convention(
        AxialRoPE,
        {"theta": 100.0, "pairing": "interleaved", "axis_order": "wh"},
        "naver-ai/rope-vit deit/models_v2_rope.py compute_axial_cis",
    ),
    "rope_vit_mixed": Convention(
        MixedRoPE,
        {},
        "naver-ai/rope-vit deit/models_v2_rope.py init_random_2d_freqs, compute_mixed_cis; needs num_heads",
    ),
    # further families, each compared with its own class by the tests
    "qwen2_vl": _QWEN,
    "qwen2_5_omni": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_omni_moe": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen4_exp": _QWEN,
    "glm4v": _QWEN,
    "glm4v_moe": _QWEN,
    "glm_ocr": _QWEN,
    "glm5_next": _QWEN,
    "ernie4_5_vl_moe": _QWEN,
    "paddleocr_vl": _QWEN,
    "video_llama_3": _QWEN,
    "exaone4_5": _QWEN,
    "cohere_compass": _QWEN,
    "dots3_note": _QWEN,
    "lfm3_vl": Convention(AxialRoPE, {"theta": 1_000_000.0}, "transformers: Lfm3VlVisionRotaryEmbedding"),
    "step3p7": Convention(AxialRoPE, {"axis_order": "wh"}, "transformers: Step3p7VisionRotaryEmbedding"),
    "muse_glimmer": _MUSE,
    "muse_spark": _MUSE,
    "inkling2": Convention(
        AxialRoPE,
        {"pairing": "interleaved", "axis_order": "wh", "offset": 1.0},
        "transformers: Inkling2VisionRotaryEmbedding; CLS comes first: PatchGrid(..., prefix=1)",
    ),
    "sam2_video": _SAM,
    "eomt_dinov3": _DINOV3,
    "sapiens2": _DINOV3,
}


def convention(name: str, head_dim: int, **overrides: Any) -> AxialRoPE | MixedRoPE:
    """The encoding of a model family, e.g. ``convention("dinov3", 64)``.

    Args:
        name: a key of ``CONVENTIONS``.
        head_dim: D, channels of a head.
        overrides: options of ``AxialRoPE`` or ``MixedRoPE`` that differ from the family's own, such as ``theta``;
            ``convention("rope_vit_mixed", 64, num_heads=6)`` needs the number of heads.

    Raises:
        ValueError: unknown name, or an option out of range.
        TypeError: an option that the encoding does not have.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention {name!r}: it must be one of {', '.join(CONVENTIONS)}")
    row = CONVENTIONS[name]
    return row.encoding(head_dim, **{**row.options, **overrides})


# --------------------------------------------------------------------- pieces


def _angles(coordinates: Tensor, frequencies: Tensor) -> Tensor:
    """(N, 2) or (B, N, 2) coordinates, (2, H|1, R/2) frequencies -> (B|1, N, H|1, R/2), at least float32."""
    frequencies = frequencies.to(torch.promote_types(frequencies.dtype, coordinates.dtype))
    row, column = (coordinates if coordinates.ndim == 3 else coordinates[None]).unbind(-1)
    # two products and not a matrix product, which may run in TF32 on a GPU: 10 bits of an angle
    return row[..., None, None] * frequencies[0] + column[..., None, None] * frequencies[1]


def _check_coordinates(where: object) -> Tensor:
    if not isinstance(where, Tensor):
        raise TypeError(f"forward takes a PatchGrid or a coordinates tensor (N, 2), got {type(where).__name__}")
    if where.ndim not in (2, 3) or where.shape[-1] != 2:
        raise ValueError(
            f"coordinates must be (row, column) pairs, (N, 2) or (B, N, 2), got shape {tuple(where.shape)}"
        )
    if where.dtype not in (torch.float32, torch.float64):
        if where.dtype.is_floating_point or where.dtype.is_complex or where.dtype == torch.bool:
            raise TypeError(
                f"coordinates must be float32, float64 or integer, got {where.dtype}: use coordinates.float()"
            )
        where = where.float()
    if _has_values(where) and not torch.isfinite(where.detach()).all():
        bad = int((~torch.isfinite(where.detach())).any(-1).sum())
        raise ValueError(
            f"coordinates hold NaN or Inf in {bad} of {where[..., 0].numel()} tokens: give padding tokens 0"
        )
    return where


def _check_dims(head_dim: object, rotary_dim: object) -> tuple[int, int]:
    dim = _check_int("head_dim", head_dim)
    turned = dim if rotary_dim is None else _check_int("rotary_dim", rotary_dim)
    if turned % 4:
        name = "head_dim" if rotary_dim is None else "rotary_dim"
        lower = turned - turned % 4
        hint = f": pass rotary_dim={lower} to leave {turned - lower} channels unrotated" if lower else ""
        raise ValueError(f"{name} must be a multiple of 4 (two axes, two channels a pair), got {turned}{hint}")
    if turned > dim:
        raise ValueError(f"rotary_dim must be at most head_dim={dim}, got {turned}")
    return dim, turned


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
