"""Linear layers with weights in oneDNN's blocked layout, for inference on a CPU.

A product with few rows is bound by reading its weights, and the usual row-major layout reads them at a half to a third
of the memory's rate; oneDNN's own layout reads them at the full one, and computes large products near the peak. It is
what torch's compiler uses after freezing a model.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn


MIN_WEIGHTS = 2**16  # reading fewer takes less time than calling anything


class UniTokPackedLinear(nn.Linear):
    """`linear`, computed with a blocked copy of its weight, which later changes of the weight do not reach.

    `weight` and `bias` are the layer's own, for whatever reads them (peft's DoRA does).
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.blocked_weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.blocked_weight, self.bias, "none", [], "")


def _can_pack(linear: nn.Linear, min_weights: int) -> bool:
    """Whether it is a plain float32 or bfloat16 layer on a CPU that oneDNN serves, without hooks of anyone's."""
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
    """The module for inference on a CPU, its linear layers with packed weights; everything else is shared with it.

    The module itself is left as it is. Where there is nothing to pack (another device or dtype, a CPU that oneDNN does
    not know, quantized weights, autocast) it is returned itself. Packed weights are copies, which take the memory of
    the linear layers again; the results differ from the module's by rounding, and take no gradient.

    Args:
        module: any module in eval mode, also a whole model.
        min_weights: layers with fewer weights are left as they are.
    """
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return module
    return copy_changed(
        module,
        lambda m: UniTokPackedLinear(m) if type(m) is nn.Linear and _can_pack(m, min_weights) else m,
    )


def copy_changed(
    module: nn.Module, change: Callable[[nn.Module], nn.Module], known: dict[nn.Module, nn.Module] | None = None
) -> nn.Module:
    """The module with some of those in it changed, all else shared; itself where nothing is.

    Args:
        change: returns a module to stand in another's place, which is then gone through in turn, or the same one.
        known: what has been changed so far.
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
