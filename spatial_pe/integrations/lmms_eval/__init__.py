# SPDX-License-Identifier: Apache-2.0
"""LLaVA with a patched vision tower in lmms-eval: ``--model llava_hf_spatial_pe --model_args pretrained=…,rope=axial``.

lmms-eval finds ``manifest`` through the entry point group ``lmms_eval.models`` while it is being imported, so none of
it is imported here. Tasks that it lacks (VSR, TallyQA, TopViewRS) are in ``TASKS``, for its ``--include_path``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"


def manifest() -> Any:
    """Return lmms-eval's ModelManifest. It supports both prompt paths, so that the prompts are those of its
    llava_hf."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="llava_hf_spatial_pe",
        simple_class_path=f"{__name__}.model.LlavaHfSpatialPE",
        chat_class_path=f"{__name__}.model.LlavaHfSpatialPEChat",
    )
