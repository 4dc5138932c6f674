# SPDX-License-Identifier: Apache-2.0
"""A clock that plays back what was measured before."""

from __future__ import annotations

from collections.abc import Iterator


class Replay:
    """Lets ``samples`` (seconds) pass, one between every two looks at it."""

    def __init__(self) -> None:
        self.ticks: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        now, ticks = 0.0, []
        for seconds in samples:
            ticks += [now, now + seconds]
            now += seconds
        self.ticks = iter(ticks)

    def __call__(self) -> float:
        return next(self.ticks)


CLOCK = Replay()
