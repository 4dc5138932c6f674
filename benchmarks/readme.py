# SPDX-License-Identifier: Apache-2.0
"""Rewrites the README's tables, and the pictures of the accuracy study, from benchmarks/results/cpu.

    python -m benchmarks.readme [--check]

``--check`` writes nothing and fails if the README is stale.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from pathlib import Path

from spatial_pe.spatial import findings, report, study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def demo() -> str:
    result = load("demo")
    rows = [
        [
            f"{row['dtype']}, {row['size']} px",
            f"{row['error']['relative']:.1e}",
            "" if row["relative_error_to_float32"] is None else f"{row['relative_error_to_float32']['before']:.1e}",
            f"{row['error']['cosine_mean']:.6f}",
            f"{row['images_per_second']['before']:.2f}",
            f"{row['images_per_second']['after']:.2f}",
            f"**{row['speed_up']:.2f}x**",
        ]
        for row in result["rows"]
    ]
    header = ["", "relative error", "bf16's own", "cosine", "images/s before", "after", "speed-up"]
    return table(header, rows) + f"\n\n`make demo`; {machine(result['environment'])}."


def results() -> str:
    return "\n\n".join([attention(), peers(), towers()])


def attention() -> str:
    result = load("attention")
    cases: dict[tuple, dict] = {}
    for row in result["rows"]:
        cases.setdefault((row["dtype"], row["shape"]), {"size": row["size"]})[row["direction"], row["threads"]] = row
    rows = []
    for (dtype, _), case in cases.items():
        batch, heads, tokens, dim = case["size"]
        windows = f"{batch} windows of {tokens}, {heads} heads, {dim}"
        cells = [dtype, windows if case["forward", 1]["shape"] == "windows" else f"{batch}, {heads}, {tokens}, {dim}"]
        for direction in ("forward", "backward"):
            one, two = case[direction, 1], case[direction, 2]
            cells += [f"{one['gflops']['ours']:.0f} / {two['gflops']['ours']:.0f}"]
            cells += [f"**{one['speedup']:.2f}x** / {two['speedup']:.2f}x"]
        cells += [f"{case['forward', 1]['rotation_cost']:+.1%}"]
        rows.append(cells)
    header = ["", "batch, heads, tokens, head_dim", "forward, GF/s", "against eager", "backward, GF/s", "against eager"]
    intro = (
        "The CPU kernel, one / two threads, against what Hugging Face's towers do (rotate-half in float32, then "
        "torch's SDPA, a call for each window); last column: the forward's rotation on against off.\n\n"
    )
    return intro + table([*header, "rotation"], rows) + f"\n\n`{result['command']}`; {machine(result)}."


def peers() -> str:
    result = load("peers")
    rows = []
    for row in result["rows"]:
        rates = row["gflops"]
        cells = [row["dtype"], row["shape"], str(row["threads"]), f"{rates['ours']:.0f}", f"{rates['openvino']:.0f}"]
        cells += [f"{rates['onnxruntime']:.0f}" if "onnxruntime" in rates else "–"]
        cells += [f"**{row['against_best_peer']:.2f}x**"]
        rows.append(cells)
    intro = "Forward in GF/s against OpenVINO and ONNX Runtime. They do not rotate; we do.\n\n"
    header = ["", "tokens", "threads", "spatial_pe", "OpenVINO", "ONNX Runtime", "against the best peer"]
    return intro + table(header, rows) + f"\n\n`{result['command']}`; {machine(result)}."


def towers() -> str:
    result = load("towers")
    rows = [[r["what"], r["dtype"], f"{r['sdpa_share']:.0%}", f"**{r['speedup']:.2f}x**"] for r in result["rows"]]
    intro = "Whole towers, two threads, patched against unpatched.\n\n"
    header = ["tower", "", "SDPA's share before", "speed-up"]
    return intro + table(header, rows) + f"\n\n`{result['command']}`; {machine(result)}."


# (file, part, heading): the columns of the table of encodings
STUDIED = (
    ("encodings", "objects", "shapes"),
    ("encodings", "photographs", "photographs"),
    ("encodings", "odd", "odd one out"),
    ("encodings", "map", "way on a map"),
    ("data", "scenes1000", "shapes, 1,000 pictures"),
    ("convergence", "objects", "shapes, 4x steps"),
    ("llava", "objects", "tiny LLaVA"),
)
TOWER = tuple(("pretrained", part, part) for part in ("frozen, linear", "frozen, attentive", "fine-tuned"))


def accuracy() -> str:
    intro = (
        "Skill in %: accuracy without chance, mean over the tasks; ± 95 % interval over the seeds. Best of a column in "
        "bold.\n\n"
    )
    added = "DINOv2-small before and after 2D RoPE is added, on handwriting and photographs; skill in %.\n\n"
    return "\n\n".join([intro + skills(STUDIED), differences(STUDIED), added + skills(TOWER), differences(TOWER)])


def figures() -> None:
    """The README's pictures of the accuracy study."""
    from matplotlib import rc_context

    from spatial_pe import page
    from spatial_pe.spatial import charts

    with rc_context(page.style()):
        for name, figure in (
            ("tasks", charts.by_task(spatial("encodings"), "objects")),
            ("curves", charts.curves(spatial("convergence"), "objects")),
        ):
            figure.savefig(ROOT / "docs" / f"spatial_{name}.png", dpi=110, facecolor="white", bbox_inches="tight")


def skills(columns: tuple[tuple[str, str, str], ...]) -> str:
    found = [{row.encoding: row.cells["1.0 index"] for row in findings.by_scale(spatial(f), p)} for f, p, _ in columns]
    best = [max(cells, key=lambda name: cells[name].value) for cells in found]
    rows = []
    for name in study.LABELS:
        cells = [cells.get(name) for cells in found]
        if any(cells):
            texts = ["" if m is None else f"{100 * m.value:.0f} ± {100 * m.half:.0f}" for m in cells]
            marked = [f"**{text}**" if top == name else text for text, top in zip(texts, best, strict=True)]
            rows.append([study.LABELS[name], *marked])
    return table(["", *(heading for *_, heading in columns)], rows)


def differences(columns: tuple[tuple[str, str, str], ...]) -> str:
    found = [
        {(c.encoding, c.reference): c.result for c in findings.comparisons(spatial(f), p) if c.column in KEY}
        for f, p, _ in columns
    ]
    rows = []
    for pair in findings.PAIRS:
        results = [comparisons.get(pair) for comparisons in found]
        if any(results):
            names = " − ".join(study.LABELS[name] for name in pair)
            rows.append([names, *("" if r is None else report.difference(r) for r in results)])
    files = dict.fromkeys(file for file, *_ in columns)
    commands = "; ".join(f"`{command}`" for file in files for command in spatial(file)["commands"])
    note = f"\n\n{report.MARKED} {commands}; {machine(spatial(next(iter(files)))['environments'][0])}."
    return table(["difference of skill, points", *(heading for *_, heading in columns)], rows) + note


KEY = ("skill", "odd", "path")  # the last two where they are the only task: their accuracy


@functools.cache
def spatial(name: str) -> dict:
    return study.load(RESULTS / "spatial" / f"{name}.json")


def machine(result: dict) -> str:
    versions = result["versions"]
    names = ("torch", "transformers", "openvino", "onnxruntime")
    peers = [f"{name} {versions[name]}" for name in names if name in versions]
    return ", ".join([result["cpu"], *peers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the README is stale")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    text = path.read_text()
    for name, make in (("demo", demo), ("results", results), ("accuracy", accuracy)):
        block = f"<!-- {name}: written by `python -m benchmarks.readme` -->\n{make()}\n<!-- end of {name} -->"
        stale = re.compile(rf"<!-- {name}: .*?<!-- end of {name} -->", re.DOTALL)
        text, count = stale.subn(lambda _, block=block: block, text)
        if count != 1:
            sys.exit(f"README.md must hold one block of {name}, found {count}")
    if check and text != path.read_text():
        sys.exit("README.md is stale: run python -m benchmarks.readme")
    if not check:
        path.write_text(text)
        figures()


if __name__ == "__main__":
    main()
