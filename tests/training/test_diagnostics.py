"""Profiles measure the steps that a recipe trains, and range tests find where the loss turns; both leave nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_run import no_dropout
from torch.profiler import profile as Profiler
from transformers.models.llama.modeling_llama import LlamaMLP

from softtune import ConfigError, TrainingError
from softtune.injection.frozen_layer_cache import FrozenLayerCache
from softtune.pretrained import load_base_model
from softtune.training.diagnostics import find_learning_rate, profile_recipe
from softtune.training.learning_rate import RangeTest
from softtune.training.profile import ROUNDS, WARM_UP, ProductRecorder, _shares, _Timer
from softtune.training.recipe import Recipe

STEPS = WARM_UP + ROUNDS + 1 + ROUNDS
"""Warm-up, timed, recorded, profiled."""


def test_a_profile_leaves_nothing(fields: dict[str, Any]) -> None:
    recipe = Recipe.from_fields(fields)
    found = profile_recipe(recipe)
    assert not Path(recipe.output).exists()
    assert found.tokens <= 4 * 24
    assert {"matrix products", "attention", "between operations"} <= found.shares.keys()
    assert 0 < found.products < found.seconds
    assert 0 < found.weights < found.seconds
    with pytest.raises(ConfigError, match="one adapter's steps are measured: set ensemble to 1"):
        profile_recipe(Recipe.from_fields({**fields, "ensemble": 2}))


def test_a_profiled_step_has_all_of_its_batches(fields: dict[str, Any]) -> None:
    two = {"batch_size": 2, "gradient_accumulation_steps": 2, "patience": 1, "eval_steps": 1, "push_to_hub": True}
    found = [profile_recipe(Recipe.from_fields({**fields, **own})) for own in ({}, two)]
    assert found[0].tokens == found[1].tokens  # of the same four rows


def test_the_range_test_takes_the_trainers_other_fields(fields: dict[str, Any]) -> None:
    own = {"gradient_accumulation_steps": 2, "max_steps": 3, "optim": "adafactor", "label_smoothing_factor": 0.1}
    own |= {"eval_steps": 1, "metric_for_best_model": "accuracy", "group_by_length": True}
    found = find_learning_rate(Recipe.from_fields({**fields, **own}))
    assert found.rates[:2] == pytest.approx([0, 1e-4])
    assert len(found.losses) > 3
    assert not Path(fields["output"]).exists()


def test_matrix_products_have_the_share_that_they_take() -> None:
    """Products of 512 · 512 numbers with as many: a thousand operations for each number that is copied."""
    x, timer, profiler = torch.ones(512, 512), _Timer(torch.device("cpu")), Profiler()
    for context in (timer, profiler):
        with context:
            for _ in range(10):
                (x @ x).clone()
    shares = _shares([profiler], timer.seconds[0], on_device=False)
    assert shares["matrix products"] > 0.5
    assert 0 < shares["copies"] < 0.5 * shares["matrix products"]


def test_a_profiled_step_runs_layers_again_where_the_recipe_does(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    forward = LlamaMLP.forward  # a part of each layer, since a layer's own forward is what starts a checkpoint
    monkeypatch.setattr(LlamaMLP, "forward", lambda *args, **k: calls.append(True) or forward(*args, **k))
    counts = []
    for again in (False, True):
        profile_recipe(Recipe.from_fields({**fields, "gradient_checkpointing": again}))
        counts.append(len(calls))
        calls.clear()
    assert counts[1] - counts[0] == 2 * STEPS  # layers, steps


def test_a_profiled_step_begins_above_the_trunk(
    fields: dict[str, Any], tmp_path: Path, trunks: list[FrozenLayerCache]
) -> None:
    changes = {"model": no_dropout(fields["model"], tmp_path), "trunk_cache": 1}
    profile_recipe(Recipe.from_fields({**fields, **changes, "options": {"num_virtual_tokens": 3, "layers": "last:1"}}))
    assert (trunks[-1].misses, trunks[-1].hits) == (4, 4 * (STEPS - 1))


def test_the_profiler_finds_every_product() -> None:
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(4, 5, requires_grad=True)
    with (recorder := ProductRecorder()):
        (a @ b).sum().backward()
    with (again := ProductRecorder()):
        recorder.replay()
    assert len(recorder._products) == len(again._products) == 3  # one forward, one for each gradient


def test_the_range_test_finds_where_the_loss_turns(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softtune.training.learning_rate.HIGHEST", 1e2)  # a tiny model takes much
    found = find_learning_rate(Recipe.from_fields(fields))
    assert not Path(fields["output"]).exists()
    assert found.rates[:2] == pytest.approx([0, 1e-4])
    steps = [later / rate for rate, later in zip(found.rates[1:], found.rates[2:], strict=False)]
    assert steps == pytest.approx([1e6 ** (1 / 39)] * len(steps))
    turn = found.rates.index(found.lowest)
    assert 0 < turn < len(found.losses) - 1
    assert found.losses[turn] < found.losses[0]
    assert found.losses[turn] < found.losses[-1]
    assert found.suggestion == pytest.approx(found.lowest / 10)
    assert found.end in (None, "the loss was more than 2 times its lowest")


def test_the_range_test_tells_the_rate_of_a_run(fields: dict[str, Any]) -> None:
    """Not that of the optimiser's first group, which is another part's where the first part has nothing to train."""
    frozen = {"peft_type": "CARTRIDGE", "num_virtual_tokens": 2, "num_frozen_tokens": 2}
    parts = [frozen, {"peft_type": "IA3"}]
    found = find_learning_rate(Recipe.from_fields({**fields, "method": "COMBINED", "options": {"parts": parts}}))
    assert found.rates[:2] == pytest.approx([0, 1e-4])


def test_a_range_test_that_leaves_the_numbers_ends(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softtune.training.learning_rate.HIGHEST", 1e38)
    monkeypatch.setattr("softtune.training.learning_rate.RISEN", float("inf"))
    found = find_learning_rate(Recipe.from_fields({**fields, "method": "BITFIT", "options": {"add_missing": True}}))
    assert len(found.rates) < 40
    assert found.end == "at the next rate the loss was no number"


def test_a_range_test_without_any_number_says_so(fields: dict[str, Any], tmp_path: Path) -> None:
    base, tokenizer = load_base_model(fields["model"])
    base.lm_head.weight.data.fill_(float("nan"))
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "broken")
    with pytest.raises(TrainingError, match="the loss is no number before anything is trained: check the base model"):
        find_learning_rate(Recipe.from_fields({**fields, "model": str(tmp_path / "broken")}))


def test_the_suggestion_is_an_order_of_magnitude_below_the_lowest_loss() -> None:
    found = RangeTest(rates=[1e-3, 1e-2, 1e-1, 1.0], losses=[3.0, 1.0, 0.5, 1.1])
    assert found.suggestion == pytest.approx(1e-2)
    assert found.end == "the loss was more than 2 times its lowest"
    assert RangeTest(rates=[1e-3, 1e-2], losses=[3.0, 2.9]).suggestion is None
