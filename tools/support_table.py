# SPDX-License-Identifier: Apache-2.0
"""The table of docs/towers.md, from what ``inspect`` proves and counts on every family of the tests.

python -m tools.support_table --json        # this environment's families
make support-table                           # both transformers, and timm, into docs/towers.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OLD = ROOT / ".venv" / "transformers-4.57"
BEGIN, END = "<!-- support: written by `make support-table` -->", "<!-- end of support -->"
TOWERS = ROOT / "docs/towers.md"


def proven() -> dict[str, dict]:
    """Return the row of each family, for those of this transformers."""
    from families import FAMILIES, GRIDS, HERE

    return {name: row(name, FAMILIES[name].make, name in GRIDS) for name in HERE}


def proven_of_timm() -> dict[str, dict]:
    from timm_cases import ADDED, CASES

    return {name: row(name, case.build, name in ADDED) for name, case in CASES.items()}


def row(name: str, make: Callable[[], Any], added: bool) -> dict:
    """Return attention class, convention, kernels before and after; verified in float32 and bfloat16."""
    import torch

    from spatial_pe import inspect

    torch.set_num_threads(1)
    reports = [inspect(make().to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    rows = [row for report in reports for row in report.patched]
    assert rows and all(row.error is not None for row in rows), f"{name} is not proven: {reports}"
    first = rows[0]
    kernels = [first.own_cost.kernels, first.cost.kernels] if first.cost and first.own_cost else None
    return {"attention": first.attention, "convention": first.convention, "kernels": kernels, "added": added}


def versions() -> dict[str, str]:
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("transformers", "torch")}


def elsewhere(path: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Return the same with other packages first on the path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    command = [sys.executable, "-m", "tools.support_table", "--json"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    read = json.loads(run.stdout.splitlines()[-1])
    return read["families"], read["versions"]


def table() -> str:
    new = proven()
    old, old_versions = elsewhere(OLD)
    both = {name: new.get(name) or old[name] for name in dict.fromkeys([*new, *old])}
    labels = [".".join(v["transformers"].split(".")[:2]) for v in (versions(), old_versions)]
    of_transformers = _markdown("tower", both, dict(zip(labels, (new, old), strict=True)))
    return "\n\n".join([of_transformers, _timm(), _packages()])


def _packages() -> str:
    """Return the table of tests/models: each kind of attention of each package."""
    from packages import PACKAGES, on_the_path

    from spatial_pe import inspect

    on_the_path()
    header = ["public code", "package", "attention", "what it has", "kernels a layer", "RoPE can be added"]
    lines = [header, ["---"] * len(header)]
    for name, package in PACKAGES.items():
        seen: dict[tuple, Any] = {}
        for row in inspect(package.make()).patched:
            seen.setdefault((row.attention, row.convention), row)
        for (attention, convention), row in seen.items():
            assert row.error is not None, f"{name} is not proven"
            kernels = f"{row.own_cost.kernels} → {row.cost.kernels}" if row.cost and row.own_cost else ""
            version, added = f"{package.name} {package.version}", "✓" if package.added else ""
            lines.append([name, version, f"`{attention}`", convention, kernels, added])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _timm() -> str:
    rows = proven_of_timm()
    import timm

    return _markdown("timm's", rows, {timm.__version__: rows})


def _markdown(title: str, rows: dict[str, dict], where: dict[str, dict[str, dict]]) -> str:
    header = [title, "attention", "what it has", *where, "kernels a layer", "RoPE can be added"]
    lines = [header, ["---"] * len(header)]
    for name, row in rows.items():
        kernels = "{} → {}".format(*row["kernels"]) if row["kernels"] else ""
        marks = ["✓" if name in found else "" for found in where.values()]
        lines.append([name, f"`{row['attention']}`", row["convention"], *marks, kernels, "✓" if row["added"] else ""])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def in_docs() -> str:
    return TOWERS.read_text().split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print this environment's families")
    if parser.parse_args().json:
        print(json.dumps({"families": proven(), "versions": versions()}))
        return
    before, rest = TOWERS.read_text().split(BEGIN)
    TOWERS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
