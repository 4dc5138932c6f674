# SPDX-License-Identifier: Apache-2.0
"""Patching existing vision towers: ``patch``, ``unpatch``, ``inspect``.

Read in this order: ``patch`` (what happens), ``discover`` (what is found), ``layout`` and ``adapters`` (how a module is
read and computed), ``swap`` (how it changes class), ``grids`` (what hooks record), ``verify`` (the proof), ``report``.
"""

from .patch import inspect, patch, unpatch
from .report import PatchReport

__all__ = ["PatchReport", "inspect", "patch", "unpatch"]
