# SPDX-License-Identifier: Apache-2.0
"""Cache folder: downloaded weights and the results of `spatial-pe tune`."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $SPATIAL_PE_CACHE, or spatial_pe in the user's cache folder. It may not exist yet."""
    own = os.environ.get("SPATIAL_PE_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spatial_pe"
    return folder.expanduser()  # no shell has expanded the ~ of a .env file or of Docker's ENV
