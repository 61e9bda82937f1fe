"""What all typer apps share: options with dashes or underscores, and errors of the user in one line."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException


def script_app(**options: Any) -> typer.Typer:
    """Create a typer app whose long options may have underscores instead of dashes."""
    settings = {"token_normalize_func": lambda token: token.replace("_", "-")}  # --top_k is --top-k
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=settings, **options)


def show_error(message: object) -> None:
    """Print an error as one line on stderr, even if its message has several."""
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)


class OneLineErrors(TyperGroup):
    """Run a command. Errors that a user can correct print one line on stderr and exit with 2, Ctrl-C with 130."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run typer without its boxed errors, and with a message after Ctrl-C."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        try:
            code = super().main(*args, standalone_mode=False, **options)
        except TyperException as error:
            code = error.exit_code
            if message := error.format_message():  # or the help was printed
                show_error(message)
        if code == 130:
            typer.echo("\nInterrupted. The same command begins again.", err=True)
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        args = list(ctx.args)
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            message = self.message_of(error, args)
        except (ValueError, OSError) as error:
            message = str(error)
        show_error(message)
        raise typer.Exit(2)

    @staticmethod
    def message_of(error: TyperException, args: list[str]) -> str:
        """Return typer's message of an error, with the option's value on the command line, which typer leaves out."""
        message = error.format_message().replace("Value error, ", "", 1)  # pydantic's, of a parser's ValueError
        parameter = getattr(error, "param", None)
        for arg, following in zip(args, [*args[1:], ""]):
            name, equals, value = arg.partition("=")
            if parameter is not None and name.replace("_", "-") in parameter.opts:
                return f"{message}, got {value if equals else following}"
        return message
