# SPDX-License-Identifier: Apache-2.0
"""How a patched attention module computes. Read ``shapes`` (which there are, as data), ``patched`` (the class that a
module gets), ``fused`` (its forward), then what that reads: ``tables`` (a tower's rotation), ``masks`` (its padding).
"""

from .fused import FusedAttention
from .patched import Binding, Patched
from .shapes import LEFT_ALONE, NO_GRID, SHAPES, TESTED, Known, Shape, tested

__all__ = [
    "LEFT_ALONE",
    "NO_GRID",
    "SHAPES",
    "TESTED",
    "Binding",
    "FusedAttention",
    "Known",
    "Patched",
    "Shape",
    "tested",
]
