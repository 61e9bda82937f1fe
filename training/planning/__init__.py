"""Cost of a training: FLOPs, memory, the plans of both trainings, and a comparison with real steps."""
