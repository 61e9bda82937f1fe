"""Timing of a training: the speed of its data, and an estimate of the time that is left."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch


logger = logging.getLogger(__name__)
MEASURED = 5  # steps


class SharedClock:
    """Add up the time of a piece of work in a process and in its DataLoader's workers.

    Attributes:
        totals: seconds and times so far, (2,), float64, in shared memory. Workers do not lock it: of two that end a
            piece of work in the same instant, one may be lost.
    """

    def __init__(self):
        self.totals = torch.zeros(2, dtype=torch.float64).share_memory_()
        self._read = self.totals.clone()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Context that counts what is done within it as one piece of work."""
        start = time.perf_counter()
        yield
        self.totals += torch.tensor([time.perf_counter() - start, 1.0], dtype=torch.float64)

    def mean_since(self) -> float:
        """Return the mean seconds of a piece of work since the last call; NaN if there was none."""
        since, self._read = self.totals - self._read, self.totals.clone()
        return (since[0] / since[1]).item()


class ExpectedTime:
    """Log once how long the remaining steps will take, estimated from the first few after a warm-up step."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.first: tuple[int, float] | None = None

    def __call__(self, step: int) -> None:
        """Record the end of a step; to be called with the number of each."""
        if self.first is None:
            self.first = step, time.perf_counter()
            return
        first, start = self.first
        if step == first + MEASURED:
            seconds = (time.perf_counter() - start) / MEASURED
            left = self.total_steps - step
            expected = timedelta(seconds=round(seconds * left))
            logger.info("%.3g s a step: the other %d take about %s, evaluations aside", seconds, left, expected)
