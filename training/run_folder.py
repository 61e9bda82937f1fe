"""The output folder of a run: it can be written to, and one run has it at a time."""

import os
import socket
import sys
import time
from pathlib import Path
from typing import IO


LOCK = ".lock"
_held: dict[Path, IO[str]] = {}  # by this process, until it ends


def claim_folder(folder: str | os.PathLike, is_main: bool = True) -> None:
    """Makes a run's output folder and holds it until this process ends, however it ends; nothing is left to clean up.

    Args:
        is_main: whether this is the process that holds it for all of the run; the others do nothing.

    Raises:
        ValueError: it is a file, cannot be written to, or is held by another run; it says by which.
    """
    folder = Path(folder).absolute()
    if not is_main or folder in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    if sys.platform != "win32":  # which has no such locks
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise ValueError(f"{folder} is in use by {lock.read() or 'another run'}") from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    lock.flush()
    _held[folder] = lock
