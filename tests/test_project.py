# SPDX-License-Identifier: Apache-2.0
"""What the project's files say of versions, in several places: one and the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import spatial_pe

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"


def text(name: str) -> str:
    return (ROOT / name).read_text()


def workflow(name: str) -> dict:
    return yaml.safe_load(text(f".github/workflows/{name}.yml"))


pytestmark = pytest.mark.skipif(not GITHUB.exists(), reason="a source distribution: no .github")


def test_the_version_is_the_same_everywhere():
    declared = re.findall(r'^version = "(.*)"', text("pyproject.toml"), re.MULTILINE)
    cited = str(yaml.safe_load(text("CITATION.cff"))["version"])
    assert [*declared, cited] == [spatial_pe.__version__] * 2


def test_workflows_test_the_oldest_and_the_newest():
    pairs = [
        (row["python"], row["torch"]) for row in workflow("test")["jobs"]["versions"]["strategy"]["matrix"]["include"]
    ]
    torches = re.search(r"^TORCHES := (.*)$", text("Makefile"), re.MULTILINE)[1].split()
    assert [torch for _, torch in pairs] == torches
    project = text("pyproject.toml")
    assert f'requires-python = ">={pairs[0][0]}"' in project and f'"torch>={pairs[0][1].removesuffix(".0")}"' in project
    assert pairs[-1][0] == "3.13"


def test_wheels_are_built_for_the_platforms_that_are_named():
    jobs = workflow("wheels")["jobs"]
    assert jobs["wheels"]["strategy"]["matrix"]["os"] == ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-15"]
    project = text("pyproject.toml")
    assert 'SPATIAL_PE_CUDA = "0"' in project and "--exclude libgomp.so.1" in project


@pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda path: path.name)
def test_make_targets_of_workflows_exist(path):
    targets = set(re.findall(r"run: make ([\w-]+)", path.read_text()))
    there = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE)) | {"test-torch-"}
    assert targets <= there


def test_the_bug_form_asks_for_the_doctor():
    form = yaml.safe_load(text(".github/ISSUE_TEMPLATE/bug.yml"))
    (doctor,) = [part for part in form["body"] if part.get("id") == "doctor"]
    assert "`spatial-pe doctor`" in doctor["attributes"]["label"] and doctor["validations"]["required"]


def test_the_tools_of_the_docs_are_pinned():
    (packages,) = re.findall(r"pip install --quiet (mkdocs==.*?)\n\ttouch", text("Makefile"), re.DOTALL)
    assert all("==" in package for package in packages.replace("\\", "").split() if package != "ruff")
