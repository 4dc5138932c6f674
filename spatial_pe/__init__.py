# SPDX-License-Identifier: Apache-2.0
"""2D rotary position encoding fused into attention, for vision transformers."""

from .attention import rope_attention
from .backends.select import backends
from .encodings import CONVENTIONS, AxialRoPE, MixedRoPE, convention
from .grid import PatchGrid
from .rotary import Rotary, apply_rotary

__all__ = ["PatchGrid", "Rotary", "apply_rotary", "backends", "rope_attention"]
__version__ = "0.1.0"
