# SPDX-License-Identifier: Apache-2.0
"""Build a model from its configuration alone, and print what spatial_pe.patch would do to it."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import torch

from .._utils.console import first_line, progress
from .._utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="a checkpoint folder, a config.json, a hub id (owner/name), or a model type of transformers (dinov3_vit)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the PatchReport; fail if nothing in the model can be patched."""
    import transformers

    from ..towers import inspect

    transformers.logging.set_verbosity_error()
    show = progress(f"Inspecting {options.model}")
    show(0, 3, "reading the configuration")
    config = _load_config(options.model)
    show(1, 3, "building the model without memory")
    with torch.device("meta"):  # shapes and classes, no memory: a 70 B model is inspected in seconds
        model = _build(config)
    _lend_weights(model)
    show(2, 3, "checking each kind of layer")
    try:
        report = inspect(model)
        show(3, 3, "done")
    except RuntimeError as error:  # a tested class fails its proof: the user cannot fix that
        print(f"spatial-pe inspect: {error}", file=sys.stderr)
        return 1
    print(f"{type(model).__name__} ({config.model_type})\n{report}")
    if report.patched:
        return 0
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children())
    raise UserError(f"nothing in this model can be patched; it holds {children}")


def _load_config(name: str) -> PretrainedConfig:
    """Load the config of a file or folder, a model type, or the hub, in this order."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{name!r} holds no config.json (found: {found})")
    if not path.exists() and name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]()
    if not path.exists() and (name.startswith((".", "/", "~")) or path.suffix == ".json"):
        raise UserError(f"{name!r} does not exist")
    if not path.exists() and name.count("/") != 1:
        close = [key for key in CONFIG_MAPPING if name.lower().split("_")[0].split("-")[0] in key][:8]
        hint = f"; model types like it: {', '.join(close)}" if close else ""
        raise UserError(f"{name!r} is no file or folder, no model type of transformers and no hub id{hint}")
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else name)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, ... for files it does not understand
        what = f"the configuration in {name!r} is not valid" if path.exists() else f"no configuration of {name!r}"
        raise UserError(f"{what}: {shorten(first_line(error), 200)}") from error


def _build(config: PretrainedConfig) -> torch.nn.Module:
    """Build the model of a configuration. AutoModel does not list every tower: those are found next to their config."""
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
        raise UserError(
            f"no model could be built from this {config.model_type!r} configuration: {first_line(error)}"
        ) from error
    raise UserError(f"transformers has no model for a {config.model_type!r} configuration ({type(config).__name__})")


def _lend_weights(model: torch.nn.Module) -> None:
    """Fill in random weights for what can be patched, one set for all identical layers: the memory of one layer.

    With them ``inspect`` can verify what it reports, and select the backend for this machine instead of "meta".
    """
    from ..towers.discover import Candidate, discover

    lent: dict[tuple, torch.nn.Parameter] = {}
    generator = torch.Generator().manual_seed(0)
    for found in discover(model):
        if not isinstance(found, Candidate):
            continue
        for path, module in found.module.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                key = (type(found.module), path, name, parameter.shape)
                if key not in lent:
                    x = torch.randn(parameter.shape, generator=generator)
                    # matrices keep the scale of their input; vectors are biases, or scales of a norm around 1
                    x = x / parameter.shape[-1] ** 0.5 if x.ndim > 1 else 0.1 * x + (name == "weight")
                    lent[key] = torch.nn.Parameter(x, requires_grad=False)
                setattr(module, name, lent[key])
