"""How every script ends: what a user can mend takes one line on stderr and exit code 2, and so does Ctrl-C with 130.

Any other exception is a bug and shows its traceback.
"""

import difflib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import typer
from huggingface_hub.errors import StrictDataclassError
from typer.exceptions import TyperException


MENDABLE = (ValueError, OSError, FloatingPointError, StrictDataclassError, subprocess.CalledProcessError)


class ScriptEnd(SystemExit):
    """Ends a script with a code; `str` of it is the line that was printed."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


def end(line: str, code: int) -> NoReturn:
    """Prints a line to stderr and ends the script."""
    print(line, file=sys.stderr)
    raise ScriptEnd(line, code)


def one_line_errors(on_interrupt: str = "Interrupted.") -> Callable[[Callable], Callable]:
    """A decorator of a script's `main`, or of its typer app.

    Args:
        on_interrupt: how to go on, printed after Ctrl-C unless the KeyboardInterrupt has a text of its own.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                if isinstance(main, typer.Typer):
                    sys.exit(main(*args, **kwargs, standalone_mode=False))
                return main(*args, **kwargs)
            except (KeyboardInterrupt, typer.Abort) as error:
                end(f"\n{str(error) or on_interrupt}", 130)
            except TyperException as error:
                message = error.format_message()
            except MENDABLE as error:
                message = str(error)
            end(f"error: {' '.join(message.split())}", 2)

        return run

    return decorate


def check_keys(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """
    Args:
        where: what the keys are of, for the message.

    Raises:
        ValueError: one of the names given is not known; it gives the nearest one, or all where none is near.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"{where} has no {name!r}"
                + (f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}.")
            )
