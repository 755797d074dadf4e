"""Runs the papers' questions at a small scale, and methods on known data sets, with results in docs/results.

    python benchmarks/studies.py [NAME ...] [--write]
    python benchmarks/studies.py lora [--quick] [--write]

A name is that of a sweep in recipes/studies, one of HEADLINES, or lora: soft adapters beside LoRA, described in
lora.py. By default all but the last run; those with results in runs/studies resume. --write runs nothing, and writes
the pages of saved results again. The data is read from the folder data, as described in recipes/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lora
import lora_auto
import lora_page
import timing

from softtune.cli.console import progress_bars, quiet
from softtune.experiments import report
from softtune.experiments.adapter_report import bias_cells, biases
from softtune.experiments.compare import compare
from softtune.experiments.outcomes import Entry
from softtune.experiments.page import Page
from softtune.experiments.result_store import ResultStore
from softtune.experiments.sweep import Sweep, sweep
from softtune.training.progress import Progress
from softtune.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
STUDIES, RESULTS, RUNS = ROOT / "recipes" / "studies", ROOT / "docs" / "results", ROOT / "runs" / "studies"
STAMPS_NAME = "stamps.json"
"""File in a study's folder with the hardware and commit of each entry."""

LORA = "lora"
"""The study in lora.py."""

HEADLINES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "e2e": (
        "E2E, tables to text",
        ["prefix-tuning", "prompt-tuning", "lora", "zero-shot"],
        {"examples": 1024, "epochs": 1},
    ),
    "sst2": ("SST-2, sentiment", ["prefix-tuning", "prompt-tuning", "lora", "zero-shot", "few-shot"], {"epochs": 3}),
    "sms_spam": ("SMS spam", ["prefix-tuning", "prompt-tuning", "lora", "zero-shot", "few-shot"], {"batch_size": 8}),
    "btc_ner": (
        "Broad Twitter Corpus, entities",
        ["p-tuning-v2", "bitfit", "head", "full"],
        {"examples": 2048, "evaluation_examples": 1000},
    ),
    "squad": (
        "SQuAD subset, answers",
        ["p-tuning-v2", "bitfit", "head"],
        {"examples": 1536, "epochs": 4, "evaluation_examples": 400},
    ),
    "scitldr": ("SciTLDR, summaries", ["prefix-tuning", "zero-shot"], {"evaluation_examples": 100}),
}
"""Recipes to compare methods on: the page's title, the entries, and recipe fields to replace."""

RATES = {
    "btc_ner": {"bitfit": 1e-2, "full": 2e-4, "head": 1e-1},
    "squad": {"bitfit": 3e-3, "head": 1e-2},
}
"""Learning rates of entries that use neither the recipe's nor their default."""

LOOKED_INTO = {"biases": "all"}
"""Studies whose page shows how much the biases of a point's first adapter have changed (Ben Zaken et al. 2022, figure
2)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few steps of lora, beside its results")
    given = parser.parse_args()
    every = [*sorted(file.stem for file in STUDIES.glob("*.yaml")), *HEADLINES]
    if unknown := [name for name in given.names if name not in (*every, LORA)]:
        raise SystemExit(f"no study {unknown[0]!r}: use some of {', '.join((*every, LORA))}")
    if given.quick and given.names != [LORA]:
        raise SystemExit(f"--quick is for the study {LORA}: name it alone")
    quiet()
    if given.quick:
        quick(lora.quick_study(RUNS), is_run=not given.write)
        return
    for name in given.names or every:
        if not given.write:
            run(name)
        if name == LORA or (RESULTS / f"{name}.json").is_file():
            write(name)
    write_index()


def quick(study: lora.Study, *, is_run: bool) -> None:
    """Run a few steps of the study of LoRA, and write its page beside them."""
    if is_run:
        lora.write_files(study)
        lora.run(study)
    lora_page.write(study, study.kept.folder / "page")


def run(name: str) -> None:
    """Run the rest of a study, and save its results with the hardware and the commit of each entry."""
    if name == LORA:
        beside_lora = lora.full_study(RUNS)
        lora.write_files(beside_lora)
        lora.restore(beside_lora, RESULTS / f"{name}.json")
        lora.run(beside_lora)
        return
    with stamping(RUNS / name), progress_bars() as progress:
        entries = (headline if name in HEADLINES else study)(name, progress)
    content = {"runs": stamps(RUNS / name), "entries": [dataclasses.asdict(entry) for entry in entries]}
    if name in LOOKED_INTO:
        content["bias_changes"] = bias_cells(ResultStore(RUNS / name).run_folder(LOOKED_INTO[name], 0))
    timing.write(RESULTS / f"{name}.json", content)


@contextmanager
def stamping(folder: Path) -> Iterator[None]:
    """When the block ends, even by Ctrl-C, record hardware and commit of the entries that are new in the folder."""
    clock, before, stamp = time.perf_counter(), ResultStore(folder).entries(), timing.stamp()
    try:
        yield
    finally:
        new = [entry.name for entry in ResultStore(folder).entries() if entry not in before]
        older = [{**run, "entries": [name for name in run["entries"] if name not in new]} for run in stamps(folder)]
        minutes = round((time.perf_counter() - clock) / 60, 1)
        runs = [run for run in (*older, {**stamp, "minutes": minutes, "entries": new}) if run["entries"]]
        timing.write(folder / STAMPS_NAME, {"runs": runs})


def stamps(folder: Path) -> list[dict[str, Any]]:
    """Hardware, commit, minutes and entries of each time that a study ran."""
    file = folder / STAMPS_NAME
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.is_file() else []


def study(name: str, progress: Progress) -> list[Entry]:
    config = Sweep.load(STUDIES / f"{name}.yaml")
    return sweep(config, Recipe.load(config.recipe, {"output": str(RUNS / name)}), progress=progress)


def headline(name: str, progress: Progress) -> list[Entry]:
    _, entries, fields = HEADLINES[name]
    recipe = Recipe.load(ROOT / "recipes" / f"{name}.yaml", {**fields, "output": str(RUNS / name)})
    return compare(recipe, entries, seeds=1, learning_rates=RATES.get(name, {}), progress=progress)


def write(name: str) -> None:
    """Write the page of a study to docs/results."""
    if name == LORA:
        beside_lora = lora.full_study(RUNS)
        lora_page.write(beside_lora, RESULTS)
        lora_auto.write(beside_lora, [*lora.saved(RESULTS / f"{name}.json").values()])
        return
    results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    entries = [Entry.from_dict(entry) for entry in results["entries"]]
    if name in HEADLINES:
        page = report.comparison_page(entries, HEADLINES[name][0])
    else:
        page = report.sweep_page(Sweep.load(STUDIES / f"{name}.yaml"), entries, name)
    if "bias_changes" in results:
        page = dataclasses.replace(page, pictures=[*page.pictures, biases(results["bias_changes"])])
    report.write_page(signed(page, name, results), RESULTS / name, "README.md")


def write_index() -> None:
    """Write the index of all pages."""
    names = sorted(file.stem for file in RESULTS.glob("*.json"))
    sweeps = [name for name in names if name not in (*HEADLINES, LORA)]
    papers = [name for name in sweeps if Sweep.load(STUDIES / f"{name}.yaml").paper]
    lines = [
        "# Results",
        "",
        "The papers' questions at a small scale, and what methods come to on known data sets. "
        "`python benchmarks/studies.py` runs them all, and lora where it is named; several processes can share the "
        "names. Seconds and memory are of a process with one thread, while others worked on the second core, and at "
        "times on its own: take differences of a tenth for nothing. Hours count such company too.",
        *listed("The papers' questions", papers),
        *listed("Known data sets", [name for name in names if name not in papers]),
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def listed(title: str, names: list[str]) -> list[str]:
    """A section of the index, with the time that its studies take."""
    results = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    hours = sum(run["minutes"] for each in results for run in each["runs"]) / 60
    pages = [(RESULTS / name / "README.md").read_text(encoding="utf-8") for name in names]
    titles = [page.partition("\n")[0].removeprefix("# ") for page in pages]
    links = [f"- [{title}]({name}/README.md)" for title, name in zip(titles, names, strict=True)]
    return ["", f"## {title}", "", f"{hours:.1f} hours on one core.", "", *links]


def signed(page: Page, name: str, results: dict[str, Any]) -> Page:
    """A page with notes on hardware and commit, entry by entry where not all ran at once."""
    runs = results["runs"]
    whose = [f" ({', '.join(run['entries'])})" if len(runs) > 1 else "" for run in runs]
    says = [
        f"python benchmarks/studies.py {name}{entries}: {run['minutes']} minutes on {timing.machine(run['hardware'])}, "
        f"commit {run['commit']}."
        for run, entries in zip(runs, whose, strict=True)
    ]
    rates = ", ".join(f"{entry} {rate:g}" for entry, rate in RATES.get(name, {}).items())
    own = [f"Learning rates that are neither the recipe's nor the defaults: {rates}."] if rates else []
    return dataclasses.replace(page, notes=[*page.notes, *own, *says])


if __name__ == "__main__":
    main()
