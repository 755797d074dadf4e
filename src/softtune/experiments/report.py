"""Report pages of comparisons, sweeps and trained adapters, written into their folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from softtune import storage
from softtune.errors import CheckpointError
from softtune.experiments import figures
from softtune.experiments.adapter_report import adapter_page
from softtune.experiments.figures import finished
from softtune.experiments.outcomes import Entry
from softtune.experiments.page import Page, Table, as_html, as_markdown, file_of
from softtune.experiments.result_store import ResultStore
from softtune.experiments.sweep import Sweep
from softtune.formatting import in_units, in_words
from softtune.tasks.metrics import direction
from softtune.training.recipe import holds_adapter

PAGE_NAME, MARKDOWN_NAME = "report.html", "report.md"
SPREAD = " Mean over seeds ± standard deviation."


def write(folder: Path) -> Path:
    """Write the report page of an experiment or an adapter into its folder.

    It is self-contained HTML, and Markdown with each picture as an SVG file.

    Args:
        folder: the folder of a comparison, a sweep or a trained adapter. Its name is the page's title.

    Returns:
        The path of the HTML page.

    Raises:
        CheckpointError: the folder has neither an experiment nor an adapter.
    """
    write_page(page_of(folder, folder.resolve().name), folder, PAGE_NAME, MARKDOWN_NAME)
    return folder / PAGE_NAME


def write_page(page: Page, folder: Path, *names: str) -> None:
    """Write a page to files of these names, as HTML or Markdown by their suffix, and each picture beside them."""
    with storage.staged(folder) as stage:
        for name in names:
            text = as_html(page) if name.endswith(".html") else as_markdown(page)
            (stage / name).write_text(text, encoding="utf-8")
        for picture in page.pictures:
            (stage / file_of(picture)).write_text(picture.svg, encoding="utf-8")


def page_of(folder: Path, title: str) -> Page:
    """The report page of a folder.

    Raises:
        CheckpointError: the folder has neither an experiment nor an adapter.
    """
    store = ResultStore(folder)
    entries = store.entries()
    if not entries and holds_adapter(folder):
        return adapter_page(folder, title)
    if not entries and store.has_sweep:
        raise CheckpointError(f"nothing of the sweep in {folder} is finished", "go on with softtune sweep")
    if not entries:
        raise CheckpointError(
            f"{folder} has no experiment and no adapter", "run softtune train, compare or sweep first"
        )
    if store.has_sweep:
        return sweep_page(Sweep.load(store.sweep_file), entries, title)
    return comparison_page(entries, title)


def comparison_page(entries: Sequence[Entry], title: str) -> Page:
    """The report page of a comparison."""
    several = any(len(entry.outcomes) > 1 for entry in entries)
    return Page(
        title=title,
        texts=[f"{_rows(entries)}{SPREAD if several else ''} Stored is what a task needs beside the model."],
        tables=tables_of(entries),
        notes=failures(entries),
        pictures=figures.comparison_figures(entries),
    )


def tables_of(entries: Sequence[Entry], metric: str | None = None) -> list[Table]:
    """Tables of the entries' metrics and sizes; for a comparison, costs have a table of their own.

    The best entry by a metric is on top, by default by the first metric. Failed entries are left out, and there is no
    table where all failed.
    """
    found = finished(entries)
    if not found:
        return []
    metrics = found[0].metrics
    order = metric or metrics[0]
    ranked = sorted(found, key=lambda entry: [-direction(name) * entry.mean(name) for name in (order, *metrics)])
    worth = {in_words(name): partial(_value, metric=name) for name in metrics}
    sizes = {"trained": _trained, "share": _share}
    if any(entry.at for entry in entries):  # points of a sweep train at once
        return [_table(ranked, {**worth, **sizes})]
    costs = {**sizes, "seconds": _seconds, "stored": _stored, "peak memory": _memory}
    return [_table(ranked, worth), _table(ranked, costs)]


def _table(entries: Sequence[Entry], columns: Mapping[str, Callable[[Entry], str]]) -> Table:
    lines = [[entry.name, *(column(entry) for column in columns.values())] for entry in entries]
    return Table(head=["", *columns], lines=lines)


def failures(entries: Sequence[Entry]) -> list[str]:
    """Why entries failed, one line each."""
    return [f"{entry.name}: {entry.failure}" for entry in entries if entry.failure]


def sweep_page(sweep: Sweep, entries: Sequence[Entry], title: str) -> Page:
    """The report page of a sweep, with its question and finding."""
    spread = SPREAD if sweep.seeds > 1 else ""
    done = len({repr([entry.at[axis] for axis in sweep.over]) for entry in entries})
    unfinished = f" {done} of {sweep.size} points are done." if done < sweep.size else ""
    says = {"Here": sweep.found, "Paper": sweep.paper}
    return Page(
        title=sweep.question or title,
        texts=[f"{_rows(entries)}{unfinished}{spread}", *(f"{who}: {text}" for who, text in says.items() if text)],
        tables=tables_of(entries, sweep.metric),
        notes=failures(entries),
        pictures=figures.sweep_figures(entries, sweep.metric, searched=sweep.trials is not None),
    )


def _rows(entries: Sequence[Entry]) -> str:
    """The numbers of rows and steps as text, so that no row is left out silently."""
    outcomes = [outcome for entry in entries for outcome in entry.outcomes]
    trained = _counts([outcome.training_rows for outcome in outcomes if outcome.steps])
    steps = _counts([outcome.steps for outcome in outcomes if outcome.steps])
    return f"Trained on {trained} rows, {steps} steps; evaluated on {_counts([o.evaluation_rows for o in outcomes])}."


def _counts(numbers: Sequence[int]) -> str:
    return " to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)})) if numbers else "0"


def _value(entry: Entry, metric: str) -> str:
    spread = f" ± {entry.spread(metric):.3f}" if len(entry.outcomes) > 1 else ""
    return f"{entry.mean(metric):.3f}{spread}"


def _trained(entry: Entry) -> str:
    return f"{entry.cost('trained'):,.0f}"


def _share(entry: Entry) -> str:
    return f"{entry.cost('trained') / entry.cost('total'):.3%}"


def _seconds(entry: Entry) -> str:
    return f"{entry.cost('seconds'):.0f}" if entry.cost("steps") else ""


def _stored(entry: Entry) -> str:
    return in_units(entry.cost("stored"))


def _memory(entry: Entry) -> str:
    return in_units(entry.cost("memory")) if entry.cost("steps") else ""
