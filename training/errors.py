"""Exit of scripts: an error that the user can correct prints one line to stderr and exits with code 2.

So do signals, with their own exit codes: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP. Any other exception is a bug
and shows its traceback.
"""

import argparse
import difflib
import functools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, NoReturn

import typer
from huggingface_hub.errors import StrictDataclassError
from typer.exceptions import TyperException

from training.interrupts import Interrupted, ends_handled_by
from unitok_mllm.typer_apps import OneLineErrors


MENDABLE = (ValueError, OSError, FloatingPointError, StrictDataclassError, subprocess.CalledProcessError)


class ScriptEnd(SystemExit):
    """Exit of a script with an exit code. Its `str` is the line to print."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


def end(line: str, code: int) -> NoReturn:
    """Print a line to stderr, and exit with a code."""
    print(line, file=sys.stderr)
    raise ScriptEnd(line, code)


def one_line_errors(
    on_interrupt: str = "Interrupted. The same command begins again.",
) -> Callable[[Callable], Callable]:
    """Decorator for a script's `main` or typer app that prints errors of the user in one line.

    Args:
        on_interrupt: how to resume; printed after Ctrl-C and other signals unless the KeyboardInterrupt has a message.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def run(*args: Any, **kwargs: Any) -> Any:
            came: list[int] = []

            def interrupt(number: int, frame: FrameType | None) -> None:
                came.append(number)
                raise Interrupted(number)

            try:
                with ends_handled_by(interrupt):
                    if not isinstance(main, typer.Typer):
                        return main(*args, **kwargs)
                    code = main(*args, **kwargs, standalone_mode=False)
                    if code == 128 + signal.SIGINT:  # what typer makes of any KeyboardInterrupt
                        raise Interrupted(came[-1] if came else signal.SIGINT)
                    sys.exit(code)
            except (KeyboardInterrupt, typer.Abort) as error:
                number = error.number if isinstance(error, Interrupted) else signal.SIGINT
                end(f"\n{str(error) or on_interrupt}", 128 + number)
            except TyperException as error:
                message = OneLineErrors.message_of(error, list(args[0]) if args else sys.argv[1:])
                if not message:  # the help was printed
                    sys.exit(error.exit_code)
            except MENDABLE as error:
                message = str(error)
            end(f"error: {' '.join(message.split())}", 2)

        return run

    return decorate


def check_keys(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check that all names are known.

    Args:
        where: where the names stand, for the message.
        given: names to check.
        known: known names.

    Raises:
        ValueError: a name is unknown; the message gives the nearest known one, or all of them.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"{where} has no {name!r}"
                + (f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}.")
            )


def underscored(option: str) -> str:
    """Return a long option with underscores instead of dashes, as in the help."""
    return f"--{option[2:].replace('-', '_')}" if option.startswith("--") else option


class CommandLine(argparse.ArgumentParser):
    """argparse's parser, but long options may have dashes instead of underscores, and errors take one line."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        spellings = {underscored(name) for name in names} | {
            name.replace("_", "-") for name in names if name[:2] == "--"
        }
        return super().add_argument(*sorted(spellings, reverse=True), **options)

    def error(self, message: str) -> NoReturn:
        end(f"error: {' '.join(message.split())}", 2)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parse the command line.

        Raises:
            ScriptEnd: an option has no value, or a value of another type.
            ValueError: there is no such option, or an argument belongs to no option.
        """
        args = list(sys.argv[1:] if args is None else args)
        self.check_options(args)
        given, rest = self.parse_known_args(args, namespace)
        if rest:
            raise ValueError(f"unexpected argument {' '.join(rest)}: it belongs to no option.")
        return given

    def check_options(self, args: Sequence[str]) -> None:
        """Check that all options exist.

        Raises:
            ValueError: an option does not exist; the message gives the nearest one.
        """
        known = [underscored(action.option_strings[-1]) for action in self._actions if action.option_strings]
        given = [underscored(word.partition("=")[0]) for word in args if word.startswith("--") and len(word) > 2]
        check_keys("the command line", [o for o in given if not any(name.startswith(o) for name in known)], known)
