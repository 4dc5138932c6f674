# SPDX-License-Identifier: Apache-2.0
"""Maintainers' programs, run from the root of a checkout as ``python -m tools.NAME``; the Makefile does.

They share the tests' oracles and towers.
"""

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [path for folder in (_TESTS, _TESTS / "towers") if (path := str(folder)) not in sys.path]
