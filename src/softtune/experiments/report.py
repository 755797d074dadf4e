"""A comparison as a page that stands alone, as Markdown, and as lines of a table."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from softtune import storage
from softtune.errors import CheckpointError
from softtune.experiments.compare import ENTRIES_NAME, Entry, Outcome, entries_of
from softtune.experiments.pictures import Bar, Picture, bars, scatter

PAGE_NAME, MARKDOWN_NAME = "report.html", "report.md"

HEAD = ("", "trained", "share", "stored", "seconds", "peak memory")

STYLE = """
:root { color-scheme: light dark; --ink: #20262c; --paper: #ffffff; --line: #d5dbe1; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ea; --paper: #14181c; --line: #333b43; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 0; } figure svg { width: 100%; height: auto; max-width: 46rem; }
figcaption, footer { opacity: .8; }
"""


def write(folder: Path, title: str) -> Path:
    """Write a comparison's page and Markdown beside its entries.

    Args:
        folder: of the comparison.
        title: of the page.

    Returns:
        The page.

    Raises:
        CheckpointError: there is no comparison in the folder.
    """
    entries = entries_of(folder)
    if not entries:
        raise CheckpointError(f"{folder} has no {ENTRIES_NAME} of a comparison: run softtune compare first")
    with storage.staged(folder) as stage:
        (stage / MARKDOWN_NAME).write_text(markdown(entries), encoding="utf-8")
        (stage / PAGE_NAME).write_text(page(title, entries), encoding="utf-8")
    return folder / PAGE_NAME


def rows(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of a table, the best entry by the first metric on top; those that failed are not in it."""
    metrics = _metrics(entries)
    head = [HEAD[0], *(metric.replace("_", " ") for metric in metrics), *HEAD[1:]]
    ranked = sorted((e for e in entries if e.outcomes), key=lambda entry: -entry.mean(metrics[0]))
    return head, [
        [entry.name, *(_value(entry, metric) for metric in metrics), *_costs(entry.outcomes[0])] for entry in ranked
    ]


def failures(entries: Sequence[Entry]) -> list[str]:
    """Why entries are not in the table."""
    return [f"{entry.name}: {entry.failure}" for entry in entries if entry.failure]


def markdown(entries: Sequence[Entry]) -> str:
    """The table and the failures."""
    head, lines = rows(entries)
    table = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]
    return "\n".join([*table, "", *(f"- {failure}" for failure in failures(entries))]) + "\n"


def page(title: str, entries: Sequence[Entry]) -> str:
    """The whole of it in one HTML file."""
    head, lines = rows(entries)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        "<p>Mean over seeds ± standard deviation; stored is what a task needs on disk beside the base model.</p>",
        f'<div class="wide">{_table(head, lines)}</div>',
        *(f"<p>{html.escape(failure)}</p>" for failure in failures(entries)),
        *map(_section, pictures(entries)),
    ]
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    icon = '<link rel="icon" href="data:,">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{meta}{icon}<title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def pictures(entries: Sequence[Entry]) -> list[Picture]:
    """Quality, quality against what is trained, time and memory."""
    found = [entry for entry in entries if entry.outcomes]
    trained = [entry for entry in found if entry.outcomes[0].steps]
    metric = _metrics(entries)[0]
    name = metric.replace("_", " ")
    quality = [
        Bar(entry.name, entry.mean(metric), entry.spread(metric), [o.metrics[metric] for o in entry.outcomes])
        for entry in found
    ]
    drawn = [bars(f"Quality: {name}", quality, unit=f"{name}, dots are seeds")]
    if trained:
        points = {e.name: (e.outcomes[0].trained / e.outcomes[0].total, e.mean(metric)) for e in trained}
        seconds = [Bar(entry.name, mean(o.seconds for o in entry.outcomes)) for entry in trained]
        memory = [Bar(entry.name, max(o.memory for o in entry.outcomes) / 1e9) for entry in trained]
        drawn += [
            scatter("Quality against what is trained", points, across="share of the parameters", up=name),
            bars("Time", seconds, unit="seconds of training, one seed"),
            bars("Memory", memory, unit="GB at most while training, with the base model"),
        ]
    return drawn


def _metrics(entries: Sequence[Entry]) -> list[str]:
    return next((list(entry.outcomes[0].metrics) for entry in entries if entry.outcomes), [])


def _value(entry: Entry, metric: str) -> str:
    spread = f" ± {entry.spread(metric):.3f}" if len(entry.outcomes) > 1 else ""
    return f"{entry.mean(metric):.3f}{spread}"


def _costs(outcome: Outcome) -> list[str]:
    if not outcome.steps:
        return ["0", "0%", "0 B", "", ""]
    return [
        f"{outcome.trained:,}",
        f"{outcome.trained / outcome.total:.3%}",
        storage.in_units(outcome.stored),
        f"{outcome.seconds:.0f}",
        storage.in_units(outcome.memory),
    ]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table>"


def _section(picture: Picture) -> str:
    says = f"<figcaption>{html.escape(picture.says)}</figcaption>" if picture.says else ""
    return f"<h2>{html.escape(picture.title)}</h2><figure>{picture.svg}{says}</figure>"
