"""Count the FLOPs and the peak memory of a run."""

import ctypes
import math
import platform
import threading

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class PeakMemory:
    """Context manager that records peak memory: of the process, sampled every millisecond, or allocated on CUDA.

    Attributes:
        before: memory at the start, in bytes.
        peak: largest memory, in bytes.
    """

    def __init__(self, device: str):
        self.on_cuda, self.process, self.done = device.startswith("cuda"), psutil.Process(), threading.Event()

    def __enter__(self) -> "PeakMemory":
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            if platform.libc_ver()[0] == "glibc":
                ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier would hide what is allocated now
            self.before = self.peak = self.process.memory_info().rss
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *exception) -> None:
        if self.on_cuda:
            self.peak = torch.cuda.max_memory_allocated()
            return
        self.done.set()
        self.thread.join()
        self._look()


def flop_counter(trains: bool) -> FlopCounterMode:
    """Create a FLOP counter that also knows CPU attention, oneDNN linear layers and grouped convolutions' backward."""
    aten = torch.ops.aten

    def attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    def linear(inputs, *args, out_shape=None, **kwargs) -> int:
        return 2 * math.prod(out_shape) * inputs[-1]

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    if torch.backends.mkldnn.is_available():
        mapping[torch.ops.mkldnn._linear_pointwise] = linear
    if trains:
        from training.planning.counting import convolution_backward_flops

        mapping[aten.convolution_backward] = convolution_backward_flops
    return FlopCounterMode(display=False, custom_mapping=mapping)
