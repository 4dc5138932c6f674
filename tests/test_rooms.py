# SPDX-License-Identifier: Apache-2.0
"""Imports between the rooms of the package run down, and no two modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "spatial_pe"
# From the ground up: a room may import those before it. The package itself (its __init__) is the roof.
ROOMS = (
    *("_version", "_utils", "rotary", "grid", "encodings", "conventions", "rotary_findings", "rotary_report"),
    *("backends", "ops", "tuning", "modules", "towers", "integrations", "lab", "cli", ""),
)


def modules() -> dict[str, Path]:
    """Return dotted name, without the package, -> file."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of all imports within the package, those in functions too, but for types."""
    file = MODULES[name]
    here = name.split(".") if name else []
    package = here if file.name == "__init__.py" else here[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in for_types:
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif (node.module or "").split(".")[0] == "spatial_pe":
            base = []
        else:
            continue
        inner = (node.module or "").split(".") if node.module else []
        target = [*base, *(inner if node.level else inner[1:])]
        for alias in node.names:
            full = ".".join([*target, alias.name])
            yield (full if full in MODULES else ".".join(target)), node.lineno


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_a_place():
    assert {room(name) for name in MODULES} == set(ROOMS)


def test_no_import_runs_up():
    found = [
        f"spatial_pe/{name.replace('.', '/')}:{line} imports {target or 'spatial_pe'}"
        for name in MODULES
        for target, line in imports(name)
        if ROOMS.index(room(target)) > ROOMS.index(room(name))
    ]
    assert not found, "\n".join(found)


def test_no_two_modules_import_each_other():
    arrows = {name: {target for target, _ in imports(name)} - {name} for name in MODULES}

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        todo = [name]
        while todo:
            for target in arrows[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    circles = sorted(name for name in MODULES if name in reached(name))
    assert not circles, circles
