# SPDX-License-Identifier: Apache-2.0
"""Every tower that the tests run, by name."""

from __future__ import annotations

import pytest
import transformers
from family import Family, outputs, randn, randomize, to
from own_code import OWN_CODE
from towers_with_memory import WITH_MEMORY
from towers_with_rope import WITH_ROPE
from towers_without_rope import WITHOUT_ROPE as PLAIN

__all__ = [
    "EVERY",
    "FAMILIES",
    "GRIDS",
    "HERE",
    "OF_TRANSFORMERS",
    "ONCE",
    "TOKENS_AROUND",
    "WITHOUT_ROPE",
    "WITH_TABLES",
    "Family",
    "outputs",
    "randn",
    "randomize",
    "to",
]

OF_TRANSFORMERS = {**WITH_ROPE, **PLAIN, **WITH_MEMORY}
FAMILIES = {**OF_TRANSFORMERS, **OWN_CODE}
HERE = [name for name, family in OF_TRANSFORMERS.items() if family.available()]
# of a form that others have: `make test` runs them once
REPEATS = {
    "clipseg",
    "dpt",
    "hy_v4_vl",
    "lw_detr",
    "minicpm_ocr",
    "minicpmv4_7",
    "owlv2",
    "rf_detr",
    "sam3_tracker_video",
    "videomae",
    "vitpose",
    "vivit",
}
# own code does not depend on the version of transformers
EVERY = [*HERE, *(OWN_CODE if transformers.__version__ >= "5" else ())]
ONCE = [pytest.param(name, marks=[pytest.mark.slow] if name in REPEATS else []) for name in EVERY]
WITH_TABLES = [name for name in WITH_ROPE if name in HERE]
WITHOUT_ROPE = [name for name in PLAIN if name in HERE]

# Towers whose tokens are a grid of patches behind so many other tokens, and in front of so many: RoPE can be added.
TOKENS_AROUND = {
    "clip": (1, 0),
    "siglip": (0, 0),
    "dinov2": (1, 0),
    "dinov2_with_registers": (3, 0),
    "vit": (1, 0),
    "altclip": (1, 0),
    "chinese_clip": (1, 0),
    "metaclip_2": (1, 0),
    "kosmos2": (1, 0),
    "git": (1, 0),
    "owlvit": (1, 0),
    "aimv2": (0, 0),
    "aimv2_native": (0, 0),
    "ovis2": (0, 0),
    "granite_docling": (0, 0),
    "janus": (0, 0),
    "internvl": (1, 0),
    "internvl_qk_norm": (1, 0),
    "qianfan_ocr": (1, 0),
    "ijepa": (0, 0),
    "vit_msn": (1, 0),
    "deit": (2, 0),
    "yolos": (1, 3),
    "pixio": (3, 0),
    "tipsv2": (3, 0),
    "siglip2": (0, 0),
    "idefics2": (0, 0),
    "idefics3": (0, 0),
    "smolvlm": (0, 0),
}
GRIDS = [name for name in TOKENS_AROUND if name in HERE]
