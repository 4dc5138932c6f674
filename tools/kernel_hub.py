# SPDX-License-Identifier: Apache-2.0
"""A folder that Hugging Face ``kernels`` loads: the layers and the ops of this package, without the package.

python -m tools.kernel_hub --out build/kernel

The folder has a variant for the CPU and one for CUDA, both of Python and Triton alone: torch's attention behind the
rotation on a CPU, the Triton kernels on a GPU. What the ops need is found by their imports, which are relative; names
that torch registers once in a process get the variant's own.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "spatial_pe"
LAYERS = "integrations/kernel_layers.py"
ROOTS = (LAYERS, "ops/attention.py", "ops/rotate.py", "rotary.py", "grid.py", "encodings.py")
BACKENDS = ("cpu", "cuda")
INIT = '''"""2D rotary position encoding fused into attention, for vision transformers."""

from .encodings import AxialRoPE, MixedRoPE
from .grid import PatchGrid
from .integrations import kernel_layers as layers
from .ops.attention import rope_attention
from .ops.rotate import apply_rotary, apply_rotary_qk
from .rotary import Rotary

__all__ = [
    "AxialRoPE",
    "MixedRoPE",
    "PatchGrid",
    "Rotary",
    "apply_rotary",
    "apply_rotary_qk",
    "layers",
    "rope_attention",
]
'''


def needed(roots: tuple[str, ...]) -> list[Path]:
    """Return the files that these need, themselves included, by their relative imports."""
    found: dict[Path, None] = {}
    waiting = [PACKAGE / root for root in roots]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        folder = path.parent
        while folder != PACKAGE:  # a module's packages run before it
            waiting.append(folder / "__init__.py")
            folder = folder.parent
        waiting += imported(path)
    return sorted(found)


def imported(path: Path) -> Iterator[Path]:
    """Yield the files of the package that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = path.parent
        for _ in range(node.level - 1):
            base = base.parent
        for part in (node.module or "").split("."):
            base = base / part if part else base
        if base.with_suffix(".py").is_file() and node.module:
            yield base.with_suffix(".py")
            continue
        for alias in node.names:  # from . import a module, or a name of a package
            for candidate in (base / f"{alias.name}.py", base / alias.name / "__init__.py"):
                if candidate.is_file():
                    yield candidate
        if base != PACKAGE and (base / "__init__.py").is_file():
            yield base / "__init__.py"


def own_names(source: str, name: str) -> str:
    """Return source code with the names that are registered in a process replaced by those of this kernel."""
    for before, after in (
        ("torch.ops.spatial_pe", f"torch.ops.{name}"),
        ('"spatial_pe::', f'"{name}::'),
        ('Library("spatial_pe"', f'Library("{name}"'),
        ('"spatial_pe._C"', f'"{name}._C"'),
        ('"spatial_pe._cuda"', f'"{name}._cuda"'),
    ):
        source = source.replace(before, after)
    return source


def build(out: Path) -> None:
    """Write the folder; what was there is replaced."""
    files = needed(ROOTS)
    version = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
    shutil.rmtree(out, ignore_errors=True)
    for backend in BACKENDS:
        name = f"spatial_pe_{backend}_{version}"
        variant = out / "build" / f"torch-{backend}"
        for path in files:
            target = variant / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(own_names(path.read_text(), name))
        (variant / "__init__.py").write_text(INIT)
        metadata = {
            "id": name,
            "name": "spatial-pe",
            "version": 1,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/kernel"))
    out = parser.parse_args().out
    build(out)
    print(f"wrote {out}: {', '.join(f'build/torch-{backend}' for backend in BACKENDS)}")


if __name__ == "__main__":
    main()
