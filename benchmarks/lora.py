"""Soft adapters beside LoRA and full fine-tuning on seven data sets; a study of ``benchmarks/studies.py``.

    python benchmarks/studies.py lora [--quick]
    python benchmarks/studies.py lora --write

Each method on each set first tries RATES times its default learning rate, with half of the steps each, judged by rows
that are held out of the training rows. At the best of these rates it then trains from three seeds for as many seconds
as the others, and from three for as many steps. Seconds are those of the processor, by the training of a process with
one thread, so that other work on the machine does not count. A run for some seconds has as many steps as fit into them
by the time of a step in the trials; so its rate falls as in any other run, and the seconds that it took are told. On
E2E the most telling soft adapters train once more in bfloat16, on more rows and at LONG_RATES, for LONG_TRIAL steps;
the one that writes best on held-out rows then trains for LONG_SECONDS, and is judged by all official test inputs.

No adapter of softtune's trains more numbers than LoRA of rank 2 on all linear layers: SmolLM2-135M has 610,560 of
these and MiniLM 82,944, as have prefixes of 53 and 18 virtual tokens.

What it takes: 7 sets x 7 methods x 10 runs. The runs with equal seconds have 490 over the seven sets. Equal steps take
LoRA 450 over all sets, by the seconds of single steps on an AMD EPYC at work on other things too, and a soft adapter
three quarters of that. Four trials of half of the steps, three runs of equal steps and three of equal seconds are 1.0
hours for LoRA and full fine-tuning, and 0.9 for each of the four others. Evaluation takes each 0.45 hours, loading
0.06, and the long run 0.3: about 10 core hours in all. The budgets are small for that: a difference that is within the
range of the seeds says nothing.

Results are saved run by run, in runs/studies/lora, and the same command goes on with the rest; several processes may
share it, each on a core. The most telling methods come first, and of these trials and one seed of equal seconds on all
sets, then the other seeds, then equal steps. --write writes what there is, with the table of ``method: auto``, and runs
that a page was written from are not repeated, also where runs/ is lost. --quick runs a few steps of some methods, into
runs/studies/lora-quick.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import intents
import timing
import torch
from kept import Content, Kept
from lora_sets import INTENTS, MATCHED, TELLING, DataSet, Way, sets, ways

from softtune.data import load_records, split_records
from softtune.errors import TrainingError, UnsupportedModelError
from softtune.experiments.baselines import BASELINES
from softtune.experiments.cases import Case
from softtune.experiments.isolated_run import run_isolated
from softtune.load_options import OF_THE_MACHINE
from softtune.tasks.metrics import direction
from softtune.training.fields import read_fields

RATES = (1 / 3, 1, 3, 9)
"""Learning rates to try, in units of the method's default."""
TRIAL = 2
"""The steps of a run are so many times those of a trial."""
SEEDS = 3
HELD_OUT_TWEETS = 25
LONG_SET, LONG_SECONDS, LONG_RATES, LONG_TRIAL = "e2e", 640, (1, 3), 100
LONG_HELD_OUT = 100
POLL = 10
"""Seconds until a process looks again for what another one has finished."""

TRIED, SECONDS, STEPS, LONG_TRIED, LONG = "rate", "seconds", "steps", "long-rate", "long"
"""The kinds of runs."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the study."""

    set: str
    way: str
    kind: str
    """One of ``TRIED``, ``SECONDS``, ``STEPS``, ``LONG_TRIED`` and ``LONG``."""
    number: int = 0
    """The seed; of a trial, and of the long run, the place of its rate in ``RATES``."""

    @property
    def name(self) -> str:
        return f"{self.set}.{self.way}.{self.kind}.{self.number}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The study, or a part of it."""

    kept: Kept
    """The results, in whose folder the files of rows are too."""
    sets: Mapping[str, DataSet]
    chosen: Callable[[str], Sequence[str]] | None = None
    """Names of a set's methods; None for all."""
    rates: Sequence[float] = RATES
    seeds: int = SEEDS
    long_seconds: float = LONG_SECONDS
    long_trial: int = LONG_TRIAL
    long_fields: Mapping[str, Any] = field(
        default_factory=lambda: {"examples": 4096, "evaluation_examples": None, "dtype": "bfloat16"}
    )
    """Fields that the long run and its trials replace."""

    @cached_property
    def ways(self) -> dict[str, dict[str, Way]]:
        """The methods of each set."""
        found = {name: ways(fields) for name, fields in self.fields.items()}
        chosen = {name: self.chosen(name) if self.chosen else [*found[name]] for name in found}
        return {name: {way: found[name][way] for way in chosen[name]} for name in found}

    @cached_property
    def fields(self) -> dict[str, dict[str, Any]]:
        """The recipe's fields of each set."""
        whole = {name: {**read_fields(each.recipe, "recipe"), **each.fields} for name, each in self.sets.items()}
        left_out = ("learning_rate", "epochs")
        return {name: {key: own[key] for key in own if key not in left_out} for name, own in whole.items()}

    @cached_property
    def default_rates(self) -> dict[tuple[str, str], float]:
        """The default learning rate of each set and method."""
        each = {
            (name, way): self._case(name, way, {"learning_rate": None}) for name in self.sets for way in self.ways[name]
        }
        return {
            key: BASELINES[case.entry].learning_rate if case.entry in BASELINES else case.recipe.peak_learning_rate
            for key, case in each.items()
        }

    def runs(self) -> Iterator[Run]:
        """All runs but the long one, the most telling first."""
        every = [(name, way) for name in self.sets for way in self.ways[name]]
        yield from self._runs_of([(name, way) for name, way in every if way in TELLING])
        yield from self._runs_of([(name, way) for name, way in every if way not in TELLING])

    def _runs_of(self, each: Sequence[tuple[str, str]]) -> Iterator[Run]:
        """The runs of some sets and methods: trials and the first seed of each, then the others."""
        for name, way in each:
            yield from (Run(set=name, way=way, kind=TRIED, number=number) for number in range(len(self.rates)))
            yield Run(set=name, way=way, kind=SECONDS)
        yield from (Run(set=s, way=w, kind=SECONDS, number=n) for n in range(1, self.seeds) for s, w in each)
        yield from (Run(set=s, way=w, kind=STEPS, number=n) for n in range(self.seeds) for s, w in each)

    def trials(self, name: str, way: str) -> dict[float, Content | None]:
        """The trials of a method on a set by learning rate; None for those that have not run."""
        trials = [Run(set=name, way=way, kind=TRIED, number=number) for number in range(len(self.rates))]
        return {self.rate(trial): self.kept.get(trial.name) for trial in trials}

    def best(self, name: str, way: str) -> tuple[float, Content] | None:
        """The learning rate of the best trial, with its result; None where one is missing, or all have failed."""
        trials = self.trials(name, way)
        good = {rate: trial for rate, trial in trials.items() if trial and "failure" not in trial}
        if None in trials.values() or not good:
            return None
        default = self.default_rates[name, way]
        rate = max(good, key=lambda rate: (score(good[rate]), -abs(math.log(rate / default))))
        return rate, good[rate]

    def best_way(self, name: str, among: Sequence[str]) -> str | None:
        """The method whose trials were best on a set, of those that have trained; None while some are missing."""
        if any(None in self.trials(name, way).values() for way in among):
            return None
        best = {way: found[1] for way in among if (found := self.best(name, way))}
        return max(best, key=lambda way: score(best[way])) if best else None

    def telling(self, name: str) -> list[str]:
        """The telling soft adapters of a set."""
        return [way for way, own in self.ways.get(name, {}).items() if own.is_ours and way in TELLING]

    def long_trials(self) -> list[Run]:
        """The trials of the long run."""
        numbers = [number for number, rate in enumerate(self.rates) if rate in LONG_RATES]
        each = [(way, number) for way in self.telling(LONG_SET) for number in numbers]
        return [Run(set=LONG_SET, way=way, kind=LONG_TRIED, number=number) for way, number in each]

    def long_run(self) -> Run | None:
        """The long run, of the method and the rate whose trial was best; None while some are missing."""
        results = {trial: self.kept.get(trial.name) for trial in self.long_trials()}
        good = {trial: result for trial, result in results.items() if result and "failure" not in result}
        if None in results.values() or not good:
            return None
        return replace(max(good, key=lambda trial: score(good[trial])), kind=LONG)

    def rate(self, trial: Run) -> float:
        """The learning rate of a trial, or of the long run."""
        return float(f"{self.rates[trial.number] * self.default_rates[trial.set, trial.way]:.2g}")

    def case(self, run: Run) -> Case | None:
        """What a run trains; None while its trials are missing."""
        changes: dict[str, Any] = {"seed": 0, "data_seed": 0}
        if run.kind not in (SECONDS, STEPS):
            changes["learning_rate"] = self.rate(run)
        elif (best := self.best(run.set, run.way)) is not None:
            changes |= {"seed": run.number, "learning_rate": best[0]}
        else:
            return None
        longer = self.long_fields if run.kind in (LONG_TRIED, LONG) else {}
        return self._case(run.set, run.way, {**changes, "max_steps": self._steps(run), **longer}, run)

    def _steps(self, run: Run) -> int:
        """Steps of a run; those that fit into seconds by the time of a step in the trials."""
        own = self.sets[run.set]
        fixed = {STEPS: own.steps, TRIED: max(1, own.steps // TRIAL), LONG_TRIED: self.long_trial}
        if run.kind in fixed:
            return fixed[run.kind]
        kind, limit = (LONG_TRIED, self.long_seconds) if run.kind == LONG else (TRIED, own.seconds)
        every = [replace(run, kind=kind, number=number) for number in range(len(self.rates))]
        done = [trial for each in every if (trial := self.kept.get(each.name)) and "failure" not in trial]
        return max(1, round(limit * sum(trial["steps"] for trial in done) / sum(trial["seconds"] for trial in done)))

    def _case(self, name: str, way: str, changes: Mapping[str, Any], run: Run | None = None) -> Case:
        fields = {**self.fields[name], "output": str(self.kept.folder / "unused")}
        held_out = {TRIED: self.sets[name].held_out, LONG_TRIED: LONG_HELD_OUT}
        if run is not None and run.kind in held_out:
            of_evaluation = ("evaluation", "evaluation_split", "evaluation_examples")
            fields = {field: value for field, value in fields.items() if field not in of_evaluation}
            changes = {key: value for key, value in changes.items() if key not in of_evaluation}
            fields = {**fields, "test_size": held_out[run.kind]}
        own = self.ways[name][way]
        changes = {**own.changes, **changes}
        return Case.from_fields(fields, own.entry, changes, name=f"{name}, {way}", number=0, seeds=1)


def score(result: Content) -> float:
    """The value of a result's main metric, the higher the better."""
    return direction(result["metric"]) * float(result["value"])


def full_study(runs: Path) -> Study:
    """The whole study."""
    folder = runs / "lora"
    return Study(kept=Kept(folder), sets=sets(folder / "data"))


QUICK_SETS = {"clinc": "minilm", "twitter_complaints": "smollm2-135m"}
"""Sets on which a quick study runs all methods, with their base models."""
QUICK_WAYS = (MATCHED, "all")
"""What it runs on the others."""


def quick_study(runs: Path) -> Study:
    """A few steps of the study."""
    folder = runs / "lora-quick"
    return Study(
        kept=Kept(folder),
        sets={name: _shortened(each) for name, each in sets(folder / "data").items()},
        chosen=lambda name: [*ways({"model": QUICK_SETS[name]})] if name in QUICK_SETS else QUICK_WAYS,
        rates=(1,),
        seeds=1,
        long_seconds=0,
        long_trial=1,
        long_fields={},
    )


def _shortened(data_set: DataSet) -> DataSet:
    writes = {"max_new_tokens": 4} if "BLEU" in data_set.title else {}
    fields = {**data_set.fields, "evaluation_examples": 4, **writes}
    return replace(data_set, fields=fields, steps=2, seconds=0, held_out=4)


def write_files(study: Study) -> None:
    """Write files of rows that the data sets do not have as such: twenty intents, and tweets that are held out."""
    folder = study.kept.folder / "data"
    numbers = {intent: str(number) for number, intent in enumerate(intents.chosen(Path("data"), INTENTS))}
    intents.write(Path("data"), folder / "clinc", numbers)
    tweets = folder / "twitter_complaints"
    tweets.mkdir(parents=True, exist_ok=True)
    rows = load_records("data/raft_twitter_complaints/train.csv")
    for name, part in zip(("train", "test"), split_records(rows, test_size=HELD_OUT_TWEETS, seed=0), strict=True):
        if not (tweets / f"{name}.csv").is_file():
            part.to_csv(tweets / f"{name}.csv", index=False)


def restore(study: Study, file: Path) -> None:
    """Take results that a page was written from, so that they do not run again."""
    for name, record in saved(file).items():
        if study.kept.get(name) is None:
            study.kept.save(name, record)


def saved(file: Path) -> dict[str, Content]:
    """The results that a page was written from; empty where there is no such file."""
    return json.loads(file.read_text(encoding="utf-8"))["records"] if file.is_file() else {}


def run(study: Study) -> None:
    """Run what is left of a study, beside other processes that may do the same.

    Raises:
        SystemExit: a saved result has other settings than the study.
    """
    torch.set_num_threads(1)
    stamp, todo = timing.stamp(), [*study.runs()]
    while todo:
        has_run = False
        for each in todo:
            if (case := study.case(each)) is None:
                continue
            study.kept.check(each.name, digest(case))
            if study.kept.once(each.name, partial(result, each, case, stamp)):
                has_run = True
                print(f"{time.strftime('%H:%M')} {each.name}", flush=True)
        every = (*study.runs(), *study.long_trials(), study.long_run())
        todo = [each for each in every if each and not _is_over(study, each)]
        if todo and not has_run:
            time.sleep(POLL)


def _is_over(study: Study, run: Run) -> bool:
    """Whether a run is done, or will never be, since none of its method's rates trains."""
    if study.kept.get(run.name) is not None:
        return True
    trials = study.trials(run.set, run.way).values()
    return run.kind in (SECONDS, STEPS) and None not in trials and study.best(run.set, run.way) is None


def digest(case: Case) -> str:
    """What tells a case from others, wherever its files are, and with whatever fields recipes have that are not set."""
    left_out = {"output", "train", "evaluation", *OF_THE_MACHINE}
    fields = case.recipe.model_dump(mode="json", exclude=left_out, exclude_none=True)
    asked = [case.entry, case.baseline_options, fields]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def result(run: Run, case: Case, stamp: Mapping[str, Any]) -> Content:
    """Train and evaluate. Training that diverges, and a method that the model does not take, are results too.

    Args:
        run: the run.
        case: what it trains.
        stamp: hardware and commit.
    """
    clock, start = timing.TrainingClock(), time.perf_counter()
    found: Content = {**vars(run), "learning_rate": case.recipe.learning_rate, "asked": digest(case), **stamp}
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_isolated(case, case.recipe.model_copy(update={"output": f"{folder}/run"}), clock)
    except (TrainingError, UnsupportedModelError) as error:
        return {**found, "failure": str(error).partition("\n")[0], "minutes": _minutes(start)}
    metric = next(iter(outcome.metrics))
    return {
        **found,
        "metric": metric,
        "value": outcome.metrics[metric],
        "metrics": outcome.metrics,
        "trained": outcome.trained,
        "steps": outcome.steps,
        "seconds": round(clock.seconds, 2),
        "training_rows": outcome.training_rows,
        "evaluation_rows": outcome.evaluation_rows,
        "minutes": _minutes(start),
    }


def _minutes(start: float) -> float:
    return round((time.perf_counter() - start) / 60, 2)
