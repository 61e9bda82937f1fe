"""Metrics of the HTTP server, for Prometheus."""

import threading
import time
from collections import Counter
from collections.abc import Callable

from .serving import UniTokEngine


BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds


class Metrics:
    """Counters and histograms of times in Prometheus's text format.

    Args:
        engine: the engine, whose own counters are included.
    """

    def __init__(self, engine: UniTokEngine):
        self.engine, self.lock = engine, threading.Lock()
        self.requests: Counter[tuple[str, int]] = Counter()
        self.times: dict[str, list[int]] = {}
        self.sums: Counter[str] = Counter()

    def observe(self, name: str, seconds: float) -> None:
        with self.lock:
            counts = self.times.setdefault(name, [0] * (len(BUCKETS) + 1))
            counts[next((i for i, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))] += 1
            self.sums[name] += seconds

    def first(self, name: str, tell: Callable | None = None) -> Callable:
        """Return a callback that records the time until its first call, and passes each call on to `tell`."""
        start, is_first = time.monotonic(), True

        def called(item) -> None:
            nonlocal is_first
            if is_first:
                self.observe(name, time.monotonic() - start)
                is_first = False
            if tell is not None:
                tell(item)

        return called

    def text(self) -> str:
        engine = self.engine
        lines = []
        for name, kind, value in (
            ("requests_waiting", "gauge", engine.num_waiting),
            ("requests_running", "gauge", engine.num_running),
            ("steps_total", "counter", engine.num_steps),
            ("rows_total", "counter", engine.num_rows_computed),
            ("positions_reused_total", "counter", engine.num_positions_reused),
        ):
            lines += [f"# TYPE unitok_{name} {kind}", f"unitok_{name} {value}"]
        with self.lock:
            lines.append("# TYPE unitok_responses_total counter")
            for (path, status), count in sorted(self.requests.items()):
                lines.append(f'unitok_responses_total{{path="{path}",status="{status}"}} {count}')
            for name, counts in sorted(self.times.items()):
                lines.append(f"# TYPE unitok_{name}_seconds histogram")
                total = 0
                for bound, count in zip((*BUCKETS, "+Inf"), counts):
                    total += count
                    lines.append(f'unitok_{name}_seconds_bucket{{le="{bound}"}} {total}')
                lines += [f"unitok_{name}_seconds_sum {self.sums[name]}", f"unitok_{name}_seconds_count {total}"]
        return "\n".join(lines) + "\n"
