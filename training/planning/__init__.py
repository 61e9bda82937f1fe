"""What a training will take: counting, memory, the plans of both trainings, and a check against real steps."""
