"""Parameters, FLOPs and activations of one training step, counted on tensors with shapes but without values."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


@dataclass
class Cost:
    """Cost of one sample.

    Attributes:
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass, including the recomputation of gradient checkpointing.
        activations: bytes kept for the backward pass.
        modules: forward FLOPs of each module, by name.
    """

    forward: float
    backward: float
    activations: float
    modules: dict[str, float]


@dataclass
class Part:
    """Parameters and FLOPs of a part of the model.

    Attributes:
        name: name of the part.
        parameters: number of parameters.
        trainable: number of trained parameters.
        forward: FLOPs of one sample's forward pass.
        step: FLOPs of one sample's training step; None if it is not known for the part alone.
    """

    name: str
    parameters: int
    trainable: int
    forward: float
    step: float | None = None


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module whose tensors have a shape and a dtype, but no values."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about loading weights onto the meta device
        module = build()
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    abstract = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, tensor in tensors:
            if tensor not in abstract:  # shared tensors stay shared
                empty = torch.empty_like(tensor, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                abstract[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, abstract[tensor])
    return module


def convolution_backward_flops(grad_shape, x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    """Count the FLOPs of a convolution's backward pass: for each gradient as many as for the convolution.

    torch's own formula ignores the groups, so it counts a depthwise convolution many times over.
    """
    transposed, output_mask = args[4], args[7]
    return sum(output_mask[:2]) * conv_flop_count(x_shape, w_shape, grad_shape, transposed)


def flop_counter() -> FlopCounterMode:
    """Create torch's FLOP counter with the corrected formula for the backward pass of convolutions."""
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flops}
    )


@contextmanager
def saved_for_backward(module: nn.Module | None) -> Iterator[dict[StorageWeakRef, int]]:
    """Context manager that records what autograd saves for the backward pass.

    Args:
        module: module whose parameters are not recorded.

    Yields:
        The bytes of each saved storage; filled within the block.
    """
    parameters = () if module is None else module.parameters()
    ignored = {StorageWeakRef(parameter.untyped_storage()) for parameter in parameters}
    saved: dict[StorageWeakRef, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (key := StorageWeakRef(storage)) not in ignored:
            saved[key] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield saved


def measure(step: Callable[[], torch.Tensor], module: nn.Module, batch: int) -> Cost:
    """Count the FLOPs and activations of a training step, on real tensors or on tensors without values.

    Args:
        step: function that computes the loss of a batch.
        module: module whose parameters do not count as activations.
        batch: number of samples in the batch.

    Returns:
        The cost of one sample.
    """
    # Unfused attention, since fused kernels differ between devices and torch does not count the CPU's.
    with sdpa_kernel(SDPBackend.MATH):
        with flop_counter() as forward:
            loss = step()
        with flop_counter() as backward:
            if loss.requires_grad:
                loss.backward()
    with saved_for_backward(module) as saved:
        loss = step()
    return Cost(
        forward.get_total_flops() / batch,
        backward.get_total_flops() / batch,
        sum(saved.values()) / batch,
        {name: sum(flops.values()) / batch for name, flops in forward.get_flop_counts().items()},
    )


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Count all parameters and the trained ones. A shared parameter counts once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def list_parts(model: nn.Module, names: dict[str, list[str]], cost: Cost) -> list[Part]:
    """List parameters and forward FLOPs of the parts of a model.

    Args:
        model: the model.
        names: names of the submodules of each part.
        cost: cost of the whole model.
    """
    parts = []
    for name, paths in names.items():
        modules = [model.get_submodule(path) for path in paths]
        total, trainable = count_parameters(nn.ModuleList(modules))
        # a module that was called through the model is counted under its path, one called alone under its class
        flops = [
            cost.modules.get(f"{type(model).__name__}.{path}", cost.modules.get(type(module).__name__, 0))
            for path, module in zip(paths, modules)
        ]
        parts.append(Part(name, total, trainable, sum(flops)))
    return parts
