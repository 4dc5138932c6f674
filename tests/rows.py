# SPDX-License-Identifier: Apache-2.0
"""Rows of parametrised tests that repeat others, left to ``make test-all``."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def some(rows: Iterable[Any], every: int = 2, first: int = 0) -> list[Any]:
    """Return all rows; one of ``every``, from number ``first`` on, is not slow."""
    return [row if i % every == first else pytest.param(row, marks=pytest.mark.slow) for i, row in enumerate(rows)]


def some_pairs(a: Iterable[Any], b: Iterable[Any]) -> list[Any]:
    """Return all pairs; half of them, as the black squares of a chess board, are not slow."""
    numbered = product(enumerate(a), enumerate(b))
    return [pytest.param(x, y, marks=[pytest.mark.slow] if (i + j) % 2 else []) for (i, x), (j, y) in numbered]
