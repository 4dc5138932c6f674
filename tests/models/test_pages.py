# SPDX-License-Identifier: Apache-2.0
"""The pages for 3D vision and for CLIP, run from their own text with the real packages on small models."""

from __future__ import annotations

import subprocess
import sys

import packages
import torch
from packages import BESIDE, PACKAGES, on_the_path
from pages import story

import spatial_pe

on_the_path()


def test_a_dust3r_is_patched(monkeypatch, capsys):
    from mini_dust3r.model import AsymmetricCroCo3DStereo

    package = PACKAGES["DUSt3R"]
    model = package.make()
    theirs = package.outputs(model, torch.float32)
    monkeypatch.setattr(AsymmetricCroCo3DStereo, "from_pretrained", lambda name: model)
    exec(story("dust3r"), {})
    assert "CrossAttention" in capsys.readouterr().out
    for ours, expected in zip(package.outputs(model, torch.float32), theirs, strict=True):
        assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_the_warning_is_gone():
    """In a process of its own: the package must not be imported before."""
    code = story("curope")
    code = f"import sys; sys.path.append({str(BESIDE)!r})\n{code}\nprint(RoPE2D.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "spatial_pe.modules"


def test_dust3r_with_this_rope():
    """The model with our module instead of curope's computes the same, patched too."""
    model = PACKAGES["DUSt3R"].make()
    theirs = packages.run_dust3r(model, torch.float32)
    for module in model.modules():
        if getattr(module, "rope", None) is not None:
            module.rope = spatial_pe.RoPE2D(100.0)
    for step in ("rope", "patched"):
        if step == "patched":
            report = spatial_pe.patch(model)
            assert {row.convention for row in report.patched} == {"own RoPE (axis_half)"}
        for ours, expected in zip(packages.run_dust3r(model, torch.float32), theirs, strict=True):
            assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_a_clip_is_trained(monkeypatch):
    import open_clip

    small = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}}
    small["text_cfg"] = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", small)
    names: dict = {}
    exec(story("open_clip"), names)
    model, report, optimizer = names["model"], names["report"], names["optimizer"]
    assert {row.attention for row in report.patched} == {"MultiheadAttention"}
    assert not model.visual.positional_embedding.any()
    text, images = torch.randint(0, 31, (2, 8)), torch.randn(2, 3, 32, 32)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        image, words, scale = model(images, text)[:3]
        loss = torch.nn.functional.cross_entropy(scale * image @ words.T, torch.arange(2))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and not model.visual.positional_embedding.any()
