"""Checks that recipes can train at once: settings that they share, outputs of their own, trackers that allow it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softtune.errors import ConfigError
from softtune.extras import missing
from softtune.load_fields import LoadFields
from softtune.methods.base import config_class_of
from softtune.training import ranks
from softtune.training.multi_run import TASKS
from softtune.training.recipe import Recipe


def check_compatible(recipes: Sequence[Recipe]) -> None:
    """Check before any work that recipes can run, and run at once.

    Raises:
        ConfigError: two recipes differ in a shared setting or have the same output, their task trains one adapter at a
            time, a tracker is not installed, several adapters are reported to W&B, or there is no such device.
        MissingExtraError: the package of a quantisation, or of an optimiser, is not installed.
    """
    _check_trackers(recipes)
    for recipe in recipes:
        recipe.load_options.check_machine()
        if "8bit" in (recipe.optim or "") and find_spec("bitsandbytes") is None:
            raise missing("bitsandbytes", "quant", user=f"the optimiser {recipe.optim}")
    alone = next((recipe for recipe in recipes if not trains_beside_others(recipe)), None)
    if alone is not None and sum(recipe.ensemble for recipe in recipes) > 1:
        name = alone.method.value if alone.task in TASKS else alone.task.value
        raise ConfigError(f"{name} trains one adapter at a time", "run one recipe, without an ensemble")
    outputs = Counter(str(Path(recipe.output).resolve()) for recipe in recipes)
    if twice := [output for output, count in outputs.items() if count > 1]:
        raise ConfigError(f"{twice[0]} is the output of {outputs[twice[0]]} recipes", "give each one its own")
    first = recipes[0]
    for recipe in recipes:
        for (name, own), other in zip(shared(recipe).items(), shared(first).values(), strict=True):
            if own != other:
                raise ConfigError(
                    f"{name} is {other!r} for {first.output} and {own!r} for {recipe.output}",
                    "recipes that run at once share it, run these one after the other",
                )


def trains_beside_others(recipe: Recipe) -> bool:
    """Whether a recipe's adapter can train in one batch with others: their losses are the cross-entropy of logits."""
    return recipe.task in TASKS and not config_class_of(recipe.method).has_own_loss


def check_processes(recipes: Sequence[Recipe]) -> None:
    """Check that the processes that torchrun or accelerate has started can share the batches.

    Raises:
        ConfigError: a batch does not divide among them, all are told one place for their base models, or accelerate is
            to wrap them.
    """
    if ranks.world_size() == 1:
        return
    for plugin in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false") == "true":
            raise ConfigError(
                f"accelerate is configured for {plugin}, and softtune train shards by itself",
                "set fsdp in the recipe, and start it by torchrun",
            )
    for recipe in recipes:
        for name, value in {
            "device": recipe.device if ":" in recipe.device else None,
            "device_map": recipe.device_map,
        }.items():
            if value is not None:
                raise ConfigError(
                    f"{name} is {value!r}, and {ranks.world_size()} processes each have a place of their own",
                    f"drop {name}",
                )
        if recipe.batch_size % ranks.world_size():
            raise ConfigError(
                f"batch_size is {recipe.batch_size}, which {ranks.world_size()} processes cannot share evenly",
                f"set a multiple of {ranks.world_size()}",
            )


def shared(recipe: Recipe) -> dict[str, Any]:
    """Settings that recipes which run at once must share, since they hold for all rows of a step."""
    names = ("model", "task", "num_labels", "bf16", "compile", "gradient_checkpointing", *LoadFields.model_fields)
    values = {name: getattr(recipe, name) for name in names} | {"task": recipe.task.value}
    return values | {"the use of a trunk cache": recipe.has_trunk_cache}


def _check_trackers(recipes: Sequence[Recipe]) -> None:
    trackers = {name for recipe in recipes for name in recipe.report_to}
    if missing := sorted(name for name in trackers if find_spec(name) is None):
        raise ConfigError(f"report_to needs the package {missing[0]}", f"pip install {missing[0]}")
    if "wandb" in trackers and sum(recipe.ensemble for recipe in recipes) > 1:
        raise ConfigError("wandb takes one run of a process", "report several to tensorboard")
