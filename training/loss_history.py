"""Losses of a run between two logs: their means over processes, and a check for values that are not finite."""

import math
from collections import defaultdict

import torch
from accelerate import Accelerator

from training.losses import DISCRIMINATOR_TERMS, TERMS


class LossHistory:
    """Named scalars of every step since the last log, kept on the device to avoid synchronisation."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.steps: dict[str, list[int]] = defaultdict(list)

    def record(self, step: int, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.values[name].append(value.detach().float())
            self.steps[name].append(step)

    def means(self) -> dict[str, float]:
        """Compute the means over steps and processes; every process must call it.

        Raises:
            FloatingPointError: a value was not finite on some process. Every process raises it. The message names the
                first such step and the values.
        """
        names = sorted(self.values)
        means = torch.stack([torch.stack(self.values[name]).mean() for name in names])
        means = self.accelerator.reduce(means, "mean").tolist()  # NaN and infinity reach every process
        if not all(map(math.isfinite, means)):
            self._raise_culprit(names)
        return dict(zip(names, means, strict=True))

    def state_dict(self) -> dict[str, tuple[list[int], list[float]]]:
        return {name: (self.steps[name], [value.item() for value in values]) for name, values in self.values.items()}

    def load_state_dict(self, state: dict[str, tuple[list[int], list[float]]]) -> None:
        for name, (steps, values) in state.items():
            self.steps[name] = list(steps)
            self.values[name] = list(torch.tensor(values, device=self.accelerator.device))

    def clear(self) -> None:
        self.values.clear()
        self.steps.clear()

    def _raise_culprit(self, names: list[str]) -> None:
        first_steps = []
        for name in names:
            bad = (step for step, value in zip(self.steps[name], self.values[name]) if not value.isfinite())
            first_steps.append(next(bad, math.inf))
        per_process = self.accelerator.gather(torch.tensor([first_steps], device=self.accelerator.device))
        first_steps = per_process.amin(dim=0).tolist()
        step = min(first_steps)
        culprits = [name for name, first in zip(names, first_steps) if first == step]
        terms = [name for name in culprits if name in (*TERMS, *DISCRIMINATOR_TERMS)]  # the others follow
        raise FloatingPointError(f"Not finite in step {int(step)}: {', '.join(terms or culprits)}.")
