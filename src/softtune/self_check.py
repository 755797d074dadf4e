"""Checks the promises on a base model that softtune has not been tested with, before its first use.

What was tested is in ``tested.json``, which the run of the support matrix writes: classes of models by the version of
transformers. Every other pair is checked once for each dtype, attention function and kind of method, in a second or
so; what held is noted in the user's cache folder. Set ``SOFTTUNE_SELF_CHECK=0`` to go without.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from softtune import storage
from softtune.adapter import Adapter
from softtune.backbone import Backbone, turn
from softtune.backbone.interface import stock_name
from softtune.compat import INSTALLED, class_name, is_tested, tested
from softtune.errors import SofttuneError, UnsupportedModelError
from softtune.methods import BitFitConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from softtune.promises import (
    PROMISES,
    Adapted,
    Broken,
    NotAsked,
    Outcome,
    Probe,
    outcomes,
    own_random_numbers,
    state_of,
)
from softtune.wording import in_one_line

SWITCH = "SOFTTUNE_SELF_CHECK"
"""The environment variable that turns the check off, by 0."""
READ = ("input_ids", "attention_mask", "decoder_input_ids")
"""What a call is checked with."""
ALTERNATIVES: tuple[type[PeftConfig], ...] = (PrefixTuningConfig, PromptTuningConfig, BitFitConfig)
"""Methods to look at where another does not hold: one for each way into a model."""

Adapt = Callable[[Backbone, Adapter], Adapted]
"""Puts an adapter on a base model, which has no other then."""

_passed: set[str] = set()


def ensure(backbone: Backbone, config: PeftConfig, adapt: Adapt) -> None:
    """Check the promises on a base model for a method, unless that has been done.

    Raises:
        UnsupportedModelError: one of them does not hold; the message names it, the versions, and what does work.
    """
    model = backbone.model
    if os.environ.get(SWITCH) == "0" or backbone.device.type == "meta" or is_tested(model):
        return
    note = _note(model, config)
    if note.name in _passed or note.is_file():
        return
    found = check(backbone, config, adapt)
    broken = {name: how for name, how in found.items() if isinstance(how, Broken)}
    if broken:
        raise UnsupportedModelError(_refusal(backbone, config, adapt, *next(iter(broken.items()))))
    if all(isinstance(outcome, NotAsked) for outcome in found.values()):
        return  # another config of the kind may act on text
    _passed.add(note.name)
    with suppress(OSError):  # a folder that cannot be written: the next process checks again
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def check(
    backbone: Backbone,
    config: PeftConfig,
    adapt: Adapt,
    *,
    thorough: bool = False,
    columns: Sequence[int] | None = None,
) -> dict[str, Outcome]:
    """Check the promises on a base model with a random adapter of a method.

    Args:
        backbone: the base model.
        config: its method; the adapter that is checked has two virtual tokens.
        adapt: puts an adapter on the base model.
        thorough: check all promises, rather than the quick ones.
        columns: before which of the first three tokens its virtual tokens stand, as in a template; by default where
            the method has them.

    Raises:
        UnsupportedModelError: the base model cannot take the method, or does not run on token ids alone.
    """
    names = [name for name, promise in PROMISES.items() if thorough or promise.is_quick]
    if not _acts_on_text(backbone, config):
        return dict.fromkeys(names, NotAsked("what the method trains here reads no text"))
    backbone = _language_model(backbone)
    with turn(backbone.model), torch.inference_mode(False), own_random_numbers(backbone.model):
        before = state_of(backbone.model)
        adapter = Adapter.new(config.probing(), backbone)
        _disturb(adapter)
        try:
            probe = Probe(adapt(backbone, adapter), adapter, before, columns)
        except SofttuneError:
            raise
        except Exception as error:
            return dict.fromkeys(names, Broken(f"{type(error).__name__}: {in_one_line(error)}"))
        return outcomes(probe, names)


def _acts_on_text(backbone: Backbone, config: PeftConfig) -> bool:
    """Whether a method acts on text: the biases of a model may all be those of what sees pictures."""
    if config.is_prompt_learning:
        return True
    reading = {module for stack in backbone.stacks for module in stack.module.modules()}
    slots = [slot for slot, _ in config.build(backbone).prompt().additions]  # type: ignore[operator]
    return any(backbone.model.get_submodule(slot.module) in reading for slot in slots)


def _language_model(backbone: Backbone) -> Backbone:
    """A base model, or the language model within it where its calls need pictures or sounds too."""
    parameters = inspect.signature(backbone.model.forward).parameters.values()
    if all(p.default is not p.empty or p.kind is p.VAR_KEYWORD or p.name in READ for p in parameters):
        return backbone
    stacks = {stack.module for stack in backbone.stacks}
    within = [m for m in backbone.model.modules() if isinstance(m, PreTrainedModel) and m is not backbone.model]
    writing = [m for m in within if stacks <= {*m.modules()} and m.get_output_embeddings() is not None]
    return Backbone(writing[0]) if writing else backbone


def _disturb(adapter: Adapter) -> None:
    """Give what is zero at a method's start random numbers, so that it acts."""
    for parameter in adapter.module.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.1)


def _refusal(backbone: Backbone, config: PeftConfig, adapt: Adapt, name: str, outcome: Broken) -> str:
    """One line: the promise, the versions, and what does work."""
    own = type(backbone.model)
    working = [
        other.__name__ for other in ALTERNATIVES if type(config) is not other and _holds(backbone, other, config, adapt)
    ]
    versions = [number for number, classes in tested().items() if class_name(own, backbone.model.config) in classes]
    remedies = [
        *([f"use {' or '.join(working)}, for which all hold here"] if working else []),
        *([f"install transformers {versions[-1]}, with which it is tested"] if versions else []),
        f"set {SWITCH}=0 to go on at your own risk",
    ]
    return (
        f"{own.__name__} with transformers {INSTALLED} breaks a promise for {type(config).__name__}, "
        f"{PROMISES[name].text} ({outcome.how}): {', or '.join(remedies)}"
    )


def _holds(backbone: Backbone, other: type[PeftConfig], config: PeftConfig, adapt: Adapt) -> bool:
    options: dict[str, Any] = {"add_missing": True} if other is BitFitConfig else {}
    try:
        found = check(backbone, other(task_type=config.task_type, **options), adapt)
    except SofttuneError:
        return False
    return not any(isinstance(outcome, Broken) for outcome in found.values())


def notes_folder() -> Path:
    """Where it is noted what held."""
    return storage.cache_folder() / "self_check"


def _note(model: PreTrainedModel, config: PeftConfig) -> Path:
    """The file that tells, by its name, what held."""
    own, attention = version("softtune"), stock_name(model.config)
    parts = (class_name(type(model), model.config), INSTALLED, own, model.dtype, attention, config.kind)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(map(str, parts)))
    return notes_folder() / f"{name}{_source(type(model))}.json"


def _source(own: type) -> str:
    """What tells two versions of a file apart that no release of transformers has."""
    if own.__module__.startswith("transformers.") and not INSTALLED.is_devrelease:
        return ""
    try:
        source = inspect.getsource(sys.modules[own.__module__])
        return "-" + hashlib.sha256(source.encode()).hexdigest()[:12]
    except (OSError, TypeError):
        return ""
