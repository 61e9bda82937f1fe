"""Replaying a step of generation as one CUDA graph.

A step with few rows is made of a thousand small kernels; launched one by one from Python they take longer than a GPU
takes to read the weights. Recorded once and replayed, they follow one another without a gap. What is recorded reads and
writes the same memory each time, so shapes are fixed and caches have their full length from the start.
"""

import warnings
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer


class UniTokCudaGraph:
    """Calls a function of tensors on one CUDA device: directly at first, recorded at the second call, then replayed.

    The first call lets libraries set themselves up outside the recording. Where the recording fails (a function that
    looks at values, say), there is a warning, and all calls are direct ones.

    Args:
        function: takes tensors of the same shapes and dtypes at each call, changes others in place, returns a tensor.
    """

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function = function
        self.calls, self.graph = 0, None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2:
            self._record(inputs)
        if self.graph is None:
            return self.function(*inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.output = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            warnings.warn(f"No CUDA graph could be recorded, the steps are launched one by one: {error}", stacklevel=3)


def static_cache(model: PreTrainedModel, max_length: int) -> StaticCache | None:
    """A cache of fixed length for the model's LLM, with which its steps can be recorded on their CUDA device.

    None where they cannot: on other devices, with layers that keep other state or look back over less than `max_length`
    tokens, where weights are moved in as they are needed, with code or quantized weights that torch cannot compile.
    """
    llm, quantizer = model.get_decoder(), getattr(model, "hf_quantizer", None)
    if model.device.type != "cuda" or not getattr(llm, "_can_compile_fullgraph", False):
        return None
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return None
    if quantizer is not None and not quantizer.is_compileable:
        return None
    cache = StaticCache(config=model.config.text_config, max_cache_len=max_length)
    if all(isinstance(layer, StaticLayer) and layer.max_cache_len == max_length for layer in cache.layers):
        return cache
    return None


__all__ = ["UniTokCudaGraph", "static_cache"]
