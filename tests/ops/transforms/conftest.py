# SPDX-License-Identifier: Apache-2.0
"""The towers are those of tests/towers."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "towers"))
