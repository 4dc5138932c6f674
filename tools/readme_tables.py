# SPDX-License-Identifier: Apache-2.0
"""Rewrite the tables of the README and the docs, and the pictures of the accuracy study, from benchmarks/results/cpu.

    python -m tools.readme_tables [--check]

``--check`` writes nothing and fails if a table is stale.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from spatial_pe.lab.bench import report as bench_report
from spatial_pe.lab.bench import result as bench
from spatial_pe.lab.bench import tower_peers
from spatial_pe.lab.bench.cases import DIRECTIONS, SPEED
from spatial_pe.lab.bench.variants import PEERS, VARIANTS
from spatial_pe.lab.demo import measure
from spatial_pe.lab.study import findings, report, study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def demo() -> str:
    result = load("demo")
    # the rates of schema 1 are separate medians, so the ratio may differ in the fourth digit
    shown = "{:.2f}".format if result["schema"] == 1 else measure.significant
    rows = [
        [
            f"{row['dtype']}, {row['size']} px",
            f"{row['error']['relative']:.1e}",
            "" if row["relative_error_to_float32"] is None else f"{row['relative_error_to_float32']['before']:.1e}",
            f"{row['error']['cosine_mean']:.6f}",
            shown(row["images_per_second"]["before"]),
            shown(row["images_per_second"]["after"]),
            "too noisy" if row.get("too_noisy") else f"**{row['speed_up']:.2f}x**",
        ]
        for row in result["rows"]
    ]
    header = ["", "relative error", "bf16's own", "cosine", "images/s before", "after", "speed-up"]
    parts = [table(header, rows)]
    if result.get("towers"):  # since schema 3
        parts += [
            "Towers that rotate, at their real widths, with few layers and random weights, float32.",
            rotating(result),
        ]
    return "\n\n".join([*parts, f"`make demo`; {machine(result['environment'])}."])


def rotating(result: dict) -> str:
    rows = [
        [
            f"{row['name']}, {row['what']}",
            f"{row['tokens']:,}",
            f"{row['error']['relative']:.1e}",
            *(measure.significant(row["images_per_second"][when]) for when in ("before", "after")),
            "too noisy" if row["too_noisy"] else f"**{row['speed_up']:.2f}x**",
            before_after(row, "kernels", str),
            before_after(row, "peak_bytes", lambda size: f"{size / 2**20:.1f}"),
        ]
        for row in result["towers"]
    ]
    header = ["", "tokens", "relative error", "images/s before", "after", "speed-up", "kernels a layer", "MiB a layer"]
    return table(header, rows)


def before_after(row: dict, what: str, shown: Callable[[int], str]) -> str:
    """Return a count of an attention layer before and after, empty if it was not counted."""
    return "" if row["layer"] is None else " → ".join(shown(row["layer"][what][when]) for when in ("before", "after"))


# (suite, row, dtype, label): the README's numbers, wins and near-losses
NUMBERS = (
    ("attention", "windows", "fp32", "attention of 70 windows of 64 tokens, 16 heads of 80, against Hugging Face's"),
    ("attention", "576", "fp32", "attention of 4 images of 576 tokens, 16 heads of 64, against Hugging Face's"),
    ("towers", "pixtral", "fp32", "Pixtral's tower (4 layers), four images, patched against unpatched"),
    ("towers", "siglip_so400m", "fp32", "SigLIP-so400m's tower (4 layers), patched against unpatched"),
)


def numbers() -> str:
    """Return five gains, with their machines."""
    result = load("bench")
    rows = []
    for suite, name, dtype, what in NUMBERS:
        found = [row for row in bench.rows(result, suite) if (row["name"], row["dtype"]) == (name, dtype)]
        if suite == "attention":
            found = [row for row in found if (row["direction"], row["threads"]) == ("forward", 2)]
            gain = bench.speedup(found[0], "eager")
        else:
            gain = bench.speedup(found[0], "before", of="after")
        rows.append([f"{what}, {dtype}", CORES[result["cpu"]], f"{gain:.2f}x"])
    shown = load("demo")
    tower = next(row for row in shown["rows"] if (row["dtype"], row["size"]) == ("bf16", 518))
    what = "DINOv2-small with its real weights, 518 px, patched against unpatched, bf16"
    rows.append([what, CORES[shown["environment"]["cpu"]], f"{tower['speed_up']:.2f}x"])
    return table(["forward", "machine, two cores", "gain"], rows)


CORES = {
    "AMD EPYC (family 25, model 1)": "AMD Zen 3: AVX2",
    "AMD EPYC (family 25, model 17)": "AMD Zen 4: AVX-512, bfloat16",
}


def results() -> str:
    """Return the results of every measured machine."""
    found = [bench.load(path) for path in sorted(RESULTS.glob("bench*.json"))]
    return "\n\n".join(
        part for result in found for part in (peak(result), attention(result), peers(result), rest(result))
    )


def peak(result: dict) -> str:
    """Return the machine, and the share of its peak that is reached."""
    reached: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for row in bench.rows(result, "attention"):
        if row["threads"] == 1 and row["direction"] == "forward" and not row["shape"]["packed"]:
            reached[row["dtype"]].append((bench.gflops(row, "ours") or 0) / result["peaks"]["gflops"][row["dtype"]])
    peaks = result["peaks"]["gflops"]
    said = [
        f"{peaks[dtype]:.0f} GF/s in {dtype}, of which the forward has {min(part):.0%} to {max(part):.0%}"
        for dtype, part in reached.items()
    ]
    return (
        f"**{result['cpu']}, {result['cores']} cores, {result['cpu_features']['isa']}.** A core multiplies and adds on "
        f"registers at {'; at '.join(said)} (without windows). GF/s and ratios with one / two threads; eager is what "
        "Hugging Face's towers do: rotate-half in float32, then torch's SDPA, a call for each window. Last column: the "
        "forward's rotation on against off."
    )


def attention(result: dict) -> str:
    rows = []
    for (dtype, _), case in by_case(result).items():
        cells = [dtype, size(case["forward", 1])]
        for direction in DIRECTIONS:
            one, two = case[direction, 1], case[direction, 2]
            cells += [f"{bench.gflops(one, 'ours'):.0f} / {bench.gflops(two, 'ours'):.0f}"]
            cells += [f"**{bench.speedup(one, 'eager'):.2f}x** / {bench.speedup(two, 'eager'):.2f}x"]
        compiled = [bench.speedup(case["forward", threads], "compiled") for threads in (1, 2)]
        cells += [" / ".join("–" if ratio is None else f"{ratio:.2f}x" for ratio in compiled)]
        rows.append([*cells, f"{bench.rotation_cost(case['forward', 1]):+.1%}"])
    header = ["", "batch, heads, tokens, head_dim", "forward", "against eager", "backward", "against eager"]
    return table([*header, "forward against torch.compile", "rotation"], rows)


def peers(result: dict) -> str:
    rows = []
    for (dtype, _), case in by_case(result).items():
        cells = [dtype, size(case["forward", 1])]
        for threads in (1, 2):
            row = case["forward", threads]
            cells += ["–" if (r := bench.speedup(row, name)) is None else f"{r:.2f}x" for name in PEERS]
            cells += [f"**{bench.speedup(row, bench.best(row, PEERS) or ''):.2f}x**"]
        rows.append(cells)
    labels = [VARIANTS[name].label for name in PEERS]
    header = ["", "batch, heads, tokens, head_dim", *(f"{label}, 1 thread" for label in labels), "the better"]
    intro = "The forward against the peers, which rotate in a kernel of their own before attention.\n\n"
    return intro + table([*header, *(f"{label}, 2 threads" for label in labels), "the better"], rows)


def rest(result: dict) -> str:
    """Return towers, memory, and the first call."""
    memory = [
        [str(row["shape"]["tokens"]), *(f"{row['bytes'][name] / 2**20:.1f}" for name in ("ours", "eager", "naive"))]
        for row in bench.rows(result, "memory")
    ]
    (start,) = bench.rows(result, "start")
    took = ", ".join(f"{name} {bench.seconds(start, name):.2g} s" for name in start["seconds"])
    command = re.sub(" --out .*", "", result["command"])
    parts = [
        whole_towers(result),
        "Peak memory of the forward in MiB beside inputs and output, 8 heads of 64, float32.",
        table(["tokens", "spatial_pe", "eager rotation, SDPA", "eager attention"], memory),
        f"What a process pays once: {took}; nothing is built or tuned at first use.",
        f"`{command}`; {machine(result)}. How it grows with tokens, batch, heads, windows "
        "and threads, layers and the roofline are in the report, which `make docs` draws.",
    ]
    return "\n\n".join(parts)


def whole_towers(result: dict) -> str:
    """Return the table of whole towers, beside the engines that were measured with them."""
    found = bench_report.towers_table(result)
    return f"{found.caption} All cores.\n\n" + table(list(found.header), [list(row) for row in found.rows])


def engines() -> str:
    """Return the tables of the machines on which whole towers were measured beside compilers and engines."""
    found = [bench.load(path) for path in sorted(RESULTS.glob("towers*.json"))]
    if not found:
        return "Not measured yet."
    return "\n\n".join(
        f"**{result['cpu']}, {result['cores']} cores, {result['cpu_features']['isa']}.** {whole_towers(result)}\n\n"
        f"{left_out(result)}`{result['command']}`; {machine(result)}."
        for result in found
    )


def cross() -> str:
    result = load("cross")
    found = bench_report.cross_table(result)
    return (
        f"{table(list(found.header), [list(row) for row in found.rows])}\n\n`{result['command']}`; {machine(result)}."
    )


def space() -> str:
    result = load("space")
    found = bench_report.space_table(result)
    return (
        f"{table(list(found.header), [list(row) for row in found.rows])}\n\n`{result['command']}`; {machine(result)}."
    )


def left_out(result: dict) -> str:
    """Return a sentence on the engines that took no part, with their reasons."""
    reasons: dict[str, list[str]] = {}
    for row in bench.rows(result, "towers"):
        for name, why in row["refused"].items():
            reasons.setdefault(f"{tower_peers.PEERS[name][0]}: {why}", []).append(f"{row['name']} {row['dtype']}")
    return "".join(f"– in the table: {why} ({', '.join(where)}). " for why, where in reasons.items())


def by_case(result: dict) -> dict[tuple, dict]:
    """Return (dtype, shape's name) -> (direction, threads) -> row."""
    cases: dict[tuple, dict] = {}
    for row in bench.rows(result, "attention"):
        cases.setdefault((row["dtype"], row["name"]), {})[row["direction"], row["threads"]] = row
    return dict(sorted(cases.items(), key=lambda case: list(SPEED).index(case[0][1])))


def size(row: dict) -> str:
    shape = row["shape"]
    if shape["packed"]:
        return f"{shape['batch']} windows of {shape['tokens']}, {shape['heads']} heads, {shape['head_dim']}"
    return ", ".join(str(shape[name]) for name in ("batch", "heads", "tokens", "head_dim"))


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
    """Draw the pictures of the accuracy study."""
    from matplotlib import rc_context

    from spatial_pe.lab.report import page
    from spatial_pe.lab.study import charts

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


# file -> its blocks
BLOCKS = {
    "README.md": {"numbers": numbers},
    "docs/benchmarks.md": {"demo": demo, "results": results, "cross": cross, "space": space, "engines": engines},
    "docs/spatial-study.md": {"accuracy": accuracy},
}


def written(file: str, text: str) -> str:
    """Return the text of a file with its blocks updated from the results."""
    for name, make in BLOCKS[file].items():
        block = f"<!-- {name}: written by `python -m tools.readme_tables` -->\n{make()}\n<!-- end of {name} -->"
        stale = re.compile(rf"<!-- {name}: .*?<!-- end of {name} -->", re.DOTALL)
        text, count = stale.subn(lambda _, block=block: block, text)
        if count != 1:
            sys.exit(f"{file} must hold one block of {name}, found {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a table is stale")
    check = parser.parse_args().check
    for file in BLOCKS:
        path = ROOT / file
        before = path.read_text()
        text = written(file, before)
        if check and text != before:
            sys.exit(f"{file} is stale: run python -m tools.readme_tables")
        if not check:
            path.write_text(text)
    if not check:
        figures()


if __name__ == "__main__":
    main()
