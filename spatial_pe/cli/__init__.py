# SPDX-License-Identifier: Apache-2.0
"""Command line: spatial-pe doctor | inspect | verify | demo | tune | bench | spatial. One module per command,
imported when that command is called: each has ``add_arguments(parser)`` and ``run(options)``, which returns the exit
code.

Exit codes: 0 for success, 1 where something is broken or a result is wrong, 2 for a wrong argument or a missing
package, with one line on stderr and no traceback.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .._utils.errors import UserError
from .._version import __version__


@dataclass(frozen=True)
class Command:
    """A subcommand: its line of help, and the packages that it needs, installed by `pip install spatial_pe[extra]`."""

    help: str
    packages: tuple[str, ...] = ()
    extra: str = ""


COMMANDS = {
    "doctor": Command("list the backends of this machine, test each, and explain why any is missing"),
    "inspect": Command("show what patch() would do to a model, without its weights", ("transformers",), "hf"),
    "verify": Command("check whether a rotary encoding is 2D RoPE, and say what is wrong with it"),
    "demo": Command(
        "compare vision towers before and after patch(): one with real weights, three that rotate",
        ("transformers", "skimage", "matplotlib"),
        "demo",
    ),
    "tune": Command("measure tile sizes of the GPU kernels and the backends on this GPU, and store the fastest"),
    "bench": Command(
        "measure attention and vision towers on this machine, against alternatives",
        ("transformers", "matplotlib", "jinja2"),
        "bench",
    ),
    "spatial": Command(
        "run the accuracy study of position encodings, and published spatial benchmarks",
        ("sklearn", "skimage", "scipy", "jinja2", "transformers", "matplotlib"),
        "spatial",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    try:
        options = _parser(name if name in COMMANDS else None).parse_args(argv)
        options.command_line = shlex.join(["spatial-pe", *argv])
        return options.run(options)
    except UserError as error:
        print(f"spatial-pe {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser of all commands, with the arguments of the chosen one."""
    parser = argparse.ArgumentParser(
        prog="spatial-pe", description="2D rotary position encoding, fused into attention, for vision towers."
    )
    parser.add_argument("--version", action="version", version=f"spatial_pe {__version__}")
    parsers = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        if name != chosen:
            parsers.add_parser(name, help=command.help)
            continue
        require(command.packages, command.extra)
        module = importlib.import_module(f"{__name__}.{name}")
        own = parsers.add_parser(name, help=command.help, description=module.__doc__)
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    return parser


def require(packages: Sequence[str], extra: str) -> None:
    """Raise UserError if a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"needs the package {package!r}, which is missing: pip install 'spatial_pe[{extra}]'")
