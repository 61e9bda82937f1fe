"""Checkpoints of a run: find the newest intact one, and save and restore the random state."""

import json
import logging
import os
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from training.files import whole_checkpoints


logger = logging.getLogger(__name__)


def check_file(path: str | os.PathLike) -> None:
    """Check a file without loading its weights: a weights file has the length in its header, a JSON file is JSON.

    Raises:
        ValueError: the file is truncated or unreadable; the message names it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            zipfile.ZipFile(path).close()
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, zipfile.BadZipFile, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is broken: {error}") from error


def check_files(folder: str | os.PathLike) -> None:
    """Check all files of a checkpoint, see `check_file`.

    Raises:
        ValueError: a file is broken; the message names it.
    """
    for path in sorted(Path(folder).rglob("*")):
        check_file(path)


def newest_checkpoint(output_dir: str | Path, last_file: str) -> Path | None:
    """Find the newest of `whole_checkpoints` whose files are intact. Broken ones are named in the log.

    Args:
        output_dir: output folder of the run.
        last_file: name of the file that is written last, see `whole_checkpoints`.

    Returns:
        The checkpoint's folder; None if there are no checkpoints.

    Raises:
        ValueError: all checkpoints are broken; the message names the newest.
    """
    checkpoints = [*whole_checkpoints(output_dir, last_file).values()]
    newest_error = None
    for checkpoint in reversed(checkpoints):
        try:
            check_files(checkpoint)
        except ValueError as error:
            logger.warning("%s: going on from the checkpoint before it", error)
            newest_error = newest_error or error
        else:
            return checkpoint
    if newest_error:
        raise ValueError(f"none of the {len(checkpoints)} checkpoints in {output_dir} is complete: {newest_error}")
    return None


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of torch's random generators in this process (training uses no others)."""
    state = {"cpu": torch.get_rng_state()}
    return state if device.type == "cpu" else state | {"device": torch.get_device_module(device).get_rng_state(device)}


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore a state that `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)
