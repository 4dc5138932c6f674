# SPDX-License-Identifier: Apache-2.0
"""Write the HTML reports of the docs from the results in benchmarks/results/cpu.

python -m tools.reports --out docs/reports
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spatial_pe._utils.files import write_whole
from spatial_pe.lab.bench import report as speed
from spatial_pe.lab.bench import result as bench
from spatial_pe.lab.study import report as accuracy
from spatial_pe.lab.study import study

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu"


def write(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Write speed.html and accuracy.html into the folder and return their paths."""
    studies = [study.load(path) for path in sorted((results / "spatial").glob("*.json"))]
    pages = {"speed": speed.html(bench.load(results / "bench.json")), "accuracy": accuracy.html(studies)}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, page in pages.items():
        written.append(folder / f"{name}.html")
        write_whole(written[-1], page)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/reports"), metavar="DIR", help="default: docs/reports")
    for path in write(parser.parse_args().out):
        print(f"Wrote {path}")


if __name__ == "__main__":
    main()
