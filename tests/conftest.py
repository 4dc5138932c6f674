# SPDX-License-Identifier: Apache-2.0
"""What must be set before spatial_pe is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # the Triton kernels run on the CPU then; an environment that says otherwise wins
    os.environ.setdefault("TRITON_INTERPRET", "1")
