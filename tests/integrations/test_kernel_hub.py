# SPDX-License-Identifier: Apache-2.0
"""The folder for Hugging Face ``kernels``: it loads in a process without this package, and its layers serve a tower."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pages import story

from tools import kernel_hub

KERNELS = Path(__file__).parents[2] / ".venv" / "kernels"
WITHOUT = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:] = [path for path in sys.path if path not in ("", {root!r})]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", str(finder))]
import importlib.util
assert importlib.util.find_spec("spatial_pe") is None
from pathlib import Path
folder = Path({folder!r})
import torch
torch.manual_seed(0)
"""
ALONE = """
def load(variant):
    name = __import__("json").loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

first, second = (load(folder / "build" / name) for name in ("torch-cpu", "torch-cuda"))
q, k, v = torch.randn(3, 2, 50, 4, 32, requires_grad=True).unbind(0)
outs = []
for kernel in (first, second):
    rotary = kernel.AxialRoPE(32)(kernel.PatchGrid(7, 7, prefix=1))
    outs.append(kernel.rope_attention(q, k, v, rotary))
    outs[-1].sum().backward(retain_graph=True)
rotary = first.AxialRoPE(32)(first.PatchGrid(7, 7, prefix=1))
rotated = (first.apply_rotary(x, rotary).transpose(1, 2) for x in (q, k))
theirs = torch.nn.functional.scaled_dot_product_attention(*rotated, v.transpose(1, 2)).transpose(1, 2)
torch.testing.assert_close(outs[0], theirs)
assert torch.equal(*outs)
compiled = torch.compile(first.rope_attention, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(q, k, v, rotary), theirs)
print("right")
"""
BY_KERNELS = """
sys.path.append({kernels!r})
import kernels
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention, Qwen3VLVisionModel

assert "rope_attention" in kernels.get_local_kernel(folder, backend="cpu").__all__
vision = Qwen3VLVisionConfig(
    depth=2, hidden_size=64, num_heads=2, intermediate_size=64, out_hidden_size=64, deepstack_visual_indexes=[0]
)
plain = DINOv3ViTConfig(
    hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64, image_size=32, patch_size=8
)
grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
patches = {{"hidden_states": torch.randn(28, 3 * 2 * 16 * 16), "grid_thw": grid}}
pixels = {{"pixel_values": torch.randn(2, 3, 32, 24)}}
cases = [
    (Qwen3VLVisionModel(vision), Qwen3VLVisionAttention, "PackedVisionAttention", patches),
    (DINOv3ViTModel(plain), DINOv3ViTAttention, "BatchedVisionAttention", pixels),
]
for model, attention, name, inputs in cases:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=max(parameter[0].numel(), 1) ** -0.5)
    model.eval()
    with torch.no_grad():
        theirs = model(**inputs).last_hidden_state
    exec(as_the_page_says.replace("Qwen3VLVisionAttention", "attention").replace("PackedVisionAttention", name))
    changed = [m for m in model.modules() if isinstance(m, attention)]
    assert len(changed) == 2 and all(m.forward.__qualname__ == f"{{name}}.forward" for m in changed)
    with torch.no_grad():
        ours = model(**inputs).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
print("right")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel")
    kernel_hub.build(path)
    return path


def run(folder: Path, code: str) -> None:
    root = str(Path(__file__).parents[2])
    code = WITHOUT.format(root=root, folder=str(folder)) + code
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith("right"), done.stderr[-3000:]


def test_both_variants_load_without_the_package(folder):
    run(folder, ALONE)


def test_kernels_loads_it_and_its_layers_serve(folder):
    if not KERNELS.exists():
        pytest.skip("no kernels: make .venv/kernels")
    page = story("kernel_hub").replace("build/kernel", str(folder))
    run(folder, f"as_the_page_says = {page!r}\n{BY_KERNELS.format(kernels=str(KERNELS))}")


def test_what_the_hub_asks_for(folder):
    """Relative imports, and of others only torch, Triton and the standard library; names of its own."""
    for variant in (folder / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"]["type"] == variant.name.removeprefix("torch-") and metadata["python-depends"] == []
        for path in variant.rglob("*.py"):
            source = path.read_text()
            assert "torch.ops.spatial_pe." not in source and '"spatial_pe::' not in source, path
            for node in ast.parse(source).body:  # what is imported in a function is for a host that has it
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                for name in names:
                    top = name.partition(".")[0]
                    assert top in ("torch", "triton") or top in sys.stdlib_module_names, (path, name)
