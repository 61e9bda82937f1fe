"""Checkpoints of a run: those written to the end, and the newest whose files are whole."""

import json
import logging
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from training.files import whole_checkpoints


logger = logging.getLogger(__name__)


def check_files(folder: str | os.PathLike) -> None:
    """Finds out whether the files of a checkpoint are as long as they say themselves; nothing of them is loaded.

    Raises:
        ValueError: one is not; it is named.
    """
    for path in sorted(Path(folder).rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (SafetensorError, zipfile.BadZipFile, ValueError, OSError) as error:
            raise ValueError(f"{path} is broken: {error}") from error


def newest_checkpoint(output_dir: str | Path, last_file: str) -> Path | None:
    """The newest of `whole_checkpoints` whose files are whole as well; those that are not are named in the log.

    Raises:
        ValueError: there are some, and all are broken; the newest is named.
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
        raise ValueError(f"none of the {len(checkpoints)} checkpoints in {output_dir} is whole: {newest_error}")
    return None
