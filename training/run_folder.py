"""The output folder of a run: it can be written to, and one run has it at a time."""

import os
import sys
from pathlib import Path


LOCKS = Path("/proc/locks")  # Linux's list of who holds what
_held: dict[Path, int] = {}  # by this process, until it ends


def claim_folder(folder: str | os.PathLike, is_main: bool = True) -> None:
    """Makes a run's output folder and holds it until this process ends, however it ends; nothing is left to clean up.

    Args:
        is_main: whether this is the process that holds it for all of the run; the others do nothing.

    Raises:
        ValueError: it is a file, cannot be written to, or is held by another run; it says by which, where the system
            does.
    """
    folder = Path(folder).absolute()
    if not is_main or folder in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to the output folder {folder}: no permission, or a read-only file system")
    if sys.platform == "win32":  # which cannot lock a folder
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(os.fstat(handle).st_ino)
        os.close(handle)
        raise ValueError(f"the output folder {folder} is in use by {holder}") from error
    _held[folder] = handle


def _holder(inode: int) -> str:
    """Who holds a lock on a file of this inode."""
    lines = LOCKS.read_text(encoding="utf-8").splitlines() if LOCKS.exists() else []
    for _, kind, _, _, pid, place, *_ in (line.split() for line in lines if "->" not in line):
        if kind == "FLOCK" and place.endswith(f":{inode}"):
            return f"process {pid}"
    return "another run"
