"""Record a step of generation as one CUDA graph, and replay it.

A step with few rows consists of about a thousand small kernels. Launching them one by one from Python takes longer than
a GPU needs to read the weights. Recorded once and replayed, they run without gaps. Each replay reads and writes the same
memory, so shapes are fixed and caches have their full length from the start.
"""

import warnings
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer


class UniTokCudaGraph:
    """Call a function of tensors on one CUDA device: the first call is eager, the second records, later ones replay.

    The first call lets libraries initialise themselves outside the recording. If the recording fails (for example because
    the function reads a tensor's values), a warning is logged and all calls are eager.

    Args:
        function: takes tensors of the same shapes and dtypes at each call, may change other tensors in place, and
            returns a tensor.
        pool: memory pool that several graphs may share, from `torch.cuda.graph_pool_handle()`, if they never run at
            the same time; None for memory of its own.
    """

    def __init__(self, function: Callable[..., torch.Tensor], pool: tuple[int, int] | None = None):
        self.function, self.pool = function, pool
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
            # other threads may use the device meanwhile, such as one that decodes pictures
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            warnings.warn(f"No CUDA graph could be recorded, the steps are launched one by one: {error}", stacklevel=3)


def can_record(model: PreTrainedModel) -> bool:
    """Return whether the steps of a model's LLM can be recorded.

    They cannot on other devices than CUDA, with offloaded weights, or with code or quantized weights that torch cannot
    compile.
    """
    llm, quantizer = model.get_decoder(), getattr(model, "hf_quantizer", None)
    if model.device.type != "cuda" or not getattr(llm, "_can_compile_fullgraph", False):
        return False
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return False
    return quantizer is None or quantizer.is_compileable


def static_cache(model: PreTrainedModel, max_length: int) -> StaticCache | None:
    """Make a cache of fixed length, with which the steps of the model's LLM can be recorded.

    Args:
        model: an MLLM.
        max_length: capacity in tokens.

    Returns:
        The cache; None if the steps cannot be recorded: see `can_record`, or with layers that have other state or a
        window below `max_length` tokens.
    """
    if not can_record(model):
        return None
    cache = StaticCache(config=model.config.text_config, max_cache_len=max_length)
    if all(isinstance(layer, StaticLayer) and layer.max_cache_len == max_length for layer in cache.layers):
        return cache
    return None


__all__ = ["UniTokCudaGraph", "can_record", "static_cache"]
