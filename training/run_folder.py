"""The output folder of a run: check that it is writable, and lock it against other runs."""

import os
import sys
from pathlib import Path

from unitok_mllm.outputs import check_output_folder


LOCKS = Path("/proc/locks")  # Linux's list of all locks and their holders
_held: dict[Path, int] = {}  # locks of this process, until it ends


def claim_folder(folder: str | os.PathLike, is_main: bool = True) -> None:
    """Create a run's output folder, and lock it until this process ends, in whatever way. No lock file remains.

    Args:
        folder: the output folder.
        is_main: whether this process holds the lock of the run; other processes do nothing.

    Raises:
        ValueError: the folder is a file, is not writable, or is locked by another run. The message names that run if
            the system does.
    """
    folder = Path(folder).absolute()
    if not is_main or folder in _held:
        return
    check_output_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # Windows cannot lock a folder
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
    """Return the name of the process that holds a lock on the file with this inode."""
    lines = LOCKS.read_text(encoding="utf-8").splitlines() if LOCKS.exists() else []
    for _, kind, _, _, pid, place, *_ in (line.split() for line in lines if "->" not in line):
        if kind == "FLOCK" and place.endswith(f":{inode}"):
            return f"process {pid}"
    return "another run"
