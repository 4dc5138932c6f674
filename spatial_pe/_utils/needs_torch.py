# SPDX-License-Identifier: Apache-2.0
"""Importing this module fails without torch, and says what to install: a command in one line, without a traceback."""

import sys

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    message = "spatial_pe needs torch, which is missing: pip install torch (for a CPU alone: see docs/install.md)"
    if sys.argv[0].endswith("spatial-pe"):
        raise SystemExit(message) from None
    raise ModuleNotFoundError(message, name="torch") from error
