"""What ends a script from outside: SIGINT, SIGTERM and SIGHUP all end it as Ctrl-C does, and a training keeps its steps."""

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


class Interrupted(KeyboardInterrupt):
    """The signal `number` came."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def ends_handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within it, `handler` is called at each of the three signals, but for those that are ignored, as under nohup.

    Ctrl-C, which a terminal sends to a DataLoader's workers too, leaves them to this process, and the death of one is no
    error any more after a signal. In another thread than the main one, where Python sets no handlers, it does nothing.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        for child in CHILD:  # for good: a DataLoader asks after its workers until the process ends
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
    """Within it, the first signal asks a training to stop after its step; the second interrupts at once.

    Args:
        accelerator: of the training, whose processes agree on the step.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number = 0  # of the signal that came; 0: none
        self._told: torch.Tensor | None = None  # how many processes knew of one after the step before
        self._handling = ends_handled_by(self._note)

    def __enter__(self) -> "StopRequest":
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._handling.__exit__(kind, error, traceback)
        if self.number and isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            raise Interrupted(self.number) from error  # which ended the workers too: there is no step to finish

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise Interrupted(number)
        self.number = number
        print("\nStopping after this step, with a checkpoint; once more: at once.", file=sys.stderr)

    def is_due(self) -> bool:
        """Whether to save and stop here: every process must ask after each step, and all get the same answer.

        Of several, one step later: then no step waits for what the others say.
        """
        if self.accelerator.num_processes == 1:
            return bool(self.number)
        told, now = self._told, torch.tensor(float(self.number > 0), device=self.accelerator.device)
        self._told = self.accelerator.reduce(now, "sum")
        return told is not None and told.item() > 0

    def stop(self) -> None:
        """Raises Interrupted."""
        raise Interrupted(self.number or signal.SIGTERM)  # which another process was told
