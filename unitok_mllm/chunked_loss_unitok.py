"""Losses over large vocabularies in chunks of rows, so that the logits of all rows are never in memory together.

The gradients of each chunk are computed with its loss, in the forward pass, and its activations are freed before the
next chunk: nothing is computed twice. Since the loss is one number, the backward pass only multiplies the gradients by
the one it gets. After Liger Kernel's fused linear cross-entropy (https://arxiv.org/abs/2410.10989), for any module.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def loss_in_chunks(
    module: nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    targets: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """Sum a loss over chunks of rows. Loss and gradients equal those of `loss_of(states, targets)` up to rounding.

    Args:
        module: the module that `loss_of` runs, with all parameters that the loss depends on besides `states`.
        loss_of: a function of rows of states and targets that returns the sum of their losses, a scalar.
        states: (N, D).
        targets: (N, ...).
        chunk_size: number of rows in a chunk.

    Returns:
        A scalar. Its gradient can be computed once.
    """
    if torch.compiler.is_compiling() or len(states) <= chunk_size:
        return loss_of(states, targets)
    if not torch.is_grad_enabled():
        return sum(loss_of(*chunk) for chunk in zip(states.split(chunk_size), targets.split(chunk_size)))
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not _can_differentiate(module) or not (parameters or states.requires_grad):
        return loss_of(states, targets)
    return _LossInChunks.apply(loss_of, chunk_size, targets, states, *parameters)


def _can_differentiate(module: nn.Module) -> bool:
    """Return whether a module's gradients can be computed in the forward pass, and summed over chunks without loss.

    They cannot where hooks gather sharded weights (ZeRO-3), and sums in half precision would lose digits. With gradient
    checkpointing there are few activations to save.
    """
    for part in module.modules():
        if any(getattr(part, hooks) for hooks in HOOKS):
            return False
        if isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing:
            return False
    return all(p.dtype in (torch.float32, torch.float64) for p in module.parameters() if p.requires_grad)


class _LossInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_of, chunk_size, targets, states, *parameters):
        total, sums = states.new_zeros((), dtype=torch.float32), [None] * len(parameters)
        state_grads = []
        for rows, chunk in zip(states.split(chunk_size), targets.split(chunk_size)):
            rows = rows.detach().requires_grad_(states.requires_grad)
            with torch.enable_grad():
                loss = loss_of(rows.view_as(rows), chunk)  # no leaf: hooks such as a FLOP counter's refuse those here
            wanted = [*([rows] if rows.requires_grad else []), *parameters]
            grads = list(torch.autograd.grad(loss, wanted, allow_unused=True))
            if rows.requires_grad:
                state_grads.append(grads.pop(0))
            for i, grad in enumerate(grads):
                sums[i] = grad if sums[i] is None or grad is None else sums[i].add_(grad)
            total += loss.detach()
        ctx.grads = [torch.cat(state_grads) if state_grads else None, *sums]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        if ctx.grads is None:
            raise RuntimeError("The gradient of a loss in chunks can be computed only once.")
        grads, ctx.grads = ctx.grads, None
        return None, None, None, *(None if grad is None else grad.mul_(factor) for grad in grads)


__all__ = ["loss_in_chunks"]
