# SPDX-License-Identifier: Apache-2.0
"""2D rotary position encoding fused into attention, for vision transformers."""

__version__ = "0.1.0"

from .attention import rope_attention
from .backends.select import backends
from .decompositions import decompositions
from .encodings import CONVENTIONS, AxialRoPE, MixedRoPE, convention
from .grid import PatchGrid
from .modules import RoPE2DAttention
from .onnx_translations import onnx_translations
from .rotary import Rotary
from .rotation import apply_rotary, apply_rotary_qk
from .towers import PatchReport, from_pretrained, inspect, patch, register_attention_interface, unpatch
from .verify import RotaryReport, verify_rotary

__all__ = [
    "CONVENTIONS",
    "AxialRoPE",
    "MixedRoPE",
    "PatchGrid",
    "PatchReport",
    "RoPE2DAttention",
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
