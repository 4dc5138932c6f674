# SPDX-License-Identifier: Apache-2.0
"""Write report.md from the JSON files of the steps: measurements, models, and which targets are met.

    python -m benchmarks.throughput.gpu.report DIR

Needs no torch and no GPU. A figure without a mark was measured; others are marked "modelled"; a target is met, MISSED,
or its row says "not run".
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import model, state

# Groups of equivalent variants, of which the best counts: Hugging Face's towers, with any SDPA; the same compiled; our
# rotary kernel and any attention.
GROUPS = {
    "eager": ("eager-default", "eager-cudnn", "eager-flash"),
    "compiled": ("compiled", "compiled-cudnn"),
    "separate": (
        *("rotary-default", "rotary-cudnn", "rotary-flash", "rotary-varlen"),
        *("flex", "fa2", "fa3", "fa4", "cudnn-rope"),
    ),
}
LOOP = "eager-loop"  # Qwen2.5-VL's tower for windows, on torch's SDPA
WINDOW = 64
DIRECTIONS = ("forward", "backward", "forward+backward")
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Target for the forward of the large batch; None where there is none."""

    tokens: int
    dim: int
    eager: float  # times as fast as eager rotary + the best SDPA
    separate: float | None  # times as fast as our rotary kernel + the best attention
    rotation: float | None  # rotation on against off, at most
    auto: float | None = None  # times as fast as the fastest of all paths


TARGETS = (
    Target(64, 64, 4.0, 1.7, 0.03),
    Target(64, 80, 4.0, 1.7, 0.03),
    Target(196, 64, 3.0, 1.3, 0.05),
    Target(256, 64, 3.0, 1.3, 0.05),
    Target(576, 64, 2.5, 1.15, 0.05),
    Target(729, 72, 2.5, 1.1, 0.05),
    Target(1024, 64, 2.0, 1.0, 0.06),
    Target(1025, 64, 2.0, 1.0, 0.06),
    Target(1024, 80, 2.0, 1.0, 0.06),
    Target(4096, 64, 1.3, None, None, 0.98),
)


@dataclass(frozen=True)
class CudaTarget:
    """Target for the CUDA kernels on an H200 with the large batch: speed relative to our rotary kernel + the best
    attention. Rotation on against off: CUDA_ROTATION at most."""

    tokens: int
    dim: int
    forward: float
    backward: float | None = None


CUDA_ROTATION = 0.03
CUDA_TARGETS = (
    CudaTarget(64, 80, 1.7, 1.3),
    CudaTarget(196, 64, 1.4, 1.3),
    CudaTarget(256, 64, 1.4, 1.3),
    CudaTarget(576, 64, 1.2),
    CudaTarget(729, 72, 1.25),
)


def write(folder: Path) -> None:
    content = merged([state.load(path) for path in sorted(folder.glob("step?.json"))])
    (folder / "report.md").write_text(table(content))
    print(targets(content["rows"]), flush=True)


def merged(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge all steps: concatenate their lists, and take the rest from any."""
    found: dict[str, Any] = state.new()
    for content in contents:
        for name, value in content.items():
            if name in state.LISTS:
                found[name] += [{"step": content["step"], **x} if isinstance(x, dict) else x for x in value]
            elif name == "compiled":
                found[name] = {**found.get(name, {}), **value}
            else:
                found.setdefault(name, value)
    return found


# -------------------------------------------------------------------------------------------------------------- ratios


def best(row: Row, group: str) -> str | None:
    """Return the fastest variant of a group that has run, if any."""
    found = [name for name in GROUPS[group] if name in row["median_ms"]]
    return min(found, key=row["median_ms"].get, default=None)


def against(row: Row, name: str | None, mine: str = "ours") -> float | None:
    """Return the speed of `mine` relative to another; below 1 it is slower."""
    times = row["median_ms"]
    return times[name] / times[mine] if name in times and mine in times else None


def rotation_cost(row: Row, mine: str = "ours", plain: str = "off") -> float | None:
    ratio = against(row, plain, mine)
    return None if ratio is None else 1 / ratio - 1


def auto_ratio(row: Row) -> float | None:
    """Return backend="auto" relative to the fastest of all paths that a user could choose."""
    paths = ["ours", "cuda", *GROUPS["eager"], *GROUPS["separate"]]
    found = [row["median_ms"][name] for name in paths if name in row["median_ms"]]
    auto = row["median_ms"].get("auto")
    return min(found) / auto if found and auto else None


def large(rows: Iterable[Row]) -> dict[tuple[int, int], Row]:
    """Return the rows with the largest batch of each (tokens, head_dim)."""
    found: dict[tuple[int, int], Row] = {}
    for row in rows:
        batch, _, tokens, dim = row["size"]
        if (tokens, dim) not in found or batch > found[tokens, dim]["size"][0]:
            found[tokens, dim] = row
    return found


# --------------------------------------------------------------------------------------------------------------- table


def table(content: dict[str, Any]) -> str:
    device, versions = content.get("device", {}), content.get("machine", {}).get("versions", {})
    what = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        f"# Attention with 2D RoPE on {device.get('name', 'an unknown GPU')}",
        f"bf16, 16 heads; medians of interleaved samples. {what}, CUDA {device.get('cuda')}, "
        f"cuDNN {device.get('cudnn')}",
        'A figure without a mark was measured in this run; "modelled" is a model (gpu/model.py), and no measurement.',
        phases(content["phases"]),
        checks(content["checks"]),
        targets(content["rows"]),
        cuda_targets(content["rows"]),
        shapes(content["rows"]),
        rotary(content["rows"]),
        layers(content["layers"]),
        tuning(content.get("tuned", {})),
        host(content.get("host_microseconds", {})),
        left_out(content),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def phases(found: list[Row]) -> str:
    cells = [
        [str(entry["step"]), entry["name"], f"{entry['seconds']:.0f} s", "" if entry["ok"] else "FAILED", entry["note"]]
        for entry in found
    ]
    return "## What ran\n\n" + markdown(["step", "", "", "", ""], cells) if cells else ""


def checks(found: list[Row]) -> str:
    """Format by kernel and dtype: the worst row of all shapes, and whether it is within the limit and deterministic."""
    groups: dict[tuple[str, str, str], list[tuple[float | None, str | None]]] = {}
    for row in found:
        errors = row.get("worst_row") or {row["unit"]: None}
        for name, error in errors.items():
            kernel = row.get("kernels", {}).get(name, name)
            why = f"not run: {row['refused']}" if "refused" in row else None
            if wrong := row.get("wrong"):  # of this result, or of the call
                mine = [part for part in wrong.split("; ") if part.startswith(f"{name}:")]
                named = any(wrong.startswith(f"{other}:") for other in errors)
                if mine or not named:
                    why = f"WRONG, {'x'.join(map(str, row['size']))}: {'; '.join(mine) or wrong}"
            groups.setdefault((row["backend"], kernel, row["dtype"]), []).append((error, why))
    cells = []
    for (backend, kernel, dtype), results in groups.items():
        errors = [error for error, _ in results if error is not None]
        reasons = "; ".join(dict.fromkeys(why for _, why in results if why))
        worst = f"{max(errors):.2%}" if errors else "not run"
        cells.append([backend, kernel, dtype, worst, reasons[:300] or "right"])
    what = "The worst row of all target shapes relative to its norm, against float64 on the GPU; two runs bit for bit."
    return f"## Kernels\n\n{what}\n\n" + markdown(["", "kernel", "", "worst row", ""], cells) if cells else ""


def targets(rows: list[Row]) -> str:
    """Format every target and its result, in the forward; and the backward, which has none."""
    forward = large(row for row in rows if row["direction"] == "forward")
    backward = large(row for row in rows if row["direction"] == "backward")
    cells = []
    for target in TARGETS:
        row = forward.get((target.tokens, target.dim))
        if row is None:
            cells.append([_name(target.tokens, target.dim), *modelled(target), *["not run"] * 4])
            continue
        eager, separate = best(row, "eager"), best(row, "separate")
        trained = backward.get((target.tokens, target.dim), {"median_ms": {}})
        cells.append(
            [
                _name(target.tokens, target.dim),
                judged(against(row, eager), target.eager, eager),
                judged(against(row, separate), target.separate, separate),
                judged_cost(rotation_cost(row), target.rotation),
                judged(auto_ratio(row), target.auto, None),
                *(times(against(trained, best(trained, group))) for group in ("eager", "separate")),
            ]
        )
    header = ["large batch, forward", "against eager + best SDPA", "against our rotary kernel + best attention"]
    header += ["rotation on / off", "auto / fastest path", "backward against eager", "backward against rotary + best"]
    return "## Targets\n\nOf the forward; the last two columns have none.\n\n" + markdown(header, cells)


def modelled(target: Target) -> list[str]:
    """Return the modelled ratios of a target that was not measured."""
    size = [model.LARGE // target.tokens, model.HEADS, target.tokens, target.dim]
    ours, others = (
        model.milliseconds("ours", size),
        (model.milliseconds(x, size) for x in ("eager-cudnn", "rotary-cudnn")),
    )
    return [f"not run (modelled {ms / ours:.2f}x)" if ms and ours else "not run" for ms in others]


def cuda_targets(rows: list[Row]) -> str:
    """Format the CUDA targets, or nothing if the CUDA kernels have not run."""
    if not any("cuda" in row["median_ms"] for row in rows):
        return ""
    found = {name: large(row for row in rows if row["direction"] == name) for name in ("forward", "backward")}
    cells = []
    for target in CUDA_TARGETS:
        forward, backward = (found[name].get((target.tokens, target.dim), {"median_ms": {}}) for name in found)
        ratios = [(row, best(row, "separate")) for row in (forward, backward)]
        cells.append(
            [
                _name(target.tokens, target.dim),
                judged(against(*ratios[0], mine="cuda"), target.forward, ratios[0][1]),
                judged_cost(rotation_cost(forward, "cuda", "cuda-off"), CUDA_ROTATION),
                judged(against(*ratios[1], mine="cuda"), target.backward, ratios[1][1]),
            ]
        )
    header = ["large batch", "forward against our rotary kernel + best attention", "rotation on / off"]
    header += ["backward against our rotary kernel + best attention"]
    return "## Targets of the CUDA kernels\n\n" + markdown(header, cells)


def shapes(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        if row["direction"] not in DIRECTIONS:
            continue
        expected = model.milliseconds("ours", row["size"], row["direction"])
        ms = row["median_ms"].get("ours")
        chosen = {group: best(row, group) for group in GROUPS}
        ratios = [f"{times(against(row, name))} {name or ''}".strip() for name in chosen.values()]
        if LOOP in row["median_ms"]:
            ratios[0] += f"; {times(against(row, LOOP))} {LOOP}"
        cost = rotation_cost(row)
        cells.append(
            [
                label(row),
                row["direction"],
                "–" if ms is None else f"{1e3 * ms:.0f}",
                "–" if expected is None else f"{1e3 * expected:.0f}",
                *(rate(row, name) for name in ("ours", "off", "cuda", "cuda-off")),
                *ratios,
                "–" if cost is None else f"{cost:+.1%}",
                times(auto_ratio(row)),
            ]
        )
    header = ["batch x tokens, head_dim", "", "ours, us", "modelled, us", "ours (Triton), TFLOP/s", "rotation off"]
    header += ["CUDA", "rotation off"]
    header += ["against eager + best SDPA"]
    header += ["against compiled", "against our rotary kernel + best", "rotation on / off", "auto / fastest path"]
    return "## All shapes\n\nBelow 1.00x ours is slower.\n\n" + markdown(header, cells) if cells else ""


def rotary(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        if row["direction"] == "rotary":
            speed = row["gigabytes_per_second"]
            share = against(row, "copy", "kernel")
            cells.append(
                [
                    label(row),
                    *(f"{speed[name]:,.0f}" if name in speed else "–" for name in ("kernel", "copy", "eager")),
                    "–" if share is None else f"{share:.0%}",
                    times(against(row, "eager", "kernel")),
                ]
            )
    header = ["batch x tokens, head_dim", "kernel, GB/s", "copy, GB/s", "eager, GB/s", "of a copy's speed"]
    header += ["against eager"]
    what = "GB/s of the bytes that must move: q and k read and written, the tables read."
    return f"## The rotary kernel alone\n\n{what}\n\n{markdown(header, cells)}" if cells else ""


def layers(found: list[Row]) -> str:
    cells = []
    for row in found:
        if "refused" in row:
            cells.append([row["name"], f"not run: {row['refused']}", *["–"] * 4])
            continue
        for direction, ms in row["median_ms"].items():
            cells.append(
                [
                    row["what"],
                    direction,
                    *(f"{ms[name]:.2f}" for name in ("unpatched", "patched")),
                    times(ms["unpatched"] / ms["patched"]),
                    f"{', '.join(row['kernels']) or '–'}; differs by {row['differs_by']:.1e}",
                ]
            )
    header = ["", "", "unpatched, ms", "patched, ms", "as fast", "Triton's kernels"]
    what = "The whole tower with one layer, transformers' class, called as users call it; SDPA before."
    return f"## Layers of real towers\n\n{what}\n\n{markdown(header, cells)}" if cells else ""


def tuning(found: dict[str, Row]) -> str:
    cells = [
        [
            name,
            *(row["faster"][use] for use in ("inference", "training")),
            "; ".join(row.get("failed", []))[:300] or "–",
        ]
        for name, row in found.items()
    ]
    header = ["", "inference", "training", "left out"]
    return f"## Tuning\n\nWhich backend was fastest.\n\n{markdown(header, cells)}" if cells else ""


def host(found: dict[str, Any]) -> str:
    cells = [
        [name, f"{entry['median']:.1f}" if "median" in entry else f"refused: {entry['refused']}"]
        for name, entry in found.items()
    ]
    what = "Microseconds of Python and launching, 1 x 196 tokens, 16 heads of 64."
    return f"## The host's part of a forward call\n\n{what}\n\n{markdown(['', 'us'], cells)}" if cells else ""


def left_out(content: dict[str, Any]) -> str:
    """List what did not run, and why."""
    reasons: dict[tuple[str, str], int] = {}
    for row in content["rows"]:
        for name, why in row["refused"].items():
            reasons[name, why] = reasons.get((name, why), 0) + 1
    lines = [f"- {name}, {count} times: {why[:160]}" for (name, why), count in reasons.items()]
    for entry in content["broken"]:
        where = f"{entry['size']}, {entry['direction']}"
        lines.append(f"- {entry['variant']} at {where}, broke: {entry['why']}")
    missing = content.get("not_run", [])
    if missing:
        names = ", ".join(f"{'x'.join(map(str, size))} {direction}" for size, direction in missing)
        lines.append(f"- no time for {len(missing)} (batch x heads x tokens x head_dim): {names}")
    return "## Not run\n\n" + "\n".join(lines) if lines else ""


def label(row: Row) -> str:
    batch, _, tokens, dim = row["size"]
    return f"{batch} {'windows of' if row['packed'] else 'x'} {tokens}, {dim}"


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"


def rate(row: Row, name: str) -> str:
    return f"{row['tflops'][name]:.0f}" if name in row["tflops"] else "–"


def judged(ratio: float | None, promised: float | None, name: str | None) -> str:
    if ratio is None:
        return "not run" if promised is not None else "–"
    beside = f" ({name})" if name else ""
    if promised is None:
        return f"{ratio:.2f}x{beside}"
    return f"{ratio:.2f}x{beside}, {'met' if ratio >= promised else 'MISSED'}: >= {promised:g}x"


def judged_cost(cost: float | None, promised: float | None) -> str:
    if cost is None:
        return "not run" if promised is not None else "–"
    if promised is None:
        return f"{cost:+.1%}"
    return f"{cost:+.1%}, {'met' if cost <= promised else 'MISSED'}: <= {promised:.0%}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def _name(tokens: int, dim: int) -> str:
    return f"{'windows of ' if tokens == WINDOW else ''}{tokens}, {dim}"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
