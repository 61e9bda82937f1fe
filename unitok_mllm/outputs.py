"""Checks of output paths before any work begins."""

import os
import tempfile
from pathlib import Path


def check_output_folder(folder: str | os.PathLike) -> None:
    """Check that files can be written into a folder, or that it can be created. The check leaves nothing behind.

    Raises:
        ValueError: the folder or one above it is a file, or cannot be written to.
    """
    existing = Path(folder).absolute()  # the folder or its nearest existing parent; those between can be created
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
        if not existing.is_dir():
            raise ValueError(f"cannot write to {folder}: {existing} is not a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {existing} is not writable ({error.strerror})") from error


def check_output_file(path: str | os.PathLike) -> None:
    """Check that a file can be written or replaced, see `check_output_folder`.

    Raises:
        ValueError: it is a folder, or its own folder cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    check_output_folder(path.parent)
