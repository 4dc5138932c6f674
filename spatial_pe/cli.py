# SPDX-License-Identifier: Apache-2.0
"""The command line: spatial-pe doctor | inspect | demo.

Exit codes: 0 for success, 1 where something is broken or a result is wrong, 2 for a wrong argument or a missing
package, with one line on stderr and no traceback.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import environment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class UsageError(Exception):
    """What the user can put right: the message says how."""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    options.command = shlex.join(["spatial-pe", *argv])
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
    parser.add_argument("--version", action="version", version=f"spatial_pe {_version()}")
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
    return parser


def _version() -> str:
    return environment.versions().get("spatial_pe", "(not installed, run from source)")


# -------------------------------------------------------------------------------------------------------------- doctor


def run_doctor(options: argparse.Namespace) -> int:
    """Prints what is there. What is merely absent is no error; what is there and does not work is."""
    machine = environment.describe()
    print(f"spatial_pe   {_version()}")
    for package, number in machine["versions"].items():
        if package != "spatial_pe":
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
        print("extension    not built: the cpu backend is missing (reinstall with a C++17 compiler on the PATH)")
        return []
    try:
        from . import _C

        features = _C.cpu_features()
    except Exception as error:  # whatever a binary built for another machine or Python may raise
        print("extension    built, but it does not load")
        return [f"the compiled extension does not load ({type(error).__name__}: {error}): reinstall spatial_pe"]
    flags = " ".join(features.get("flags", ())) or "no flags"
    print(f"extension    uses {features['isa']} kernels; sees {flags}")
    print(f"             compiled by {features.get('compiler') or 'an unknown compiler'}")
    print(f"             CUDA kernels: {features.get('cuda') or 'not built'}")
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
    return broken


def _self_check(backend: str) -> str | None:
    """One small rotated attention against the reference in float64: what is wrong with the backend, or None."""
    from .attention import rope_attention
    from .rotary import Rotary

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 17, 3, 64, generator=generator)
    rotary = Rotary.from_angles(torch.rand(17, 32, generator=generator) * 6)
    exact = rope_attention(q.double(), k.double(), v.double(), rotary, backend="reference")
    refusal = "no device"
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            out = rope_attention(*(x.to(device) for x in (q, k, v)), rotary.to(device), backend=backend)
        except ValueError as error:  # a backend serves one kind of device
            refusal = str(error)
            continue
        error = (out.cpu() - exact).abs().max().item()
        return None if error < 1e-3 else f"error {error:.1e} against the reference"
    return refusal


# ------------------------------------------------------------------------------------------------------------- inspect


def run_inspect(options: argparse.Namespace) -> int:
    """Prints the PatchReport; fails where nothing in the model can be patched."""
    _need("transformers", extra="hf")
    from .towers import inspect

    config = _load_config(options.model)
    with torch.device("meta"):  # shapes and classes, no memory: a 70 B model is inspected in seconds
        model = _build(config)
    report = inspect(model)
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
        raise UsageError(f"no configuration in {name!r}: {_first_line(error)}") from error


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
            f"no model could be built from this {config.model_type!r} configuration: {_first_line(error)}"
        ) from error
    raise UsageError(f"transformers has no model for a {config.model_type!r} configuration ({type(config).__name__})")


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


# -------------------------------------------------------------------------------------------------------------- shared


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"needs the package {module!r}, which is missing: pip install 'spatial_pe[{extra}]'")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
