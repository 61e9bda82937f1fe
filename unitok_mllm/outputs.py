"""Paths of outputs: found to be unusable before any work, not after it."""

import os
import tempfile
from pathlib import Path


def check_output_folder(folder: str | os.PathLike) -> None:
    """Check that files can be written into a folder, or that it can be made. Nothing remains of the check.

    Raises:
        ValueError: it or what it would lie in is a file, or cannot be written to.
    """
    existing = Path(folder).absolute()  # the folder, or the nearest one above it: those between are made
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
        if not existing.is_dir():
            raise ValueError(f"cannot write to {folder}: {existing} is not a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {existing} takes no files ({error.strerror})") from error


def check_output_file(path: str | os.PathLike) -> None:
    """Check that a file can be written or replaced, see `check_output_folder`.

    Raises:
        ValueError: it is a folder, or its own folder cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    check_output_folder(path.parent)
