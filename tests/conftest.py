# SPDX-License-Identifier: Apache-2.0
"""What must be set before spatial_pe is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # the Triton kernels run on the CPU then; an environment that says otherwise wins
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN: an output, or scratch, that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
