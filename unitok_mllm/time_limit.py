"""A time limit for Python code that may loop, such as a chat template."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _TimeIsUp(BaseException):
    """Raised in the code at its time limit. Not an Exception, so that the code does not catch it."""


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """End the code in the block, in any thread, at its next Python instruction after `seconds`.

    A call into compiled code is not interrupted; the code ends after it.

    Args:
        seconds: the limit.
        message: text of the error.

    Raises:
        ValueError: the code took longer.
    """
    thread, lock, is_over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TimeIsUp))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    try:
        try:
            timer.start()
            yield
        finally:
            with lock:
                is_over = True
            timer.cancel()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
    except _TimeIsUp:
        raise ValueError(message) from None
