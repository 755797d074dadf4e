"""What the commands show: a progress bar, tables."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from softtune.wording import shortened

if TYPE_CHECKING:
    from softtune.training.setup import Progress as Reporting


def _plain(*, stderr: bool = False) -> Console:
    """A console that shows texts as they are, brackets and colons too."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


console = _plain()
DESCRIPTION, COUNTS = 26, 23
"""Characters of a progress bar's name, and of its counts, its clock and what is between."""


@contextmanager
def progress_bars() -> Iterator[Reporting]:
    """A function to report progress to, and a bar for every thing that it reports, for the length of the block.

    Nothing is shown before the first report, not even the empty line that bars without a task leave behind.
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
    bars: dict[str, TaskID] = {}
    progress = Progress(*columns, console=shown)

    def report(phase: str, done: int, total: int, notes: str) -> None:
        if phase not in bars:
            bars[phase] = progress.add_task(phase, total=total, notes="")
            progress.start()
        if done < progress.tasks[bars[phase]].completed:  # begun anew, and so is its clock
            progress.reset(bars[phase])
        progress.update(bars[phase], completed=done, total=total, notes=shortened(notes, room))

    try:
        yield report
    finally:
        if bars:
            progress.stop()


@contextmanager
def counting(phase: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to tell how many are done, and a bar for it, for the length of the block."""
    with progress_bars() as report:
        yield lambda done: report(phase, done, total, "")


def show_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in pairs:
        table.add_row(name, value)
    console.print(table)


def quiet() -> None:
    """Keep the libraries below from writing between the bars."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from datasets.utils.logging import disable_progress_bar, set_verbosity_error
    from transformers import logging as transformers_logging

    set_verbosity_error()
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for library in ("accelerate", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
