"""Disks that fill up, and processes that are killed while they write."""

import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def full_disk(free: int):
    """Within it, a file that grows beyond `free` bytes gives an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def killed_at(event: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a process of its own, which kills itself when it opens, moves or removes a file for the
    `event`-th time (from 1); whether that happened."""
    names = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    count = itertools.count(1)
    sys.addaudithook(lambda name, _: name in names and next(count) == event and os.kill(os.getpid(), signal.SIGKILL))
    try:
        work()
    finally:
        os._exit(0)
