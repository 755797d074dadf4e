"""The command line: one module for each command, imported when the command is called."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from keyword import iskeyword
from typing import Any

import typer

from softtune.errors import SofttuneError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


def load(name: str) -> Any:
    """Load a command by its name."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command(name)(_in_one_line(module_of(name).command))
    return typer.main.get_command(app)


def module_of(name: str) -> Any:
    """Import the module of a command."""
    return import_module(f"softtune.cli.{name}_" if iskeyword(name) else f"softtune.cli.{name}")


def _in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command to end with one line on stderr: at Ctrl-C, and with exit code 2 at an error that users can fix."""

    @functools.wraps(command)
    def run(**arguments: object) -> None:
        try:
            command(**arguments)
        except KeyboardInterrupt as stop:
            _end(str(stop) or "stopped", INTERRUPTED)
        except SofttuneError as error:
            _end(str(error), 2)
        except OSError as error:  # a full disk, a folder that is not ours
            place = f" ({error.filename})" if error.filename else ""
            _end(f"{error.strerror or error}{place}: make room, or name another place", 2)

    return run


def _end(why: str, code: int) -> None:
    print(f"softtune: {why}", file=sys.stderr)
    sys.exit(code)
