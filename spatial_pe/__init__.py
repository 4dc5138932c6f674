# SPDX-License-Identifier: Apache-2.0
"""2D rotary position encoding fused into attention, for vision transformers."""

from ._utils import needs_torch as _needs_torch  # noqa: F401  first: says what to do where torch is missing
from ._version import __version__ as __version__
from .conventions import CONVENTIONS, convention
from .encodings import AxialRoPE, MixedRoPE
from .grid import PatchGrid
from .modules import RoPE2D, RoPE2DAttention, RoPE2DCrossAttention
from .ops.attention import rope_attention
from .ops.decompositions import decompositions
from .ops.onnx_translations import onnx_translations
from .ops.rotate import apply_rotary, apply_rotary_qk
from .ops.select import backends
from .rotary import Rotary
from .rotary_report import RotaryReport, verify_rotary
from .towers import PatchReport, from_pretrained, inspect, patch, register_attention_interface, unpatch

__all__ = [
    "CONVENTIONS",
    "AxialRoPE",
    "MixedRoPE",
    "PatchGrid",
    "PatchReport",
    "RoPE2D",
    "RoPE2DAttention",
    "RoPE2DCrossAttention",
    "Rotary",
    "RotaryReport",
    "apply_rotary",
    "apply_rotary_qk",
    "backends",
    "convention",
    "decompositions",
    "from_pretrained",
    "inspect",
    "onnx_translations",
    "patch",
    "register_attention_interface",
    "rope_attention",
    "unpatch",
    "verify_rotary",
]
