"""The tables that commands print of a training run and of predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from rich.table import Table

from softtune.cli.console import console, show_pairs
from softtune.formatting import in_units, in_words, shortened
from softtune.tasks.metrics import LOSS, METRICS, Metric, Quality
from softtune.training.learning_rate import STEPS, RangeTest
from softtune.training.profile import Profile
from softtune.training.report import Report

MOST_CLASSES, MOST_MISTAKES, LONGEST = 40, 10, 200
"""Maximum numbers of labels and mistakes to show, and of characters in a cell."""


def show_report(report: Report, title: str = "") -> None:
    """Print the table of a training run."""
    quality = report.evaluation.quality
    intervals = quality.intervals() if quality else {}
    pairs = [pair for name, interval in intervals.items() for pair in _quality(report, name, interval)]
    pairs += [(f"leave-one-out {in_words(name)}", _leave_one_out(report, name)) for name in report.leave_one_out[1]]
    pairs += [
        ("trained on", f"{_rows(report.training_rows, report.truncated)}, {report.steps} steps"),
        *([("validated on", _validated(report))] if report.validation_rows else []),
        ("evaluated on", _rows(report.evaluation_rows, report.evaluation.truncated)),
        ("trained parameters", f"{report.trained:,} of {report.total:,} ({report.trained / report.total:.3%})"),
        ("adapter", f"{report.folder} ({in_units(report.size)})"),
        *([("pushed to", report.repository)] if report.repository else []),
        ("training", f"{report.seconds:.0f} s"),
    ]
    show_pairs(title, pairs)


def show_quality(quality: Quality) -> None:
    """Print the metrics with their intervals, and precision, recall and F1 for each label."""
    intervals, metrics = quality.intervals(), quality.metrics.items()
    show_pairs(
        f"{quality.rows} records",
        [(in_words(name), f"{_figure(name, value)} ({_between(name, intervals[name])})") for name, value in metrics],
    )
    if not 0 < len(quality.classes) <= MOST_CLASSES:
        return
    table = Table("", "precision", "recall", "F1", "count", title="By label", title_justify="left")
    for label, scores in quality.classes.items():
        table.add_row(
            label, *(f"{scores[name]:.1%}" for name in ("precision", "recall", "f1")), f"{scores['rows']:.0f}"
        )
    console.print(table)


def show_mistakes(quality: Quality, answered: Dataset, columns: Sequence[str], rows: Sequence[int]) -> None:
    """Print the first records that were not answered right, with the numbers of their rows (from 0 in ``rows``)."""
    if not quality.mistakes:
        return
    title = f"{len(quality.mistakes)} of {quality.rows} records are not answered right to the letter"
    table = Table("row", *columns, title=title, title_justify="left")
    for mistake in quality.mistakes[:MOST_MISTAKES]:
        cells = (in_cell(answered[mistake][column]) for column in columns)
        table.add_row(str(rows[mistake] + 1), *cells)
    console.print(table)


def show_profile(profile: Profile) -> None:
    """Print the time of a training step by kind of work, and its lower bounds."""
    table = Table("", "ms", "of a step", title="A training step", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(f"all of it, {profile.tokens} tokens", f"{1000 * profile.seconds:.1f}", "100%", end_section=True)
    for kind, share in sorted(profile.shares.items(), key=lambda pair: -pair[1]):
        table.add_row(kind, f"{1000 * share * profile.seconds:.1f}", f"{share:.0%}")
    table.add_section()
    limits = {"its matrix products alone": profile.products, "reading the weights twice": profile.weights}
    for name, seconds in limits.items():
        table.add_row(name, f"{1000 * seconds:.1f}", f"{seconds / profile.seconds:.0%}")
    console.print(table)
    limit = max(limits, key=limits.__getitem__)
    console.print(
        f"{profile.tokens / profile.seconds:.0f} tokens/s. A step takes {profile.seconds / limits[limit]:.2f} times as "
        f"long as {limit}, the higher of these two limits.",
        soft_wrap=True,
    )


def show_range_test(test: RangeTest) -> None:
    """Print the losses of a learning rate range test as bars."""
    table = Table("learning rate", "loss", "", title="Losses of steps with ever higher rates", title_justify="left")
    highest = max(test.losses)
    for rate, loss in zip(test.rates, test.losses, strict=True):
        mark = "  lowest" if rate == test.lowest else ""
        table.add_row(f"{rate:.1e}", f"{loss:.3f}", "█" * round(40 * loss / highest) + mark)
    console.print(table)
    if test.end is not None:
        console.print(f"Stopped after step {len(test.losses)} of {STEPS}: {test.end}.")
    if test.suggestion is None:
        console.print("The loss has hardly fallen at any rate: keep the method's own.")
        return
    console.print(f"Try --learning-rate {test.suggestion:.0e}, a tenth of the rate at which the loss was lowest.")


def _quality(report: Report, metric: str, interval: tuple[float, float]) -> Iterator[tuple[str, str]]:
    """A metric's lines in the table: before and after training and, for an ensemble, by vote and of its members."""
    label, evaluation = in_words(metric), report.evaluation
    before, after = (_figure(metric, side[metric]) for side in (report.before, report.after))
    yield label, f"{before} before, {after} after ({_between(metric, interval)})"
    if evaluation.members:
        members = [member[metric] for member in evaluation.members]
        mean = _figure(metric, sum(members) / len(members))
        yield f"{label} by vote", _figure(metric, evaluation.vote[metric])
        yield f"{label} of one", f"{_between(metric, (min(members), max(members)))}, {mean} on average"


def _leave_one_out(report: Report, metric: str) -> str:
    """A metric on the rows that the prefix starts from, each of which is answered without its own tokens."""
    before, after = (_figure(metric, side[metric]) for side in report.leave_one_out)
    return f"{before} in context, {after} after training on these rows"


def _figure(metric: str, value: float) -> str:
    return format(value, METRICS.get(metric, Metric()).format)


def _between(metric: str, interval: tuple[float, float]) -> str:
    return " to ".join(_figure(metric, end) for end in interval)


def in_cell(value: Any) -> str:
    """A value as one line of a cell: the words of a list are joined by spaces, its texts by bars."""
    values = value if isinstance(value, list) else [value]
    parts = [str(part.get("text", part.get("content", part)) if isinstance(part, dict) else part) for part in values]
    text = (" | " if any(" " in part for part in parts) else " ").join(parts)
    return shortened(" ".join(text.split()), LONGEST)


def _validated(report: Report) -> str:
    best = ", ".join(map(str, report.best_steps))
    was = "loss was lowest" if report.best_by == LOSS else f"{in_words(report.best_by)} was best"
    return f"{_rows(report.validation_rows, 0)}; their {was} at step {best}, which is kept"


def _rows(count: int, truncated: int) -> str:
    return f"{count} rows, {truncated} of them cut to fit" if truncated else f"{count} rows"
