"""What a training says of its own length."""

import logging
import time
from datetime import timedelta


logger = logging.getLogger(__name__)
MEASURED = 5  # steps


class ExpectedTime:
    """Says once how long the steps that are left will take, by the first few after the very first, which warms up."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.first: tuple[int, float] | None = None

    def __call__(self, step: int) -> None:
        """To be called after each step, whose number it gets."""
        if self.first is None:
            self.first = step, time.perf_counter()
            return
        first, start = self.first
        if step == first + MEASURED:
            seconds = (time.perf_counter() - start) / MEASURED
            left = self.total_steps - step
            expected = timedelta(seconds=round(seconds * left))
            logger.info("%.3g s a step: the other %d take about %s, evaluations aside", seconds, left, expected)
