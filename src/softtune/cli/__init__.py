"""The command line: one file a command."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import typer

from softtune.cli import compare, generate, inspect, predict, report, sweep, train
from softtune.errors import SofttuneError


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    """Let Ctrl-C end a command with one line."""

    @functools.wraps(command)
    def stoppable(**arguments: object) -> None:
        try:
            command(**arguments)
        except KeyboardInterrupt as stop:
            print(f"softtune: {str(stop) or 'stopped'}", file=sys.stderr)
            sys.exit(train.INTERRUPTED)

    return stoppable


app = typer.Typer(
    help="Soft-prompt tuning of frozen Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train")(_stoppable(train.command))
app.command("predict")(_stoppable(predict.command))
app.command("generate")(_stoppable(generate.command))
app.command("inspect")(_stoppable(inspect.command))
app.command("compare")(_stoppable(compare.command))
app.command("sweep")(_stoppable(sweep.command))
app.command("report")(_stoppable(report.command))


def main() -> None:
    """Run a command. An error that a user can mend is one line on the standard error, and exit code 2."""
    try:
        app()
    except SofttuneError as error:
        print(f"softtune: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that is not ours
        place = f" ({error.filename})" if error.filename else ""
        print(f"softtune: {error.strerror or error}{place}: make room, or name another place", file=sys.stderr)
        sys.exit(2)
