"""Where a model runs, by the one name that all commands and scripts take."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch

AUTO = "auto"
DEVICE_HELP = "auto (an accelerator where there is one), cpu, cuda or cuda:N"


def find_device(name: str = AUTO, automatic: "torch.device | None" = None) -> "torch.device":
    """The device of a name; "" is "auto" too.

    Args:
        automatic: what "auto" is for this one of several processes.

    Raises:
        ValueError: this machine has no such device; it names those that there are.
    """
    import torch  # takes seconds, which `--help` should not

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name in ("", AUTO):
        return automatic or accelerator or torch.device("cpu")
    devices = ["cpu"]
    if accelerator:
        devices += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in devices:
        raise ValueError(f"there is no device {name!r} here; there is {', '.join([AUTO, *devices])}.")
    return torch.device(name)
