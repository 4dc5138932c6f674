# SPDX-License-Identifier: Apache-2.0
"""Finds what the tests of towers share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "towers"))
