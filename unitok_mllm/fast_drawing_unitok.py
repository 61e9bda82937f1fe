"""Fast drawing: the one entry to oneDNN's blocked layout, the preallocated cache and the CUDA graph.

`prepare_drawing` converts a model's modules to the fastest form on its device, once for several drawings.
`UniTokDrawingParts.begin` makes the caches of each drawing. The codes are the same in every form.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer

from .cuda_graph_unitok import UniTokCudaGraph, static_cache
from .growing_cache_unitok import growing_cache
from .packing_unitok import pack_linears


@dataclass
class UniTokDrawingCaches:
    """The key/value caches of one drawing.

    Attributes:
        llm: the LLM's decoder, in the form that fits its cache.
        llm_cache: cache of the LLM; None to recompute the whole sequence at each step.
        embedder_cache: cache of the embedder; None in the same case.
        is_fixed: whether both have their full length from the start, so that a step can be recorded as a CUDA graph.
    """

    llm: nn.Module
    llm_cache: Cache | None
    embedder_cache: Cache | None
    is_fixed: bool = False

    def recorded(self, step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Return the function of a step, as a CUDA graph if that is possible."""
        return UniTokCudaGraph(step) if self.is_fixed else step


class UniTokDrawingParts:
    """The LLM's decoder, the embedder and the depth transformer; on a CPU with weights in oneDNN's blocked layout.

    The weights in that layout are copies. Make new parts when the weights change.

    Args:
        model: an MLLM.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        modules = model.get_decoder(), model.embedder, model.depth_head
        self.llm, self.embedder, self.depth_head = (pack_linears(module) for module in modules)

    def begin(self, max_length: int, num_positions: int, use_cache: bool, cuda_graph: bool) -> UniTokDrawingCaches:
        """Make empty caches for one drawing.

        Args:
            max_length: length of the sequence, prompt and image together, in tokens.
            num_positions: number of positions of the image.
            use_cache: False for no caches.
            cuda_graph: False for growing caches even if caches of fixed length are possible.
        """
        if not use_cache:
            return UniTokDrawingCaches(self.llm, None, None)
        cache = static_cache(self.model, max_length) if cuda_graph else None
        if cache is not None:
            return UniTokDrawingCaches(self.llm, cache, Cache(layers=[StaticLayer(num_positions)]), is_fixed=True)
        llm, cache = growing_cache(self.llm, max_length)
        return UniTokDrawingCaches(llm, cache, DynamicCache())


def prepare_drawing(model: PreTrainedModel) -> UniTokDrawingParts:
    """Convert the modules of an MLLM to the form that draws fastest on its device."""
    return UniTokDrawingParts(model)


__all__ = ["UniTokDrawingCaches", "UniTokDrawingParts", "prepare_drawing"]
