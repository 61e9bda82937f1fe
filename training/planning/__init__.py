"""The cost of a training: counting, memory, the plans of both trainings, and a check against real steps."""
