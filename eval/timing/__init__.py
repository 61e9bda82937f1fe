"""The parts of `eval.speed`: settings, subjects, jobs, bounds, counting, measuring, and the naive implementation."""
