"""Linear layers with weights in oneDNN's blocked layout, for inference on a CPU.

A matrix product with few rows is bound by reading the weights. In the usual row-major layout they are read at a half
to a third of the memory bandwidth, in oneDNN's own layout at all of it. Large products run near peak FLOPS in that
layout too. torch's compiler uses it after freezing a model.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn


# private operators of torch: without one of them weights keep their layout
ONEDNN_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
MIN_WEIGHTS = 2**16  # for smaller layers, the call costs more than reading the weights


class UniTokPackedLinear(nn.Linear):
    """A linear layer that computes with a copy of its weight in oneDNN's blocked layout.

    Later changes of the weight do not reach the copy. `weight` and `bias` are those of the original layer, for code
    that reads them (peft's DoRA does).

    Args:
        linear: a float32 or bfloat16 layer on a CPU.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.blocked_weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.blocked_weight, self.bias, "none", [], "")


def _can_pack(linear: nn.Linear, min_weights: int) -> bool:
    """Return whether oneDNN can compute this layer: float32 or bfloat16 on a CPU, plain weights, no hooks."""
    weight = linear.weight
    if weight.numel() < min_weights:
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return False
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.device.type != "cpu":
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linears(module: nn.Module, min_weights: int = MIN_WEIGHTS) -> nn.Module:
    """Return a copy of a module for inference on a CPU, with its linear weights in oneDNN's layout and all else shared.

    The module itself does not change. If no layer can be converted (another device or dtype, a CPU that oneDNN does not
    support, quantized weights, autocast), the module itself is returned. The converted weights are copies and need the
    memory of the linear layers once more. Results differ from the module's by rounding, and have no gradient.

    Args:
        module: any module in eval mode, such as a whole model.
        min_weights: layers with fewer weights are not converted.

    Example:
        >>> tokenizer = pack_linears(UniTokModel.from_pretrained(folder).eval())
        >>> codes = tokenizer.encode(pixel_values)
    """
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return module
    if not all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN_OPERATORS):
        return module
    return copy_changed(
        module,
        lambda m: UniTokPackedLinear(m) if type(m) is nn.Linear and _can_pack(m, min_weights) else m,
    )


def copy_changed(
    module: nn.Module, change: Callable[[nn.Module], nn.Module], known: dict[nn.Module, nn.Module] | None = None
) -> nn.Module:
    """Return a copy of a module with some submodules replaced and all else shared; the module itself if none is replaced.

    Args:
        module: the root; it does not change.
        change: a function of a module that returns its replacement, or the same module. Replacements are visited too.
        known: replacements so far, for the recursion.
    """
    known = {} if known is None else known
    if module not in known:
        changed = change(module)
        children = {n: child and copy_changed(child, change, known) for n, child in changed._modules.items()}
        if any(children[name] is not child for name, child in changed._modules.items()):
            changed = copy.copy(changed) if changed is module else changed
            changed._modules = children
        known[module] = changed
    return known[module]


__all__ = ["UniTokPackedLinear", "copy_changed", "pack_linears"]
