"""A key/value cache for drawing whose memory is taken once, and whose attention on a CPU is computed in float32.

The library's growing cache copies all keys and values at each token. And torch's attention of a single query in bfloat16
takes three to eight times as long on a CPU as in float32, so that there keys and values are kept in float32, which costs
memory and loses nothing.
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
    """Keys and values of up to `max_length` tokens, in `dtype` (None: their own)."""

    def __init__(self, max_length: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.max_length, self.dtype = max_length, dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Adds those of the next tokens, (B, heads, T, dims); returns all, as parts of the layer's memory."""
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
    """The LLM's decoder and a cache of up to `max_length` tokens for it.

    On a CPU and in a dtype below float32, the decoder is a copy that shares all weights and attends in float32, the
    cache's dtype. Layers that slide or keep other state than keys and values are the library's own, and so are all of a
    compiled decoder's: the compiler fails at parts, of changing length, of a tensor.
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
    """Whether all of it is torch's attention on a CPU, called as it is written."""
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
    module.config._attn_implementation = {"": CACHE_DTYPE_ATTENTION}  # not those of configs in it, which are shared
    return module


def _attend_in_cache_dtype(module, query, key, value, attention_mask, **kwargs):
    attended, weights = sdpa_attention_forward(module, query.to(key.dtype), key, value, attention_mask, **kwargs)
    return attended.to(query.dtype), weights


AttentionInterface.register(CACHE_DTYPE_ATTENTION, _attend_in_cache_dtype)
AttentionMaskInterface.register(CACHE_DTYPE_ATTENTION, sdpa_mask)

__all__ = ["UniTokGrowingLayer", "growing_cache"]
