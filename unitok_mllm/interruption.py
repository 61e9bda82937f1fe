"""Handling of Ctrl-C while a program imports its libraries, before it installs its own."""

import os
import signal
from types import FrameType


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process with one line on stderr and the signal's exit code: there is nothing to clean up yet."""
    os.write(2, b"\nInterrupted. The same command begins again.\n")
    os._exit(128 + number)


def end_imports_at_once() -> None:
    """Let Ctrl-C call `end_at_once`, unless it is ignored or handled already."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
