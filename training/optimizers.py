"""AdamW over a network's trained parameters: its parameter groups, and the options that a checkpoint stores."""

import torch
from torch import nn


def adamw(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float, eps: float
) -> torch.optim.AdamW:
    """Build AdamW over the parameters that are not frozen. Those of fewer than two dims have no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps)


def optimizer_options(optimizer: torch.optim.Optimizer) -> list[dict]:
    """Return the distinct options of the parameter groups."""
    names = ("initial_lr", "betas", "eps", "weight_decay")
    options = []
    for group in optimizer.param_groups:
        if (of_group := {name: group[name] for name in names}) not in options:
            options.append(of_group)
    return options


def set_learning_rate(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, learning_rate: float) -> None:
    """Move a parameter into a group of its own, with this learning rate and without weight decay."""
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not parameter]
    optimizer.add_param_group({"params": [parameter], "lr": learning_rate, "weight_decay": 0.0})
