"""The command line: one file a command."""

from __future__ import annotations

import sys

import typer

from softtune.cli import generate, inspect, predict, train
from softtune.errors import SofttuneError

app = typer.Typer(
    help="Soft-prompt tuning of frozen Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train")(train.command)
app.command("predict")(predict.command)
app.command("generate")(generate.command)
app.command("inspect")(inspect.command)


def main() -> None:
    """Run a command. An error that a user can mend is one line on the standard error, and exit code 2."""
    try:
        app()
    except SofttuneError as error:
        print(f"softtune: {error}", file=sys.stderr)
        sys.exit(2)
