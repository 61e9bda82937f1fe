"""Steps of the engine, recorded as CUDA graphs.

A recorded step has fixed shapes, but the number of rows and the length of their keys change from step to step. Both are
rounded up to powers of two, so that a few graphs serve all steps. The rows that this adds use a slot of their own.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from .cuda_graph_unitok import UniTokCudaGraph


MIN_KEYS = 64  # fewest positions that a recorded step attends to


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


class RecordedSteps:
    """The recorded functions of an engine, by their shapes. They share one memory pool.

    Args:
        spare_slot: index of the slot for added rows.
    """

    def __init__(self, spare_slot: int):
        self.spare_slot, self.pool = spare_slot, torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple, list[UniTokCudaGraph]] = {}

    def get(self, key: tuple, make: Callable[[], Sequence[Callable]]) -> list[UniTokCudaGraph]:
        """Return the recorded functions for a key. At the first call for it, `make` returns the functions."""
        if key not in self.graphs:
            self.graphs[key] = [UniTokCudaGraph(function, self.pool) for function in make()]
        return self.graphs[key]

    def fill(self, inputs: torch.Tensor) -> torch.Tensor:
        """Add zeros to inputs (N, ...), up to a power of two."""
        num_added = power_of_two(len(inputs)) - len(inputs)
        return F.pad(inputs, (0, 0) * (inputs.ndim - 1) + (0, num_added))

    def fill_slots(self, slots: list[int], positions: list[int], device: torch.device) -> tuple[torch.Tensor, ...]:
        """Add rows in the spare slot at position 0, and return the slots, (N,), and the positions, (N, 1)."""
        num_added = power_of_two(len(slots)) - len(slots)
        both = [*slots, *[self.spare_slot] * num_added], [*positions, *[0] * num_added]
        slots, positions = torch.tensor(both, device=device)
        return slots, positions[:, None]


__all__ = ["MIN_KEYS", "RecordedSteps", "power_of_two"]
