"""What few steps come to: softtune's prefix against PEFT's own, and methods whose virtual tokens learn slowly.

    python benchmarks/few_steps.py [sst2|sms_spam|defaults ...] [--seeds N] [--sst2 FOLDER]

sst2 and sms_spam: PEFT trains its own prefix, 30 virtual tokens from N(0, 1) at 3e-2 with linear decay, for 96 steps of
8 rows. softtune's prefix starts from a text and trains at its default rate, without warm-up, for 1, 4, 16 or 28 steps,
as few as reach PEFT's accuracy and balanced accuracy on 400 other rows. Compared are the processor's seconds of both
trainings, each by a process with one thread; the start of softtune's prefix, one forward over its text, is not among
them. defaults: prompt tuning and P-tuning at their defaults, 96 steps on SST-2.

SmolLM2-135M, 256 training rows. Each run is saved in runs/few_steps, from where the same command goes on; several
processes may each take a group. Means are shown when all that is named has run, and written to results/few_steps.json
where these are all groups.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import steps
import timing
import torch
from kept import Content, Kept
from transformers import Trainer, set_seed

from softtune import compat
from softtune.cli.console import quiet
from softtune.data import Collator
from softtune.experiments.answering import metrics_of
from softtune.experiments.cases import Case
from softtune.experiments.isolated_run import run_isolated
from softtune.pretrained import load_base_model
from softtune.training.folder import RunFolder
from softtune.training.recipe import Recipe
from softtune.training.setup import BaseModels, Rows, Setup
from softtune.training.trainer import training_arguments

ROOT = Path(__file__).parents[1]
VIRTUAL_TOKENS, RATE = 30, 3e-2
"""PEFT's usual settings."""
FEW = (1, 4, 16, 28)
"""Steps of softtune's prefix; the most take about a sixth of the seconds of PEFT's."""
METRICS = ("accuracy", "balanced_accuracy")
SHARE = 0.166
"""The part of PEFT's seconds that softtune's prefix may take: a sixth."""
SLOW = {"PROMPT_TUNING": 0.87, "P_TUNING": 0.85}
"""Methods that learn slowly, with the accuracy that their defaults must reach."""
DEFAULTS = "defaults"
GROUPS = (*steps.TASKS, DEFAULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sst2", type=Path, default=Path("data/sst2"))
    given = parser.parse_args()
    groups = timing.chosen(parser, given.groups, GROUPS)
    quiet()
    torch.set_num_threads(1)
    found = run(Kept(ROOT / "runs" / "few_steps"), groups, given.seeds, given.sst2)
    measures = [line for group in groups for line in measures_of(found, group, given.seeds)]
    timing.show("few_steps", measures)
    if {*groups} == {*GROUPS}:
        timing.save("few_steps", {"measures": measures, "runs": found})


def run(kept: Kept, groups: Sequence[str], seeds: int, sst2: Path) -> dict[str, Content]:
    """Run what is left.

    Raises:
        SystemExit: another process runs a part.
    """
    found: dict[str, Content] = {}
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            task = "sst2" if group == DEFAULTS else group
            Path(folder, group).mkdir()
            files = steps.write_data(task, Path(folder, group), sst2)
            for seed in range(seeds):
                recipe = partial(steps.recipe, task, Path(folder, "run"), files, seed)
                for name, measure in (slow_runs if group == DEFAULTS else runs)(task, recipe):
                    kept.once(f"{group}.{name}.{seed}", measure)
                    if (result := kept.get(f"{group}.{name}.{seed}")) is None:
                        raise SystemExit("another process runs the rest: the same command goes on when it has ended")
                    found[f"{group}.{name}.{seed}"] = result
                    if name != "peft" and group != DEFAULTS and reaches(result, found[f"{group}.peft.{seed}"]):
                        break
    return found


def runs(task: str, recipe: Any) -> Iterator[tuple[str, Any]]:
    """PEFT's prefix, then softtune's with ever more steps; each with what measures it.

    Args:
        task: one of ``steps.TASKS``.
        recipe: makes a recipe from some fields.
    """
    plain = {"options": {"num_virtual_tokens": VIRTUAL_TOKENS, "init_weights": "random"}, "max_steps": steps.STEPS}
    yield "peft", partial(by_peft, recipe(plain))
    _, tokenizer = load_base_model("smollm2-135m")
    length = len(tokenizer(steps.TEXTS[task])["input_ids"])
    options = {"num_virtual_tokens": length, "init_text": steps.TEXTS[task]}
    for few in FEW:
        yield f"steps-{few}", partial(by_softtune, recipe({"options": options, "max_steps": few, "warmup_steps": 0}))


def slow_runs(task: str, recipe: Any) -> Iterator[tuple[str, Any]]:
    """The methods that learn slowly, each with what measures it."""
    for method in SLOW:
        yield method, partial(by_softtune, recipe({"method": method, "options": {}, "max_steps": steps.STEPS}))


def by_softtune(recipe: Recipe) -> Content:
    """Train and evaluate an adapter."""
    clock, case = timing.TrainingClock(), Case(name="softtune", number=0, recipe=recipe, seeds=1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_isolated(case, recipe.model_copy(update={"output": f"{folder}/run"}), clock)
    return content(outcome.metrics, clock.seconds, outcome.steps)


def by_peft(recipe: Recipe) -> Content:
    """Train a prefix by PEFT and transformers' Trainer, and evaluate it by softtune, with the same weights."""
    rows = Rows.load(recipe)
    setup = Setup.prepare(RunFolder(recipe), rows, BaseModels(), lambda *_: None)
    base, tokenizer = load_base_model(recipe.model)
    set_seed(recipe.seed)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
    model = peft.get_peft_model(base, config)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": steps.STEPS, "per_device_train_batch_size": recipe.batch_size, "seed": recipe.seed}
        arguments = training_arguments(folder, learning_rate=RATE, **settings)
        arguments.save_strategy = "no"
        collate = Collator(int(tokenizer.pad_token_id), padding_side="left")
        trainer = Trainer(model=model, args=arguments, train_dataset=setup.examples, data_collator=collate)
        for callback in compat.console_callbacks():
            trainer.remove_callback(callback)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    trained = model.prompt_encoder["default"].embedding.weight.data
    setup.model.prompt_encoder["default"].embedding.weight.data.copy_(trained)
    metrics = metrics_of(setup.model, setup.tokenizer, setup.task, rows, lambda *_: None)
    return content(metrics, seconds, steps.STEPS)


def content(metrics: Mapping[str, float], seconds: float, done: int) -> Content:
    """What is kept of a run."""
    scores = {name: metrics[name] for name in METRICS}
    return {**scores, "seconds": round(seconds, 2), "steps": done, **timing.stamp()}


def reaches(result: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether a run is as good as another by both metrics."""
    return all(result[name] >= other[name] for name in METRICS)


def measures_of(found: Mapping[str, Content], group: str, seeds: int) -> list[dict[str, Any]]:
    """Lines of the results."""
    if group == DEFAULTS:
        return [
            timing.measure(
                f"sst2: accuracy of {method} at its defaults, {steps.STEPS} steps, mean of {seeds} seeds",
                statistics.mean(found[f"{group}.{method}.{seed}"]["accuracy"] for seed in range(seeds)),
                must,
                at_least=True,
            )
            for method, must in SLOW.items()
        ]
    reached = []
    for seed in range(seeds):
        theirs = found[f"{group}.peft.{seed}"]
        own = [found[name] for name in (f"{group}.steps-{few}.{seed}" for few in FEW) if name in found]
        first = next((result for result in own if reaches(result, theirs)), None)
        if first and (share := first["seconds"] / theirs["seconds"]) <= SHARE:
            reached.append((share, first["steps"]))
    theirs_all = [found[f"{group}.peft.{seed}"] for seed in range(seeds)]
    return [
        timing.measure(
            f"{group}: seeds whose prefix was as good as PEFT's in a sixth of its seconds, of {seeds}",
            len(reached),
            seeds,
            at_least=True,
        ),
        *(
            timing.measure(f"{group}: {what}, mean of these", statistics.mean(values), None)
            for what, values in zip(("seconds / PEFT's", "steps"), zip(*reached, strict=True), strict=False)
        ),
        *(
            timing.measure(f"{group}: {name} of PEFT's prefix", statistics.mean(run[name] for run in theirs_all), None)
            for name in METRICS
        ),
    ]


if __name__ == "__main__":
    main()
