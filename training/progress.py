"""Timing of a training: the time spent on decoding data, and an estimate of the remaining time."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch


logger = logging.getLogger(__name__)
MEASURED = 5  # steps


class SharedClock:
    """Stopwatch for a piece of work that is repeated in a process and in its DataLoader's workers.

    Attributes:
        totals: total seconds and number of repetitions, (2,), float64, in shared memory. It is not locked: if two
            workers finish at the same instant, one measurement may be lost.
    """

    def __init__(self):
        self.totals = torch.zeros(2, dtype=torch.float64).share_memory_()
        self._read = self.totals.clone()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Context manager that measures its block as one piece of work."""
        start = time.perf_counter()
        yield
        self.totals += torch.tensor([time.perf_counter() - start, 1.0], dtype=torch.float64)

    def mean_since(self) -> float:
        """Return the mean duration of a piece of work since the last call, in seconds; NaN if there was none."""
        since, self._read = self.totals - self._read, self.totals.clone()
        return (since[0] / since[1]).item()


class ExpectedTime:
    """Log once how long the remaining steps will take, estimated from the first few after a warm-up step."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.first: tuple[int, float] | None = None

    def __call__(self, step: int) -> None:
        """Record the end of a step. Must be called after each step, with its number."""
        if self.first is None:
            self.first = step, time.perf_counter()
            return
        first, start = self.first
        if step == first + MEASURED:
            seconds = (time.perf_counter() - start) / MEASURED
            left = self.total_steps - step
            expected = timedelta(seconds=round(seconds * left))
            logger.info("%.3g s a step: the other %d take about %s, evaluations aside", seconds, left, expected)
