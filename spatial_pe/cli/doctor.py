# SPDX-License-Identifier: Apache-2.0
"""List the backends of this machine, check each against the reference, and explain why any is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import sys

import torch

from .._utils import environment
from .._utils.console import wrap
from ..backends.base import AttentionCall
from ..ops import flash
from ..ops.attention import rope_attention
from ..ops.select import AUTO, backends, refusal, select
from ..rotary import Rotary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(options: argparse.Namespace) -> int:
    """Print the report. Missing optional parts are not errors; installed but broken parts are."""
    machine = environment.describe()
    for package, number in machine["versions"].items():
        _say(f"{package:<12} {number}")
    if "transformers" not in machine["versions"]:
        _say("transformers missing: patch() and inspect need it (pip install spatial_pe[hf])")
    _say(f"system       {machine['system']} {machine['machine']}")
    _say(f"cpu          {machine['cpu']}, {machine['cores']} usable cores, torch uses {machine['threads']} threads")
    _say(f"gpu          {machine['gpu'] or 'none that torch can use'}")
    _say(f"torch sees   {machine['torch_cpu_capability']}")
    broken = [*_print_extension(), *_print_backends()]
    for what in broken:
        print(f"BROKEN: {what}", file=sys.stderr)
    return 1 if broken else 0


def _say(line: str) -> None:
    print("\n".join(wrap(line, others=" " * 15)))


def _print_extension() -> list[str]:
    """Print the features of the compiled extension; return what is broken about it."""
    if importlib.util.find_spec("spatial_pe._C") is None:
        _say("extension    not built, so no cpu backend: the reason is below")
        return []
    try:
        features = importlib.import_module("spatial_pe._C").cpu_features()
        _say(f"extension    uses {features['isa']} kernels; sees {' '.join(features['flags']) or 'no flags'}")
        threads = "OpenMP" if features["openmp"] else "no OpenMP: one thread only"
        _say(f"             compiled by {features['compiler']}, {threads}")
    except Exception as error:  # a binary built for another machine or Python may raise anything
        _say("extension    built, but it does not work")
        return [f"the compiled extension does not work ({type(error).__name__}: {error}): reinstall spatial_pe"]
    if importlib.util.find_spec("spatial_pe._cuda") is None:
        return []  # shown in the table of backends
    try:
        cuda = importlib.import_module("spatial_pe._cuda")
        devices, why = cuda.devices()
        found = ", ".join(device["name"] for device in devices) or f"no device ({why})"
        _say(f"             CUDA kernels for {cuda.architectures}, compiled by {cuda.compiler}; finds {found}")
    except Exception as error:
        _say("             CUDA kernels built, but they do not load")
        return [f"the CUDA extension does not load ({type(error).__name__}: {error}): reinstall spatial_pe"]
    return []


def _print_backends() -> list[str]:
    """Print the table of backends, each available one checked against the reference; return what is broken."""
    _say("backends")
    broken = []
    for name, why in backends():
        if why is not None:
            _say(f"  {name:<10} missing: {why}")
            continue
        try:
            error = _self_check(name)
        except Exception as failure:  # a broken kernel may raise anything: report it, and continue with the others
            error = f"{type(failure).__name__}: {failure}"
        if error is None:
            _say(f"  {name:<10} available, agrees with the reference")
        else:
            _say(f"  {name:<10} available, BUT WRONG")
            broken.append(f'backend "{name}": {error}')
    for line in (*_automatic(), *_behind_the_rotation()) if not broken else ():
        _say(line)
    return broken


def _automatic() -> list[str]:
    """Return the backend that "auto" selects on the CPU for each dtype, and why not its first choice, if it is there:
    why a backend is missing has been said."""
    first, lines = AUTO[0], []
    missing = dict(backends())[first]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.empty(1, 256, 6, 64, dtype=dtype)
        call = AttentionCall(x, x, x, None, 0.125, None, None, None)
        why = None if missing else refusal(first, call)
        lines.append(f"  auto       {str(dtype).removeprefix('torch.')} on the CPU: {select(call, 'auto')}")
        lines[-1] += "" if why is None else f" (not {first}: {why})"
    return lines


def _behind_the_rotation() -> list[str]:
    """Return the attention of the composed path on the GPU for dense and packed images, and why; without a GPU, the
    available parts of flash-attn."""

    if not torch.cuda.is_available():
        states = {provider.name: flash.unusable(provider) for provider in flash.PROVIDERS}
        found = ", ".join(name for name, why in states.items() if why is None) or "nothing but torch's own attention"
        return [f"  composed   has, for GPUs: {found}"]
    lines = []
    for form, tokens in (("dense", 576), ("dense", 4096), ("packed", 4096)):
        x = torch.empty(1, tokens, 16, 64, dtype=torch.bfloat16, device=flash.DEVICE)
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=flash.DEVICE) if form == "packed" else None
        row, why = flash.choose(AttentionCall(x, x, x, None, 0.125, bounds, tokens if form == "packed" else None, None))
        name = "torch's own attention" if row is None else row.provider.name
        lines.append(f"  composed   {form} bfloat16, {tokens} tokens, on the GPU: {name} ({why})")
    return lines


def _self_check(backend: str) -> str | None:
    """Compare one small rotated attention with the reference in float64; return what is wrong, or None."""

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
        except ValueError as why:  # a backend supports one kind of device, and not every dtype
            refusal = str(why)
            continue
        error = (out.cpu() - exact).abs().max().item()
        return None if error < most else f"error {error:.1e} against the reference"
    return refusal
