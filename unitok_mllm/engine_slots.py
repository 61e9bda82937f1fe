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

    def place(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Set where the next pass stores its keys and values: slots (N,) and positions (N, T)."""
        self.slots, self.positions = slots, positions
        self.end = int(positions.max()) + 1
        first, last = int(slots[0]), int(slots[-1])
        is_range = last - first + 1 == len(slots) and bool((slots.diff() == 1).all())
        self.rows = slice(first, last + 1) if is_range else slots  # a slice gives a view, an index a copy

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store the keys and values of a pass, (N, heads, T, dims).

        Returns:
            The keys and values of these slots up to the end of the longest, each (N, heads, end, dims).
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
