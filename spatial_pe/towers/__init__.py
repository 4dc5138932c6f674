# SPDX-License-Identifier: Apache-2.0
"""Patching existing vision towers: ``patch``, ``unpatch``, ``inspect``, ``from_pretrained``.

Read in this order: ``patch`` (what happens), ``options`` (what is asked for), ``discover``, ``forms`` and ``layout``
(what is found), ``equivalence`` (the proof), ``swap`` and ``fused_attention`` (how a module changes class, and its
forward), what that reads (``rotary_inputs``, ``padding``, ``grid_hooks``), ``report``, ``config_entry`` and ``loading``
(patched models in a directory), ``legacy``, ``interface`` (without patching).
"""

from .forms import ForwardForm, register_form
from .interface import register_attention_interface
from .loading import from_pretrained
from .patch import inspect, patch, unpatch
from .report import PatchReport

__all__ = [
    "ForwardForm",
    "PatchReport",
    "from_pretrained",
    "inspect",
    "patch",
    "register_attention_interface",
    "register_form",
    "unpatch",
]
