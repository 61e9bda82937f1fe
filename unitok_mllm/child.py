"""Work in a child process with a temporary folder, which is removed after the work has ended."""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from threading import Thread


PATIENCE = 10  # seconds that the child has to end by itself


def run_in_folder(work: Callable[[str], None], prefix: str) -> int:
    """Run `work` with its own temporary folder, and remove the folder however the work ends.

    The work runs in a fork of this process, which must not have threads yet. SIGTERM, SIGINT or SIGHUP end it at any
    moment; this process then waits for it, removes the folder, and returns. If this process is killed, the child
    removes the folder and ends. On Windows, which cannot fork, the work runs in this process.

    Args:
        work: called with the folder, in which its temporary files are created too.
        prefix: prefix of the folder's name.

    Returns:
        The exit code: 0 after a signal.

    Raises:
        ValueError: the child was killed, for example for lack of memory.
    """
    if sys.platform == "win32":
        with tempfile.TemporaryDirectory(prefix=prefix) as folder:
            work(folder)
        return 0
    ends = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*ends, signal.SIGCHLD})
    folder = tempfile.mkdtemp(prefix=prefix)
    try:
        read_end, write_end = os.pipe()  # the parent holds the write end, which is closed when the parent ends
        pid = os.fork()
        if pid == 0:
            os.close(write_end)
            for number in ends:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _work_as_child(work, folder, read_end)
        os.close(read_end)
        code, was_told = _wait(pid, ends)
        os.close(write_end)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        while signal.sigpending() & ends:
            signal.sigwait(ends)  # a repeated signal
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if was_told or -code in ends:
        return 0
    if code < 0:
        raise ValueError(f"the process was ended by {signal.Signals(-code).name}")
    return code


def _work_as_child(work: Callable[[str], None], folder: str, read_end: int) -> None:
    """Run the work and end the process. Never returns: the code after the call belongs to the parent."""

    def watch() -> None:
        os.read(read_end, 1)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    code = 1
    try:
        tempfile.tempdir = folder
        Thread(target=watch, daemon=True).start()
        work(folder)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _wait(pid: int, ends: set[signal.Signals]) -> tuple[int, bool]:
    """Return the child's exit code (negative for a signal), and whether it was told to end."""
    while True:
        told = signal.sigwait({*ends, signal.SIGCHLD})
        if told != signal.SIGCHLD:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE
        ended, status = os.waitpid(pid, os.WNOHANG)
        while told != signal.SIGCHLD and not ended:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), told != signal.SIGCHLD
