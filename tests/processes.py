# SPDX-License-Identifier: Apache-2.0
"""Waiting for the processes that a test started."""

from __future__ import annotations

import time

from torch.multiprocessing import ProcessContext


def join(context: ProcessContext, seconds: float = 120) -> None:
    """Until all have ended; raises what one of them raised, or if they hang, and leaves none behind."""
    try:
        deadline = time.monotonic() + seconds
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
