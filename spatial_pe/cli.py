# SPDX-License-Identifier: Apache-2.0
"""The command line: spatial-pe doctor | inspect | demo | tune | bench | spatial.

Exit codes: 0 for success, 1 where something is broken or a result is wrong, 2 for a wrong argument or a missing
package, with one line on stderr and no traceback.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import __version__, environment
from .terminal import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class UsageError(Exception):
    """What the user can put right: the message says how."""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options, rest = _parser().parse_known_args(argv)
    options.command = shlex.join(["spatial-pe", *argv])
    if options.subcommand == "spatial":
        options.arguments = argv[argv.index("spatial") + 1 :]
    elif rest:
        _parser().parse_args(argv)  # says what it does not know
    try:
        return options.run(options)
    except UsageError as error:
        print(f"spatial-pe {options.subcommand}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spatial-pe", description="2D rotary position encoding, fused into attention, for vision towers."
    )
    parser.add_argument("--version", action="version", version=f"spatial_pe {__version__}")
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what this machine has, which backends work, and why one does not")
    doctor.set_defaults(run=run_doctor)

    inspect = commands.add_parser(
        "inspect",
        help="what patch() would do to a model, without its weights",
        description="Builds the model from its configuration alone and prints what spatial_pe.patch would do to it.",
    )
    inspect.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="a checkpoint folder, a config.json, a hub id (owner/name), or a model type of transformers (dinov3_vit)",
    )
    inspect.set_defaults(run=run_inspect)

    demo = commands.add_parser(
        "demo",
        help="real photographs through a real tower, before and after patch()",
        description="Features and throughput of a pretrained tower before and after spatial_pe.patch, on photographs. "
        "Prints both, draws a PNG.",
    )
    demo.add_argument("--model", metavar="PATH_OR_HUB_ID", help="another checkpoint (default: DINOv2-small)")
    demo.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    demo.add_argument("--batch", type=int, default=4, metavar="N", help="images per run when timing (default: 4)")
    demo.add_argument("--out", type=Path, default=Path("demo.png"), metavar="FILE", help="picture (default: demo.png)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    demo.add_argument("--quick", action="store_true", help="224 px only and few repeats: seconds instead of minutes")
    demo.set_defaults(run=run_demo)

    tune = commands.add_parser(
        "tune",
        help="measure the tile sizes of the Triton kernels and the backends on this GPU, and keep what wins",
        description="Times a few tile sizes of each Triton kernel on the shapes that vision towers have, and whether "
        "the CUDA kernels or torch's own attention are faster; without Triton, which of these two. Calls of later "
        "processes on this GPU, with these versions, use what won.",
    )
    tune.add_argument("--quick", action="store_true", help="seven shapes instead of twenty")
    tune.add_argument("--seconds", type=float, default=float("inf"), metavar="N", help="begin no shape after this long")
    tune.add_argument("--device", default="cuda", metavar="DEVICE", help="which GPU (default: cuda)")
    tune.add_argument("--out", type=Path, metavar="FILE", help="write what was measured here as well")
    tune.set_defaults(run=run_tune)

    bench = commands.add_parser(
        "bench", help="how fast attention and vision towers are on this machine, against what would be used instead"
    )
    bench.add_argument("--quick", action="store_true", help="two minutes on two cores, in place of an hour")
    bench.add_argument("--model", metavar="M", help="the tower of a checkpoint folder or hub id, and nothing else")
    bench.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    bench.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="default: bench.json")
    bench.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    bench.set_defaults(run=run_bench)

    # its arguments are parsed by the package that it needs: scikit-learn and scikit-image are optional
    spatial = commands.add_parser(
        "spatial", add_help=False, help="the accuracy study of position encodings, and published spatial benchmarks"
    )
    spatial.set_defaults(run=run_spatial)
    return parser


# -------------------------------------------------------------------------------------------------------------- doctor


def run_doctor(options: argparse.Namespace) -> int:
    """Prints what is there. What is merely absent is no error; what is there and does not work is."""
    machine = environment.describe()
    for package, number in machine["versions"].items():
        print(f"{package:<12} {number}")
    if "transformers" not in machine["versions"]:
        print("transformers missing: patch() and inspect need it (pip install spatial_pe[hf])")
    print(f"system       {machine['system']} {machine['machine']}")
    print(f"cpu          {machine['cpu']}, {machine['cores']} usable cores, torch uses {machine['threads']} threads")
    print(f"gpu          {machine['gpu'] or 'none that torch can use'}")
    print(f"torch sees   {machine['torch_cpu_capability']}")
    broken = [*_print_extension(), *_print_backends()]
    for what in broken:
        print(f"BROKEN: {what}", file=sys.stderr)
    return 1 if broken else 0


def _print_extension() -> list[str]:
    """What the compiled extension says of itself; returns what is broken about it."""
    if importlib.util.find_spec("spatial_pe._C") is None:
        log = Path(__file__).with_name("_build_failure.txt")  # left by setup.py
        why = log.read_text(encoding="utf-8").strip() if log.is_file() else "no compiler when it was installed"
        print(f"extension    not built, so no cpu backend: {why}")
        return []
    try:
        features = importlib.import_module("spatial_pe._C").cpu_features()
        print(f"extension    uses {features['isa']} kernels; sees {' '.join(features['flags']) or 'no flags'}")
        threads = "OpenMP" if features["openmp"] else "no OpenMP: one thread only"
        print(f"             compiled by {features['compiler']}, {threads}")
    except Exception as error:  # whatever a binary built for another machine or Python may raise
        print("extension    built, but it does not work")
        return [f"the compiled extension does not work ({type(error).__name__}: {error}): reinstall spatial_pe"]
    if importlib.util.find_spec("spatial_pe._cuda") is None:
        return []  # the table of backends says so
    try:
        cuda = importlib.import_module("spatial_pe._cuda")
        devices, why = cuda.devices()
        found = ", ".join(device["name"] for device in devices) or f"no device ({why})"
        print(f"             CUDA kernels for {cuda.architectures}, compiled by {cuda.compiler}; finds {found}")
    except Exception as error:
        print("             CUDA kernels built, but they do not load")
        return [f"the CUDA extension does not load ({type(error).__name__}: {error}): reinstall spatial_pe"]
    return []


def _print_backends() -> list[str]:
    """The table of backends, each available one tried against the reference; returns what is broken."""
    from .backends.select import backends

    print("backends")
    broken = []
    for name, why in backends():
        if why is not None:
            print(f"  {name:<10} missing: {why}")
            continue
        try:
            error = _self_check(name)
        except Exception as failure:  # a broken kernel may raise anything: say so, and go on with the others
            error = f"{type(failure).__name__}: {failure}"
        if error is None:
            print(f"  {name:<10} available, agrees with the reference")
        else:
            print(f"  {name:<10} available, BUT WRONG")
            broken.append(f'backend "{name}": {error}')
    for line in (*_automatic(), *_behind_the_rotation()) if not broken else ():
        print(line)
    return broken


def _automatic() -> list[str]:
    """What backend="auto" takes on the CPU for each dtype, and why not the first that it asks."""
    from .backends.call import Call
    from .backends.select import AUTO, refusal, select

    lines = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.empty(1, 256, 6, 64, dtype=dtype)
        call = Call(x, x, x, None, 0.125, None, None, None)
        why = refusal(AUTO[0], call)
        lines.append(f"  auto       {str(dtype).removeprefix('torch.')} on the CPU: {select(call, 'auto')}")
        lines[-1] += "" if why is None else f" (not {AUTO[0]}: {why})"
    return lines


def _behind_the_rotation() -> list[str]:
    """Which attention the composed path uses on the GPU for dense and packed images, and why; without a GPU, what of
    flash-attn is here."""
    from .backends import flash
    from .backends.call import Call

    if not torch.cuda.is_available():
        states = {provider.name: flash.unusable(provider) for provider in flash.PROVIDERS}
        found = ", ".join(name for name, why in states.items() if why is None) or "nothing but torch's own attention"
        return [f"  composed   has, for GPUs: {found}"]
    lines = []
    for form, tokens in (("dense", 576), ("dense", 4096), ("packed", 4096)):
        x = torch.empty(1, tokens, 16, 64, dtype=torch.bfloat16, device=flash.DEVICE)
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=flash.DEVICE) if form == "packed" else None
        row, why = flash.choose(Call(x, x, x, None, 0.125, bounds, tokens if form == "packed" else None, None))
        name = "torch's own attention" if row is None else row.provider.name
        lines.append(f"  composed   {form} bfloat16, {tokens} tokens, on the GPU: {name} ({why})")
    return lines


def _self_check(backend: str) -> str | None:
    """One small rotated attention against the reference in float64: what is wrong with the backend, or None."""
    from .attention import rope_attention
    from .rotary import Rotary

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 17, 3, 64, generator=generator)
    rotary = Rotary.from_angles(torch.rand(17, 32, generator=generator) * 6)
    exact = rope_attention(q.double(), k.double(), v.double(), rotary, backend="reference")
    refusal = "no device"
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device, (dtype, most) in itertools.product(devices, {torch.float32: 1e-3, torch.bfloat16: 3e-2}.items()):
        try:
            x, y, z = (t.to(device, dtype) for t in (q, k, v))
            out = rope_attention(x, y, z, rotary.to(device), backend=backend)
        except ValueError as why:  # a backend serves one kind of device, and not every dtype
            refusal = str(why)
            continue
        error = (out.cpu() - exact).abs().max().item()
        return None if error < most else f"error {error:.1e} against the reference"
    return refusal


# ------------------------------------------------------------------------------------------------------------- inspect


def run_inspect(options: argparse.Namespace) -> int:
    """Prints the PatchReport; fails where nothing in the model can be patched."""
    _need("transformers", extra="hf")
    import transformers

    from .towers import inspect

    transformers.logging.set_verbosity_error()
    config = _load_config(options.model)
    with torch.device("meta"):  # shapes and classes, no memory: a 70 B model is inspected in seconds
        model = _build(config)
    _lend_weights(model)
    try:
        report = inspect(model)
    except RuntimeError as error:  # a tested class fails its proof: the user cannot put that right
        print(f"spatial-pe inspect: {error}", file=sys.stderr)
        return 1
    print(f"{type(model).__name__} ({config.model_type})\n{report}")
    if report.patched:
        return 0
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
    raise UsageError(f"nothing in this model can be patched; it holds {children}")


def _load_config(name: str) -> PretrainedConfig:
    """From a file or folder, a model type, or the hub, in this order."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UsageError(f"{name!r} holds no config.json (found: {found})")
    if not path.exists() and name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]()
    if not path.exists() and name.count("/") != 1:
        close = [key for key in CONFIG_MAPPING if name.lower().split("_")[0].split("-")[0] in key][:8]
        hint = f"; model types like it: {', '.join(close)}" if close else ""
        raise UsageError(f"{name!r} is no file or folder, no model type of transformers and no hub id{hint}")
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else name)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, ... for files it does not understand
        raise UsageError(f"no configuration in {name!r}: {first_line(error)}") from error


def _build(config: PretrainedConfig) -> torch.nn.Module:
    """The model of a configuration. AutoModel does not list every tower: those are found beside their configuration."""
    from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel

    try:
        if type(config) in MODEL_MAPPING:
            return AutoModel.from_config(config).eval()
        home = type(config).__module__.replace(".configuration_", ".modeling_")
        classes = vars(importlib.import_module(home)).values()
        towers = [c for c in classes if isinstance(c, type) and issubclass(c, PreTrainedModel)]
        towers = [c for c in towers if c.config_class is type(config) and not c.__name__.endswith("PreTrainedModel")]
        if towers:
            return towers[0](config).eval()
    except Exception as error:  # a configuration may hold anything, and models do not check theirs
        raise UsageError(
            f"no model could be built from this {config.model_type!r} configuration: {first_line(error)}"
        ) from error
    raise UsageError(f"transformers has no model for a {config.model_type!r} configuration ({type(config).__name__})")


def _lend_weights(model: torch.nn.Module) -> None:
    """Random weights for what can be patched, one set for all alike layers: the memory of one layer.

    With them ``inspect`` can prove what it reports, and choose the backend for this machine instead of "meta".
    """
    from .towers.discover import discover

    lent: dict[tuple, torch.nn.Parameter] = {}
    generator = torch.Generator().manual_seed(0)
    for found in discover(model):
        if found.reason is not None:
            continue
        for path, module in found.module.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                key = (type(found.module), path, name, parameter.shape)
                if key not in lent:
                    x = torch.randn(parameter.shape, generator=generator)
                    # matrices keep the size of what they multiply; vectors are biases, or scales of a norm around 1
                    x = x / parameter.shape[-1] ** 0.5 if x.ndim > 1 else 0.1 * x + (name == "weight")
                    lent[key] = torch.nn.Parameter(x, requires_grad=False)
                setattr(module, name, lent[key])


# ---------------------------------------------------------------------------------------------------------------- demo


def run_demo(options: argparse.Namespace) -> int:
    for package in ("transformers", "skimage", "matplotlib", *(() if options.model else ("onnx", "onnxruntime"))):
        _need(package, extra="demo")
    from . import demo

    chosen = {name: getattr(options, name) for name in ("model", "out", "json", "batch", "threads", "quick", "command")}
    try:
        demo.run(demo.Options(**chosen))
    except demo.ResultError as error:
        print(f"spatial-pe demo: {error}", file=sys.stderr)
        return 1
    except (demo.ArgumentError, demo.assets.AssetError, demo.checkpoint.CheckpointError) as error:
        raise UsageError(str(error)) from error
    return 0


# ---------------------------------------------------------------------------------------------------------------- tune


def run_tune(options: argparse.Namespace) -> int:
    """Measures tiles and backends on the GPU, shape by shape; what is measured is saved at once."""
    if options.seconds <= 0:
        raise UsageError(f"--seconds must be positive, got {options.seconds:g}")
    from .backends import cuda, triton

    reasons = {backend.unavailable() for backend in (triton, cuda)}
    if None not in reasons:
        raise UsageError(f"nothing to tune: {'; '.join(sorted(map(str, reasons)))}")
    try:
        device = torch.device(options.device)
        device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        name = torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"--device {options.device}: {first_line(error)}") from None
    from .backends.triton import tune, tuned

    print(f"{name}, torch {torch.__version__}")
    problems = tune.QUICK if options.quick else tune.PROBLEMS
    rows = tune.tune(problems, device, options.seconds, copy=options.out)
    print(f"{len(rows)} shapes measured: {tuned.path(device)}")
    return 0 if rows else 1


# ------------------------------------------------------------------------------------------------------------- spatial


def run_spatial(options: argparse.Namespace) -> int:
    for package in ("sklearn", "skimage", "scipy", "jinja2", "transformers", "matplotlib"):
        _need(package, extra="spatial")
    from .spatial import command

    return command.main(options.arguments, options.command)


# --------------------------------------------------------------------------------------------------------------- bench


def run_bench(options: argparse.Namespace) -> int:
    for package in ("transformers", "matplotlib", "jinja2"):
        _need(package, extra="bench")
    from .bench import command

    try:
        return command.run(options, options.command)
    except command.BenchError as error:
        raise UsageError(str(error)) from error


# -------------------------------------------------------------------------------------------------------------- shared


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"needs the package {module!r}, which is missing: pip install 'spatial_pe[{extra}]'")


if __name__ == "__main__":
    sys.exit(main())
