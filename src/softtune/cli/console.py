"""Console output of the commands: progress bars and tables."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from softtune.formatting import shortened
from softtune.training.progress import Phase

if TYPE_CHECKING:
    from softtune.training.progress import Progress as Reporting


IS_FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this process prints: the first one of those that torchrun or accelerate has started."""


def _plain(*, stderr: bool = False) -> Console:
    """A console that prints text unchanged, without markup, emoji codes or highlighting."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, quiet=not IS_FIRST)


console = _plain()
DESCRIPTION, COUNTS = 26, 23
"""Characters of a progress bar's description, and of its counts, remaining time and the spaces between."""


@contextmanager
def progress_bars() -> Iterator[Reporting]:
    """Yield a function that reports progress, and show a bar for each phase that it reports.

    Nothing is shown before the first report, not even the empty line that rich leaves behind without a task.
    """
    shown = _plain(stderr=True)
    bar = min(40, shown.width // 6)
    room = max(shown.width - DESCRIPTION - bar - COUNTS, 1)
    columns = (
        TextColumn(f"{{task.description:<{DESCRIPTION}}}", markup=False),
        BarColumn(bar),
        MofNCompleteColumn(),
        TextColumn("{task.fields[notes]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    bars: dict[Phase, TaskID] = {}
    progress = Progress(*columns, console=shown)

    def report(phase: Phase, done: int, total: int, notes: str) -> None:
        if phase not in bars:
            bars[phase] = progress.add_task(str(phase), total=total, notes="")
            progress.start()
        if done < progress.tasks[bars[phase]].completed:  # the phase starts again: restart its time too
            progress.reset(bars[phase])
        progress.update(bars[phase], completed=done, total=total, notes=shortened(notes, room))

    try:
        yield report
    finally:
        if bars:
            progress.stop()


@contextmanager
def counting(activity: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports how many items are done, and show a bar for it."""
    with progress_bars() as report:
        yield lambda done: report(Phase(activity), done, total, "")


def show_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Print a table of names and values, one pair per line."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in pairs:
        table.add_row(name, value)
    console.print(table)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as errors are printed, in one line on stderr."""
    if IS_FIRST:
        print(f"softtune: {' '.join(str(message).split())}", file=sys.stderr)


def quiet() -> None:
    """Keep other libraries from printing between the progress bars, and show warnings in one line each."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning
    from datasets.utils.logging import disable_progress_bar, set_verbosity_error
    from transformers import logging as transformers_logging

    set_verbosity_error()
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for library in ("accelerate", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
