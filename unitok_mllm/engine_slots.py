"""KV cache of the engine, divided into slots of equal length."""

import torch
from transformers.cache_utils import CacheLayerMixin


class UniTokSlotLayer(CacheLayerMixin):
    """KV cache of one layer, divided into slots. A pass uses some of the slots, each with its own length.

    Args:
        num_slots: number of slots, each of which holds one sequence.
        max_length: positions per slot. The memory is allocated in the first pass.
        dtype: data type of the stored keys and values; None to keep the type they come in.
    """

    is_compileable = True  # slots have a fixed length, only part of which is in use

    def __init__(self, num_slots: int, max_length: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.num_slots, self.max_length, self.dtype = num_slots, max_length, dtype

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (  # zeros, since masked values must be finite
            states.new_zeros((self.num_slots, states.shape[1], self.max_length, states.shape[3]), dtype=self.dtype)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def place(self, slots: torch.Tensor, positions: torch.Tensor, end: int, slot_range: slice | None = None) -> None:
        """Set where the next pass stores its keys and values.

        Args:
            slots: slot of each row, (N,).
            positions: positions of each row, (N, T).
            end: number of positions of each slot that the pass attends to, those that it stores included.
            slot_range: the same slots as a slice, if they follow one another: a slice gives a view, an index a copy.
        """
        self.slots, self.positions, self.end = slots, positions, end
        self.rows = slots if slot_range is None else slot_range

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store the keys and values of a pass, (N, heads, T, dims).

        Returns:
            The keys and values of these slots up to `end`, each (N, heads, end, dims).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for memory, states in ((self.keys, key_states), (self.values, value_states)):
            memory[self.slots[:, None], :, self.positions] = states.transpose(1, 2).to(memory.dtype)
        return self.keys[self.rows, :, : self.end], self.values[self.rows, :, : self.end]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for memory in (self.keys, self.values):
            memory[target, :, :length] = memory[source, :, :length]

    def get_seq_length(self) -> torch.Tensor:
        """Return the lengths as (N, 1, 1, 1), so that comparing them with key positions gives a mask."""
        return self.positions[:, -1, None, None, None] + 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end, 0

    def get_max_length(self) -> int:
        return self.max_length


def range_of(slots: list[int]) -> slice | None:
    """Return the slots as a slice; None if they do not follow one another."""
    first = slots[0]
    return slice(first, first + len(slots)) if slots == [*range(first, first + len(slots))] else None
