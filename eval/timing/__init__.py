"""The rooms of `eval.speed`: its settings, subjects, jobs and bounds, counting and measuring, and the naive yardstick."""
