# SPDX-License-Identifier: Apache-2.0
"""Patching existing vision towers: ``patch``, ``unpatch``, ``inspect``, ``from_pretrained``.

Read in this order: ``patch`` (what happens), ``request`` (what was asked), ``discover`` (what is found), ``layout`` and
``adapters`` (how a module is read and computed), ``swap`` (how it changes class), ``grids`` (what hooks record),
``verify`` (the proof), ``report``, ``saved`` and ``load`` (patched models in a directory), ``legacy``,
``interface`` (without patching).
"""

from .interface import register_attention_interface
from .load import from_pretrained
from .patch import inspect, patch, unpatch
from .report import PatchReport

__all__ = ["PatchReport", "from_pretrained", "inspect", "patch", "register_attention_interface", "unpatch"]
