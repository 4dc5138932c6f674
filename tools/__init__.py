# SPDX-License-Identifier: Apache-2.0
"""Maintainers' programs, run from the root of a checkout as ``python -m tools.NAME``; the Makefile does.

They share the tests' oracles and towers.
"""

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests"
_FOLDERS = [str(folder) for folder in (_TESTS, _TESTS / "towers", _TESTS / "models")]
sys.path[:0] = [folder for folder in _FOLDERS if folder not in sys.path]
