# SPDX-License-Identifier: Apache-2.0
"""A short form of what `make soak` does for minutes."""

from __future__ import annotations

import random

import pytest
import stress
from oracles import SEED

pytest.importorskip("transformers", minversion="5")  # its attention interface takes the rotation by hand


@pytest.mark.parametrize("number", range(12))
def test_episode(number):
    stress.episode(random.Random(SEED + number))
