"""A preallocated key/value cache for drawing, with attention in float32 on a CPU.

The library's growing cache copies all keys and values at each token. On a CPU, torch's attention of a single query
takes three to eight times as long in bfloat16 as in float32. There the keys and values are stored in float32, which
costs memory and loses nothing.
"""

import copy

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .packing_unitok import copy_changed


CACHE_DTYPE_ATTENTION = "unitok_cache_dtype"


class UniTokGrowingLayer(DynamicLayer):
    """One layer of the cache, preallocated at its first update.

    Args:
        max_length: capacity in tokens.
        dtype: dtype of the stored keys and values; None for the dtype that they come in.
    """

    def __init__(self, max_length: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.max_length, self.dtype = max_length, dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append the keys and values of the next T tokens, (B, heads, T, dims).

        Returns:
            All keys and all values so far, as views of the preallocated memory.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.memory = [
                states.new_empty((*states.shape[:2], self.max_length, states.shape[3]), dtype=self.dtype)
                for states in (key_states, value_states)
            ]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for memory, states in zip(self.memory, (key_states, value_states)):
            memory[:, :, start:end] = states
        self.keys, self.values = (memory[:, :, :end] for memory in self.memory)
        return self.keys, self.values


def growing_cache(llm: nn.Module, max_length: int) -> tuple[nn.Module, DynamicCache]:
    """Make a preallocated cache for an LLM.

    On a CPU, for weights in 16 bits, the returned decoder is a copy that shares all weights and attends in float32,
    the cache's dtype. Layers with a sliding window, or with other state than keys and values, use the library's own
    cache. So do all layers of a compiled decoder: the compiler fails on views of changing length.

    Args:
        llm: the LLM's decoder.
        max_length: capacity in tokens.

    Returns:
        The decoder to call, and its cache.
    """
    cache, dtype = DynamicCache(config=llm.config), None
    if any(module._compiled_call_impl is not None for module in llm.modules()):
        return llm, cache
    if _can_attend_in_float32(llm):
        llm, dtype = copy_changed(llm, _attending_in_cache_dtype), torch.float32
    cache.layers = [
        UniTokGrowingLayer(max_length, dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return llm, cache


def _can_attend_in_float32(llm: nn.Module) -> bool:
    """Return whether the LLM has 16-bit weights on a CPU, uses torch's attention, and has no patched `forward`."""
    if not isinstance(llm, PreTrainedModel) or llm.device.type != "cpu" or llm.dtype.itemsize > 2:
        return False
    if llm.config._attn_implementation != "sdpa":
        return False
    return not any("forward" in vars(module) for module in llm.modules())


def _attending_in_cache_dtype(module: nn.Module) -> nn.Module:
    config = vars(module).get("config")
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return module
    module = copy.copy(module)
    module.config = copy.copy(config)
    module.config._attn_implementation = {"": CACHE_DTYPE_ATTENTION}  # but not in sub-configs, which are shared
    return module


def _attend_in_cache_dtype(module, query, key, value, attention_mask, **kwargs):
    attended, weights = sdpa_attention_forward(module, query.to(key.dtype), key, value, attention_mask, **kwargs)
    return attended.to(query.dtype), weights


AttentionInterface.register(CACHE_DTYPE_ATTENTION, _attend_in_cache_dtype)
AttentionMaskInterface.register(CACHE_DTYPE_ATTENTION, sdpa_mask)

__all__ = ["UniTokGrowingLayer", "growing_cache"]
