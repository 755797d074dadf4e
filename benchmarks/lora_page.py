"""The page of the study of soft adapters beside LoRA: what was measured, and what was not."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import timing
from kept import Content, Loaded
from lora import LONG, LONG_SECONDS, LONG_TRIED, SECONDS, STEPS, TRIED, Study, saved
from lora_sets import MATCHED, RANK_8

from softtune.experiments import report
from softtune.experiments.page import Page, Table
from softtune.experiments.pictures import Bar, Picture, bars

NOTHING = "not run"
BLEU = 0.62
"""What E2E must reach in the long run."""
ELSEWHERE = {
    "few_shot": "python benchmarks/few_shot.py",
    "cartridge-0": "python benchmarks/cartridge.py --output build/cartridge",
    "few_steps": "python benchmarks/few_steps.py",
}
"""Results of benchmarks/results that belong to the same question, with the commands that write them."""

Values = Mapping[str, Mapping[str, list[float]]]
"""By method and set a value for each seed."""


def write(study: Study, folder: Path, results: Path = timing.RESULTS) -> None:
    """Write the results so far to ``lora.json`` and the page to ``lora/README.md``, with those that are there already.

    Args:
        study: the study.
        folder: where they are written.
        results: the folder of the other benchmarks' results.
    """
    file = folder / "lora.json"
    records = {**saved(file), **study.kept.all()}
    timing.write(file, {"runs": stamps([*records.values()]), "records": dict(sorted(records.items()))})
    loaded = replace(study, kept=Loaded(study.kept.folder, records))
    report.write_page(page(loaded, records, results), folder / "lora", "README.md")


def page(study: Study, records: Mapping[str, Content], results: Path) -> Page:
    """The page.

    Args:
        study: the study, which says what there is to run.
        records: the results of its runs by name.
        results: the folder of benchmarks/results.
    """
    found = [record for record in records.values() if record["set"] in study.sets]
    total = sum(1 for _ in study.runs())
    done = sum(1 for record in found if record["kind"] not in (LONG, LONG_TRIED))
    texts = [
        "Prefixes, memories, scalings and their combinations beside LoRA (PEFT's, all linear layers) and full "
        "fine-tuning. A cell is the mean over seeds, with the least and the greatest value, and their number. Each "
        "method has the learning rate that was best on rows held out of the training rows, among four around its "
        "default.",
        f"{done} of {total} runs are done. Where a cell says {NOTHING}, nothing is known.",
    ]
    return Page(
        title="Soft adapters beside LoRA",
        texts=texts,
        tables=[
            bounds_table(study, found, results),
            values_table(study, found, SECONDS, "at equal seconds"),
            values_table(study, found, STEPS, "at equal steps"),
            costs_table(study, found, SECONDS, "steps in equal seconds (seconds taken)", "steps", "seconds"),
            costs_table(study, found, STEPS, "seconds of equal steps (steps)", "seconds", "steps"),
            trained_table(study, found),
            rates_table(study, found),
        ],
        notes=[*notes(study), *(f"{stamp['entries']} runs: {said(stamp)}" for stamp in stamps(found))],
        pictures=pictures(study, found),
    )


def stamps(records: Sequence[Content]) -> list[dict[str, Any]]:
    """Hardware and commit with the number and the minutes of their runs."""

    def key(record: Content) -> str:
        return json.dumps([record["hardware"], record["commit"]], sort_keys=True)

    groups = [list(group) for _, group in groupby(sorted(records, key=key), key)]
    return [
        {
            "hardware": group[0]["hardware"],
            "commit": group[0]["commit"],
            "minutes": round(sum(record["minutes"] for record in group), 1),
            "entries": len(group),
        }
        for group in groups
    ]


def said(stamp: Mapping[str, Any]) -> str:
    where = timing.machine(stamp["hardware"])
    return f"python benchmarks/studies.py lora, {stamp['minutes']} minutes on {where}, commit {stamp['commit']}."


def notes(study: Study) -> list[str]:
    budget = "; ".join(f"{name} {each.steps} steps or {each.seconds:g} seconds" for name, each in study.sets.items())
    return [
        f"Budgets: {budget}. Seconds are the processor's, of training with one thread.",
        "The soft adapter of the first two measures is the one of the best trial on its set, of "
        + "; ".join(dict.fromkeys(title_of(study, way) for name in study.sets for way in study.telling(name)))
        + ".",
        "Prefixes of language models start from the text of the recipe in recipes/, an instruction, in some with "
        "examples; prompt tuning from training rows. LoRA and full fine-tuning do not see the text.",
        "Of the learning rates the chosen one is bold, and (edge) says that it is the lowest or the highest that was "
        "tried: another may be better still.",
        "Encoders have a head, which each method trains at its one learning rate, as PEFT does. LoRA's is low for a "
        "head: where it learns no tags in so few steps, the gap is more of that than of LoRA, and so is the mean.",
        "Twitter complaints are 50 rows with labels: 25 are trained on, 25 judged. One row more or less right is .04.",
    ]


def values_of(study: Study, records: Iterable[Content], kind: str) -> Values:
    """The main metric of one kind of runs."""
    found: dict[str, dict[str, list[float]]] = {way: {} for each in study.ways.values() for way in each}
    for record in records:
        if record["kind"] == kind and "failure" not in record:
            found[record["way"]].setdefault(record["set"], []).append(record["value"])
    return found


def values_table(study: Study, records: Sequence[Content], kind: str, title: str) -> Table:
    """A line for each method, with the mean over all sets where none is missing."""
    found = values_of(study, records, kind)
    lines = []
    for way, by_set in found.items():
        cells = [_spread(by_set.get(name, [])) or missing(records, kind, way, name) for name in study.sets]
        lines.append([title_of(study, way), *cells, mean_over_sets(by_set, study.sets)])
    return Table(head=[title, *(each.title for each in study.sets.values()), "mean"], lines=lines)


def mean_over_sets(by_set: Mapping[str, Sequence[float]], sets: Iterable[str]) -> str:
    names = [*sets]
    if any(name not in by_set for name in names):
        return ""
    return f"{statistics.mean(statistics.mean(by_set[name]) for name in names):.3f}"


def missing(records: Iterable[Content], kind: str, way: str, name: str) -> str:
    """Why a cell has no value."""
    failed = [r["failure"] for r in records if (r["kind"], r["way"], r["set"]) == (kind, way, name) and "failure" in r]
    return f"failed: {failed[0]}" if failed else NOTHING


def costs_table(study: Study, records: Sequence[Content], kind: str, title: str, first: str, second: str) -> Table:
    """Means over seeds of two of a run's costs."""

    def cell(way: str, name: str) -> str:
        own = [
            record
            for record in records
            if (record["kind"], record["way"], record["set"]) == (kind, way, name) and "failure" not in record
        ]
        means = [statistics.mean(record[cost] for record in own) for cost in (first, second) if own]
        return f"{means[0]:.0f} ({means[1]:.0f})" if means else NOTHING

    return _by_set(study, title, cell)


def trained_table(study: Study, records: Sequence[Content]) -> Table:
    """Trained numbers of each method on each set, heads included."""

    def cell(way: str, name: str) -> str:
        counts = {r["trained"] for r in records if (r["way"], r["set"]) == (way, name) and "failure" not in r}
        return " or ".join(f"{count:,}" for count in sorted(counts)) or NOTHING

    return _by_set(study, "trained numbers", cell)


def rates_table(study: Study, records: Sequence[Content]) -> Table:
    """The trials: each learning rate with its value on the held-out training rows, the chosen one in bold."""

    def at_the_edge(parts: Sequence[str]) -> bool:
        return len(parts) > 1 and any(part.startswith("**") for part in (parts[0], parts[-1]))

    def cell(way: str, name: str) -> str:
        trials = [r for r in records if (r["kind"], r["way"], r["set"]) == (TRIED, way, name)]
        best = study.best(name, way)
        parts = []
        for trial in sorted(trials, key=lambda trial: trial["learning_rate"]):
            part = f"{trial['learning_rate']:g}: " + ("failed" if "failure" in trial else f"{trial['value']:.3f}")
            is_best = best is not None and best[0] == trial["learning_rate"]
            parts.append(f"**{part}**" if is_best else part)
        return ", ".join(parts) + " (edge)" * at_the_edge(parts) or NOTHING

    return _by_set(study, "learning rate: on held-out training rows", cell)


def _by_set(study: Study, title: str, cell: Callable[[str, str], str]) -> Table:
    every = dict.fromkeys(way for each in study.ways.values() for way in each)
    lines = [
        [title_of(study, way), *(cell(way, name) if way in study.ways[name] else "" for name in study.sets)]
        for way in every
    ]
    return Table(head=[title, *study.sets], lines=lines)


def bounds_table(study: Study, records: Sequence[Content], results: Path) -> Table:
    """What the project has set itself, with what was measured."""
    lines = [
        gap_line(study, records, MATCHED, 0.0, "LoRA r2, as many trained numbers"),
        gap_line(study, records, RANK_8, -0.01, "LoRA r8"),
        *one_way_lines(study, records),
        long_line(records),
        *(line for name, command in ELSEWHERE.items() for line in elsewhere(results / f"{name}.json", command)),
    ]
    return Table(head=["measure", "value", "must be", "holds", "of"], lines=lines)


def gap_line(study: Study, records: Sequence[Content], reference: str, must: float, what: str) -> list[str]:
    """The soft adapter of each set that its trials chose, minus a baseline, over the sets that have both."""
    found = values_of(study, records, SECONDS)
    chosen = {name: way for name in study.sets if (way := chosen_way(study, records, name))}
    gaps = gaps_of(found, chosen, reference)
    name = f"soft adapter that the trials chose - {what}, mean over sets, equal seconds"
    return _bound(name, gaps, must, len(study.sets))


def one_way_lines(study: Study, records: Sequence[Content]) -> list[list[str]]:
    """The one soft adapter that is best over all sets, minus LoRA; chosen by the test rows, so no bound."""
    found = values_of(study, records, SECONDS)
    ours = [way for way in found if _is_ours(study, way)]
    whole = [way for way in ours if all(name in found[way] for name in study.sets)]
    if not whole:
        return []
    best = max(whole, key=lambda way: statistics.mean(statistics.mean(found[way][name]) for name in study.sets))
    gaps = gaps_of(found, dict.fromkeys(study.sets, best), MATCHED)
    name = f"the best one for all sets by these values, {title_of(study, best)} - LoRA r2"
    return [_bound(name, gaps, None, len(study.sets))]


def chosen_way(study: Study, records: Sequence[Content], name: str) -> str | None:
    """The soft adapter of the best trial among the telling ones that train no more numbers than the LoRA of the same
    size; None while trials are missing."""
    own = [record for record in records if record["set"] == name and "failure" not in record]
    sizes = {record["way"]: record["trained"] for record in own}
    fits = [way for way in study.telling(name) if sizes.get(way, 0) <= sizes.get(MATCHED, 0)]
    return study.best_way(name, fits)


def gaps_of(found: Values, chosen: Mapping[str, str], reference: str) -> dict[str, float]:
    """By set the mean of a chosen method minus that of the reference, where both have run."""
    return {
        name: statistics.mean(found[way][name]) - statistics.mean(found[reference][name])
        for name, way in chosen.items()
        if name in found[way] and name in found.get(reference, {})
    }


def _bound(name: str, gaps: Mapping[str, float], must: float | None, sets: int) -> list[str]:
    limit = "" if must is None else f">= {must:g}"
    if not gaps:
        return [name, NOTHING, limit, "", f"0 of {sets} sets"]
    mean = statistics.mean(gaps.values())
    whole = len(gaps) == sets
    holds = "" if must is None or not whole else "yes" if mean >= must else "no"
    each = ", ".join(f"{name} {gap:+.3f}" for name, gap in gaps.items())
    return [name, f"{mean:+.3f}", limit, holds, f"median {statistics.median(gaps.values()):+.3f}: {each}"]


def long_line(records: Sequence[Content]) -> list[str]:
    name = f"BLEU on E2E after at most {LONG_SECONDS} seconds, all official test inputs and references"
    long = [record for record in records if record["kind"] == LONG and "failure" not in record]
    if not long:
        return [name, NOTHING, f">= {BLEU}", "", ""]
    [record] = long
    of = f"{record['way']}, {record['seconds']:.0f} seconds, {record['evaluation_rows']} inputs"
    return [name, f"{record['value']:.3f}", f">= {BLEU}", "yes" if record["value"] >= BLEU else "no", of]


def elsewhere(file: Path, command: str) -> list[list[str]]:
    """The measures of another benchmark, with its command."""
    if not file.is_file():
        return [[command, NOTHING, "", "", ""]]
    content = json.loads(file.read_text(encoding="utf-8"))
    of = f"{command}, commit {content['commit']}"
    holds = {True: "yes", False: "no", None: ""}
    return [[m["measure"], f"{m['value']:.3f}", m["must"] or "", holds[m["holds"]], of] for m in content["measures"]]


def pictures(study: Study, records: Sequence[Content]) -> list[Picture]:
    """Means over all sets at equal seconds, of the methods that have run on all."""
    found = values_of(study, records, SECONDS)
    whole = {way: by_set for way, by_set in found.items() if all(name in by_set for name in study.sets)}
    data = [
        Bar(title_of(study, way), statistics.mean(statistics.mean(by_set[name]) for name in study.sets))
        for way, by_set in whole.items()
    ]
    best_first = sorted(data, key=lambda bar: -bar.value)
    return [bars("Mean over the sets at equal seconds", best_first, unit="mean of the sets' metrics")] if data else []


def title_of(study: Study, way: str) -> str:
    return next(each[way].title for each in study.ways.values() if way in each)


def _is_ours(study: Study, way: str) -> bool:
    return next(each[way].is_ours for each in study.ways.values() if way in each)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}; {len(values)})"
