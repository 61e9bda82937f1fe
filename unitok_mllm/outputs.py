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


def check_whole_folder(folder: str | os.PathLike, replaces_model: bool = False) -> None:
    """Check that a folder can be created, or replaced without a loss, see `check_output_folder`.

    Args:
        folder: the folder.
        replaces_model: whether a model's folder is replaced too.

    Raises:
        ValueError: it is a link, the current folder or one above it, or it holds something that would be lost.
    """
    folder = Path(folder)
    if folder.is_symlink() or Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"cannot write {folder}: it is a link, or a folder in use")
    check_output_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (replaces_model and (folder / "config.json").is_file()):
        raise ValueError(f"cannot write {folder}: it is not an empty folder{' or a model' * replaces_model}")
