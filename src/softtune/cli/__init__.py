"""The command line: one module for each command, imported when the command is called. Internal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from keyword import iskeyword
from typing import Any

import typer

from softtune.errors import ConfigError, SofttuneError
from softtune.extras import require

INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""
FAILED = 1
"""Exit code if a part of an experiment, or a promise, failed."""
NEEDS = {"compare": "experiments", "sweep": "experiments", "report": "experiments", "serve": "serve"}
"""The extras that commands need beside ``cli``."""


def load(name: str) -> Any:
    """Load a command by its name."""
    with _errors_in_one_line():
        require(*([NEEDS[name]] if name in NEEDS else []), "cli")
        if name != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError(f"softtune {name} runs in one process", "start it without torchrun")
        command = module_of(name).command
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command(name)(_errors_in_one_line()(command))
    return typer.main.get_command(app)


def module_of(name: str) -> Any:
    """Import the module of a command."""
    return import_module(f"softtune.cli.{name}_" if iskeyword(name) else f"softtune.cli.{name}")


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """End with one line on stderr: at Ctrl-C, and with exit code 2 at an error that users can fix."""
    try:
        yield
    except KeyboardInterrupt as stop:
        _end(str(stop) or "stopped", INTERRUPTED)
    except SofttuneError as error:
        _end(str(error), 2)
    except (RuntimeError, MemoryError) as error:
        from softtune.load_options import LESS_MEMORY, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _end(f"out of memory: lower batch_size, set gradient_checkpointing, or {LESS_MEMORY}", 2)
    except OSError as error:  # a full disk, a folder that is not ours
        place = f" ({error.filename})" if error.filename else ""
        _end(f"{error.strerror or error}{place}: make room, or name another place", 2)


def _end(why: str, code: int) -> None:
    print(f"softtune: {why}", file=sys.stderr)
    sys.exit(code)
