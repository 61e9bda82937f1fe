"""Names of devices, the same for all commands and scripts."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch

AUTO = "auto"
DEVICE_HELP = "auto (an accelerator where there is one), cpu, cuda or cuda:N"


def find_device(name: str = AUTO, automatic: "torch.device | None" = None) -> "torch.device":
    """Return the device of a name.

    Args:
        name: "auto", "cpu", or an accelerator such as "cuda" or "cuda:1"; "" means "auto".
        automatic: the device that "auto" means for this process, if there are several processes.

    Raises:
        ValueError: this machine has no such device. The message names those that it has.
    """
    import torch  # takes seconds, and `--help` must not wait for it

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name in ("", AUTO):
        return automatic or accelerator or torch.device("cpu")
    devices = ["cpu"]
    if accelerator:
        devices += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in devices:
        raise ValueError(f"there is no device {name!r} here; there is {', '.join([AUTO, *devices])}.")
    return torch.device(name)
