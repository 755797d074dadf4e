"""Checks the promises on a base model that softtune has not been tested with, before its first use.

``tested.json``, which the support matrix writes, lists the tested model classes by version of transformers. Every other
pair is checked once for each dtype, attention function and kind of method, in a second or so. Passed checks are
recorded in the user's cache folder. Set ``SOFTTUNE_SELF_CHECK=0`` to skip the check.

Internal.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from softtune import storage
from softtune.adapter import Adapter
from softtune.backbone import Backbone, model_session
from softtune.backbone.interface import stock_name
from softtune.compat import INSTALLED, class_name, is_tested, tested
from softtune.errors import SofttuneError, UnsupportedModelError
from softtune.formatting import in_one_line
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

SWITCH = "SOFTTUNE_SELF_CHECK"
"""The environment variable that turns the check off if it is 0."""
READ = ("input_ids", "attention_mask", "decoder_input_ids")
"""Arguments that the checked calls pass."""
ALTERNATIVES: tuple[type[PeftConfig], ...] = (PrefixTuningConfig, PromptTuningConfig, BitFitConfig)
"""Methods to try where another fails: one for each kind of injection."""

Adapt = Callable[[Backbone, Adapter], Adapted]
"""Returns a base model with an adapter as its only one."""

_passed: set[str] = set()


def ensure(backbone: Backbone, config: PeftConfig, adapt: Adapt) -> None:
    """Check the promises for a base model and a method, unless they have been checked before.

    Raises:
        UnsupportedModelError: a promise does not hold; the message names it, the versions, and what does work.
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
        return  # another config of this kind may affect text
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
    """Check the promises for a base model with a random adapter of a method.

    Args:
        backbone: the base model.
        config: the method; the adapter that is checked has two virtual tokens.
        adapt: puts an adapter on the base model.
        thorough: check all promises, rather than the quick ones.
        columns: before which of the first three tokens the virtual tokens stand, as in a template; by default where
            the method puts them.

    Raises:
        UnsupportedModelError: the base model cannot take the method, or does not run on token ids alone.
    """
    names = [name for name, promise in PROMISES.items() if thorough or promise.is_quick]
    if not _acts_on_text(backbone, config):
        return dict.fromkeys(names, NotAsked("what the method trains here reads no text"))
    backbone = _language_model(backbone)
    with model_session(backbone.model), torch.inference_mode(False), own_random_numbers(backbone.model):
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
    """Whether a method affects text: all modules that it changes may be in a vision encoder."""
    if config.is_prompt_learning:
        return True
    reading = {module for stack in backbone.stacks for module in stack.module.modules()}
    prompt = copy.deepcopy(config).build(backbone).prompt()  # type: ignore[operator]
    slots = [slot for slot, _ in (*prompt.additions, *prompt.scalings)]
    return bool(prompt.terms) or any(backbone.model.get_submodule(slot.module) in reading for slot in slots)


def _language_model(backbone: Backbone) -> Backbone:
    """The base model, or the language model within it where its calls also require images or audio."""
    parameters = inspect.signature(backbone.model.forward).parameters.values()
    if all(p.default is not p.empty or p.kind is p.VAR_KEYWORD or p.name in READ for p in parameters):
        return backbone
    stacks = {stack.module for stack in backbone.stacks}
    within = [m for m in backbone.model.modules() if isinstance(m, PreTrainedModel) and m is not backbone.model]
    writing = [m for m in within if stacks <= {*m.modules()} and m.get_output_embeddings() is not None]
    return Backbone.shared(writing[0]) if writing else backbone


def _disturb(adapter: Adapter) -> None:
    """Move parameters that start at zero or one to random values, so that the adapter has an effect."""
    for parameter in adapter.module.parameters():
        for start in (0.0, 1.0):
            if bool((parameter == start).all()):
                torch.nn.init.normal_(parameter, mean=start, std=0.1)


def _refusal(backbone: Backbone, config: PeftConfig, adapt: Adapt, name: str, outcome: Broken) -> str:
    """The error message, one line: the promise, the versions, and what does work."""
    model_class = type(backbone.model)
    working = [
        other.__name__ for other in ALTERNATIVES if type(config) is not other and _holds(backbone, other, config, adapt)
    ]
    versions = [
        number for number, classes in tested().items() if class_name(model_class, backbone.model.config) in classes
    ]
    remedies = [
        *([f"use {' or '.join(working)}, for which all hold here"] if working else []),
        *([f"install transformers {versions[-1]}, with which it is tested"] if versions else []),
        f"set {SWITCH}=0 to go on at your own risk",
    ]
    return (
        f"{model_class.__name__} with transformers {INSTALLED} breaks a promise for {type(config).__name__}, "
        f"{PROMISES[name].text} ({outcome.how}): {', or '.join(remedies)}"
    )


def _holds(backbone: Backbone, other: type[PeftConfig], config: PeftConfig, adapt: Adapt) -> bool:
    try:
        found = check(backbone, other(task_type=config.task_type, **other.general_options), adapt)
    except SofttuneError:
        return False
    return not any(isinstance(outcome, Broken) for outcome in found.values())


def notes_folder() -> Path:
    """The folder of the records of passed checks."""
    return storage.cache_folder() / "self_check"


def _note(model: PreTrainedModel, config: PeftConfig) -> Path:
    """The file whose existence records a passed check."""
    own_version, attention = version("softtune"), stock_name(model.config)
    parts = (class_name(type(model), model.config), INSTALLED, own_version, model.dtype, attention, config.kind)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(map(str, parts)))
    return notes_folder() / f"{name}{_source(type(model))}.json"


def _source(model_class: type) -> str:
    """A hash of a model's file that tells its versions apart; empty for a file of a transformers release."""
    if model_class.__module__.startswith("transformers.") and not INSTALLED.is_devrelease:
        return ""
    try:
        source = inspect.getsource(sys.modules[model_class.__module__])
        return "-" + hashlib.sha256(source.encode()).hexdigest()[:12]
    except (OSError, TypeError):
        return ""
