# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/, run as they are: what they print is right."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from spatial_pe.backends import cpu

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def printed(capsys):
    """Run an example and return what it prints."""

    def run(name: str) -> str:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


def number(pattern: str, text: str) -> float:
    (found,) = re.findall(pattern + r" ([-+.e\d]+)", text)
    return float(found)


def test_patch_qwen_vl(printed):
    pytest.importorskip("transformers")
    text = printed("patch_qwen_vl.py")
    assert re.search(r"Qwen2_5_VLVisionAttention +2 +own RoPE, packed \(half\)", text)
    assert number("unpatched: relative difference", text) < 1e-5
    assert "unpatched again, bit for bit: True" in text


@pytest.mark.skipif(cpu.unavailable() is not None, reason="without the extension another backend is shown")
def test_the_readme_shows_what_it_prints(printed):
    """But for the errors, which differ from machine to machine."""
    pytest.importorskip("transformers")
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    table = next(block for block in readme.split("```") if "Qwen2_5_VLVisionAttention" in block)
    shown, now = (re.sub(r"\d\.\de-\d\d", "", x) for x in (table, printed("patch_qwen_vl.py")))
    assert now.split()[: len(shown.split())] == shown.split()


def test_add_rope_to_clip(printed):
    pytest.importorskip("transformers")
    text = printed("add_rope_to_clip.py")
    assert re.search(r"CLIPAttention +2 +axial RoPE added, identity", text)
    assert "32 parameters added" in text  # 16 pairs in each of two layers
    assert number("unpatched: relative difference", text) < 1e-5
    before, after = number("loss before training:", text), number("loss after 90 steps:", text)
    assert 1.2 < before < 1.6 and after < 0.7 * before  # chance is log 4 = 1.39
    strengths = re.findall(r"self_attn: strength (\d\.\d+)", text)
    assert len(strengths) == 2 and all(0.02 < float(strength) < 1 for strength in strengths)


def test_packed_images(printed):
    text = printed("packed_images.py")
    assert "3 images, 517 tokens, cu_seqlens [0, 240, 496, 517]" in text
    assert number("largest difference", text) < 1e-5
    assert "517 packed, 768 padded" in text
    assert "in 11 windows: (517, 4, 64)" in text  # 2 x 3 of the first image, 2 x 2, and 1 x 1


def test_is_it_a_rotation(printed):
    text = printed("is_it_a_rotation.py")
    right, wrong = text.split("a table by axis")
    assert right.startswith("AxialRoPE\nrotation: yes; relative: yes; encodes position: yes")
    assert "rotation: NO; relative: NO" in wrong
    assert "AxialRoPE is a rotation and relative: True" in wrong
    assert "the other is a rotation and relative: False" in wrong


def test_every_example_is_run_here():
    here = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'printed("{path.name}")' not in here] == []
