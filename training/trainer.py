"""What both trainings add to the Trainer: every part of the loss is logged under its own name."""

from collections import defaultdict

import torch
from transformers import Trainer


class NamedLossesTrainer(Trainer):
    """A Trainer whose `compute_loss` calls `record` with named values; their means since the last log are logged."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._recorded: dict[str, list[torch.Tensor]] = defaultdict(list)

    def record(self, values: dict[str, torch.Tensor]) -> None:
        """Keeps scalars for the next log line, without waiting for the device."""
        if self.model.training:
            for name, value in values.items():
                self._recorded[name].append(value.detach())

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs |= {name: torch.stack(values).float().mean().item() for name, values in self._recorded.items()}
            self._recorded.clear()
        super().log(logs, *args, **kwargs)
