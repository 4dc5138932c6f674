# SPDX-License-Identifier: Apache-2.0
"""The README and the docs: their Python code runs and is right, links lead somewhere, and the reference is complete."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pages import PAGES, ROOT, blocks, story
from torch import nn

import spatial_pe
from tools import docs_site, reports

NAMES = {str(path.relative_to(ROOT)): path for path in PAGES}


class Tower(nn.Module):
    """What the pages call ``model``: pixels to features by one layer of attention with RoPE."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.attention = spatial_pe.RoPE2DAttention(32, 2)
        self.grid = spatial_pe.PatchGrid(3, 2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.attention(self.embed(pixels).flatten(2).transpose(1, 2), self.grid)


# ---------------------------------------------------------------------------------------------------------------- code


def attention_is_right(names: dict[str, Any]) -> None:
    """out, against attention in float64 with complex numbers for the rotation."""
    q, k, v, grid = (names[name] for name in ("q", "k", "v", "grid"))
    row, column = grid.coordinates().double().unbind(-1)
    ladder = 10000.0 ** -(torch.arange(16, dtype=torch.float64) / 16)
    angles = torch.cat([row[:, None] * ladder, column[:, None] * ladder], dim=1)[:, None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], dim=-1)

    scores = torch.einsum("bnhd,bmhd->bhnm", rotated(q), rotated(k)) / 8
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.double())
    assert (names["out"] - expected).norm() < 1e-5 * expected.norm()


def exports_are_right(names: dict[str, Any]) -> None:
    import onnxruntime

    model, pixels = names["model"], names["pixels"]
    expected = model(pixels)
    session = onnxruntime.InferenceSession("tower.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    program_is_right(names)
    x = torch.randn(3, 3, 12, 8)
    each = torch.stack([torch.func.grad(names["loss"])(one) for one in x])
    torch.testing.assert_close(names["per_sample"](x), each)


def program_is_right(names: dict[str, Any]) -> None:
    program, model, args = names["program"], names["model"], (names["pixels"],)
    assert not any("spatial_pe" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), model(*args))


def attention_page(names: dict[str, Any]) -> None:
    first = next(block.code for block in blocks(ROOT / "docs/attention.md"))
    alone: dict[str, Any] = {}
    exec(first, alone)
    attention_is_right(alone)
    sequences_are_right(names)
    exports_are_right(names)


def sequences_are_right(names: dict[str, Any]) -> None:
    """Packed, padded and in windows, against attention in float64 of each image and each window."""
    grid, windows = names["grid"], names["windows"]
    for index, ((height, width), start) in enumerate(zip(grid.images, grid.cu_seqlens.tolist(), strict=False)):
        stop = start + height * width
        image: dict[str, Any] = {name: names[name][None, start:stop] for name in "qkv"}
        image |= {"grid": spatial_pe.PatchGrid(height, width)}
        attention_is_right(image | {"out": names["out"][None, start:stop]})
        attention_is_right(image | {"out": names["batch"][index : index + 1, : height * width]})
        assert not names["batch"][index, height * width :].any()
    bounds = windows.cu_seqlens.tolist()
    assert len(bounds) - 1 == 4 * 3 + 2 * 2
    for start, stop in pairwise(bounds):
        tokens = windows.permutation[start:stop]
        window: dict[str, Any] = {name: names[name][None, tokens] for name in "qkv"}
        place = SimpleNamespace(coordinates=lambda tokens=tokens: grid.coordinates()[tokens])
        attention_is_right(window | {"grid": place, "out": names["local"][None, tokens]})


def transforms_page(names: dict[str, Any]) -> None:
    import onnx

    program_is_right(names)
    written = {node.op_type for node in onnx.load("model.onnx").graph.node}
    assert {"RotaryEmbedding", "Attention"} <= written


def encodings_page(names: dict[str, Any]) -> None:
    assert names["rotary"].num_tokens == 5 + 14 * 14
    assert "rotation: yes; relative: yes" in names["capsys"].readouterr().out


# What must hold after the code of a page.
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "README.md": attention_is_right,
    "docs/attention.md": attention_page,
    "docs/transforms.md": transforms_page,
    "docs/encodings.md": encodings_page,
}


def reader(capsys) -> dict[str, Any]:
    """The names that pages use without making them."""
    torch.manual_seed(0)
    model, pixels = Tower().eval().requires_grad_(False), torch.randn(1, 3, 12, 8)
    names: dict[str, Any] = {"torch": torch, "spatial_pe": spatial_pe}
    names |= {"model": model, "pixels": pixels, "args": (pixels,)}
    names |= {"loss": lambda x: model(x[None]).square().sum()}
    return names | {"my_rope": spatial_pe.AxialRoPE(16)(spatial_pe.PatchGrid(16, 16)), "capsys": capsys}


WITH_CODE = [name for name, path in NAMES.items() if any(block.story is None for block in blocks(path))]


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_runs_in_its_order_and_is_right(name, tmp_path, monkeypatch, capsys):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # it writes files
    names = reader(capsys)
    for block in blocks(NAMES[name]):
        if block.story is None:
            code = "\n" * (block.line - 1) + block.code  # so that an error names the page's own line
            exec(compile(code, str(NAMES[name]), "exec"), names)
    if name in CHECKS:
        CHECKS[name](names)


def test_a_wrong_result_is_noticed():
    names: dict[str, Any] = {}
    (code,) = [block.code for block in blocks(NAMES["README.md"]) if block.story is None]
    exec(code.replace("head_dim=64)", "head_dim=64, theta=5000.0)"), names)
    with pytest.raises(AssertionError):
        attention_is_right(names)


def test_every_story_has_a_test():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    stories = {block.story for path in PAGES for block in blocks(path)} - {None}
    assert stories and {name for name in stories if f'story("{name}")' not in tests} == set()
    with pytest.raises(ValueError, match="hold 0 different stories 'none'"):
        story("none")


# --------------------------------------------------------------------------------------------------------------- links


def targets(page: Path) -> list[Path]:
    """Where its links lead."""
    return [page.parent / link for link in docs_site.links(page.read_text())]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", *NAMES])
def test_links_lead_to_files_and_to_pages_of_the_site(page):
    for target in targets(ROOT / page):
        assert target.exists(), f"{page} links to {target}, which does not exist"
        inside = str(target.resolve().relative_to(ROOT))
        assert docs_site.site_path(inside) is not None, f"{page} links to {inside}, which is not on the site"


def test_links_are_rewritten_for_the_site():
    def site(text, page):
        return docs_site.rewritten(text, page)

    assert site("[a](docs/towers.md#x) ![b](docs/demo.png)", "README.md") == "[a](towers.md#x) ![b](demo.png)"
    assert site("[c](CONTRIBUTING.md)", "README.md") == "[c](contributing.md)"
    assert site("[d](../examples/packed_images.py)", "docs/patching.md") == "[d](examples/packed_images.md)"
    assert site("[e](../adding.md)", "docs/reference/extending.md") == "[e](../adding.md)"
    assert site("[f](https://arxiv.org/abs/1)", "README.md") == "[f](https://arxiv.org/abs/1)"
    assert site("[g](../spatial_pe/grid.py)", "docs/towers.md") == "[g](../spatial_pe/grid.py)"  # mkdocs refuses it


def test_examples_become_pages():
    page = docs_site.example_page("examples/packed_images.py")
    title, rest = page.split("\n", 1)
    assert title == "# Attend over images of different size in one call, without padding"
    assert rest.count("```") == 2 and "\nimport torch\n" in rest and "SPDX" not in rest


def test_every_page_and_example_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    pages = {str(path.relative_to(ROOT / "docs")) for path in PAGES if path.name != "README.md"}
    assert {*pages, *docs_site.PAGES.values()} - set(re.findall(r"[\w/-]+\.md$", navigation, re.MULTILINE)) == set()


def test_reports_are_drawn_of_all_results(tmp_path, monkeypatch):
    monkeypatch.setattr(reports.speed, "html", lambda result: result["kind"])
    monkeypatch.setattr(reports.accuracy, "html", lambda studies: " ".join(study["study"] for study in studies))
    written = {path.name: path.read_text() for path in reports.write(tmp_path / "reports")}
    assert written == {"speed.html": "spatial-bench", "accuracy.html": "convergence data encodings llava pretrained"}
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f"reports/{name}\n" in navigation for name in written)


# ---------------------------------------------------------------------------------------------------- files and names


FOLDERS = ("benchmarks", "csrc", "docs", "examples", "spatial_pe", "tests", "tools")
# of an example, or written by a command
NOT_THERE = {"spatial_pe/backends/float64.py"}


@pytest.fixture(scope="module")
def files():
    return [str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*")]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/internals.svg", *NAMES])
def test_files_that_are_named_exist(page, files):
    text = (ROOT / page).read_text()
    if page.endswith(".svg"):  # without spatial_pe/, and a folder said once for all behind it
        named = set(re.findall(r"[\w/]+\.(?:py|h)\b", text))
        missing = {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)}
    else:
        named = re.findall(rf"`(?:python (?:-m )?)?((?:{'|'.join(FOLDERS)})/[\w/.-]*\w)", text)
        modules = re.findall(rf"python -m ((?:{'|'.join(FOLDERS)})\.[\w.]*\w)", text)
        missing = {*named, *(name.replace(".", "/") + ".py" for name in modules)} - {*files, *FOLDERS, *NOT_THERE}
    assert missing == set()


REFERENCE = "\n".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))


def test_the_reference_holds_every_public_name_once():
    held = re.findall(r"^::: spatial_pe\.(\w+)$", REFERENCE, re.MULTILINE)
    assert sorted(held) == sorted(spatial_pe.__all__)


def documented(thing: Any) -> list[str]:
    """The names of the Args section of a docstring; "k, v: ..." are two."""
    section = re.search(r"^Args:\n((?:[ ].*\n|\n)*)", inspect.getdoc(thing) or "", re.MULTILINE)
    lines = re.findall(r"^    (\w[\w, ]*):", section[1] if section else "", re.MULTILINE)
    return [name.strip() for line in lines for name in line.split(",")]


@pytest.mark.parametrize("name", [n for n in spatial_pe.__all__ if callable(getattr(spatial_pe, n))])
def test_documented_arguments_exist(name):
    thing = getattr(spatial_pe, name)
    made = thing.__init__ if isinstance(thing, type) else thing
    assert set(documented(thing)) <= set(inspect.signature(made).parameters)


def test_arguments_are_found_in_docstrings():
    assert documented(spatial_pe.rope_attention)[:3] == ["q", "k", "v"]
