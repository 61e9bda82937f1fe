"""Signals that end a script: SIGTERM and SIGHUP act like Ctrl-C, and a training saves a checkpoint."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator


# Windows lacks two of them
ENDS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]
CHILD = [number for number in signal.Signals if number.name == "SIGCHLD"]


def _leave_broken_connections_unsaid() -> None:
    """Silence connection errors in forked processes, which are workers of a DataLoader.

    When the main process ends and closes the connection, the worker's thread that sends tensors fails and calls
    `sys.excepthook`.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, (EOFError, ConnectionError)):
            before(kind, error, traceback)

    sys.excepthook = hook


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_leave_broken_connections_unsaid)


class Interrupted(KeyboardInterrupt):
    """A script was ended by the signal `number`."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def ends_handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Context manager in which `handler` is called for each of the three signals.

    Signals that are ignored (SIGHUP under nohup) stay ignored. A terminal sends Ctrl-C also to the workers of a
    DataLoader: they ignore it, and this process ends them. After a signal, the death of a worker is not an error.
    Outside of the main thread, where Python cannot set handlers, the context does nothing.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        for child in CHILD:  # not undone, since a DataLoader checks its workers until the process ends
            signal.signal(child, lambda *args: None)
        handler(number, frame)

    is_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDS if is_main_thread}
    before = {number: earlier for number, earlier in before.items() if earlier not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopRequest:
    """Context manager in which the first signal stops a training after its step, and the second one immediately.

    Args:
        accelerator: accelerator of the training, whose processes stop after the same step.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number = 0  # of the first signal; 0: none arrived
        self._told: torch.Tensor | None = None  # number of processes with a signal, after the last step
        self._handling = ends_handled_by(self._note)

    def __enter__(self) -> "StopRequest":
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._handling.__exit__(kind, error, traceback)
        if self.number and isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            raise Interrupted(self.number) from error  # the signal also ended the workers, so no step can be finished

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise Interrupted(number)
        self.number = number
        print("\nStopping after this step, with a checkpoint; once more: at once.", file=sys.stderr)

    def is_due(self) -> bool:
        """Return whether to save and stop now. Every process must call it after each step; all get the same answer.

        With several processes a signal takes effect one step later, so that no process waits for the others in
        between.
        """
        if self.accelerator.num_processes == 1:
            return bool(self.number)
        told, now = self._told, torch.tensor(float(self.number > 0), device=self.accelerator.device)
        self._told = self.accelerator.reduce(now, "sum")
        return told is not None and told.item() > 0

    def stop(self) -> None:
        """Raise `Interrupted`."""
        raise Interrupted(self.number or signal.SIGTERM)  # another process received it
