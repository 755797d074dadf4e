"""Baselines train what they say, and change nothing at their start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from softtune import ConfigError, PeftModel, UnsupportedModelError
from softtune.experiments.baselines import BASELINES, BOTTLENECK, RANK
from softtune.experiments.cases import ENTRIES, Case
from softtune.experiments.isolated_run import run_isolated
from tests.tiny import recipe_fields, save_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def prepared(name: str, base: PreTrainedModel) -> PeftModel:
    model = PeftModel(copy.deepcopy(base)).eval()
    BASELINES[name].prepare(model.base_model)
    return model


def trained(model: PeftModel) -> set[str]:
    return {n.removeprefix("base_model.") for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "head"])
def test_a_baseline_begins_as_the_base_model_and_learns(name: str, folders: dict[str, str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
    model, ids = prepared(name, base), torch.tensor([[3, 4, 5, 6]])
    with model.disable_adapter():
        output = model(input_ids=ids, labels=ids)
        torch.testing.assert_close(output.logits, base(input_ids=ids).logits)
        output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_what_is_trained(folders: dict[str, str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert len(trained(prepared("full", base))) == len([*base.parameters()])
    assert all("layers." in name for name in trained(prepared("last-layers", base)))
    assert all("lora_" in name for name in trained(prepared("lora", base)))
    bottlenecks = {name for name in trained(prepared("bottleneck", base)) if "bottleneck" in name}
    assert len(bottlenecks) == 2 * 2 * 4  # two places in two layers: two weights and two biases each
    width = base.config.hidden_size
    module = prepared("bottleneck", base).base_model.model.layers[0].mlp.down_proj.bottleneck
    assert sum(p.numel() for p in module.parameters()) == 2 * width * BOTTLENECK + width + BOTTLENECK


@pytest.mark.parametrize("name", BASELINES)
def test_heads_are_trained(name: str, folders: dict[str, str]) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    assert any("classifier" in parameter for parameter in trained(prepared(name, base)))


def test_a_head_needs_a_model_that_has_one(folders: dict[str, str]) -> None:
    bert = AutoModelForSequenceClassification.from_pretrained(folders["bert"])
    assert trained(prepared("head", bert)) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(UnsupportedModelError, match="has no head to train"):
        prepared("head", AutoModelForCausalLM.from_pretrained(folders["llama"]))


def test_entries_have_names_of_their_own() -> None:
    assert len({*ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"targets": ["q_proj", "v_proj"]}, {"rank": 3, "targets": ".*k_proj"}]
)
def test_lora_has_the_rank_and_the_targets_that_it_is_given(options: dict[str, Any], folders: dict[str, str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    own, theirs = copy.deepcopy(base), copy.deepcopy(base)
    BASELINES["lora"].prepare(own.requires_grad_(False), **options)
    config = peft.LoraConfig(r=options.get("rank", 8), target_modules=options.get("targets", "all-linear"))
    reference = peft.get_peft_model(theirs, config)
    sizes = [
        {name.removeprefix("base_model.model."): p.shape for name, p in model.named_parameters() if p.requires_grad}
        for model in (own, reference)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "the baseline lora has rank 0: name a whole number of 1 or more"),
        ({"rank": "eight"}, "has rank 'eight'"),
        ({"targets": ["nothing"]}, "with targets .'nothing'. does not fit LlamaForCausalLM: name other modules"),
    ],
)
def test_options_of_lora_that_do_not_fit_are_one_line(
    options: dict[str, Any], message: str, folders: dict[str, str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    with pytest.raises(ConfigError, match=message):
        BASELINES["lora"].prepare(base, **options)


def test_a_case_hands_a_baseline_its_options(folders: dict[str, str], tmp_path: Path) -> None:
    fields = recipe_fields(folders["llama"], tmp_path)
    whole = Case.from_fields(fields, "lora", {}, name="whole", number=0, seeds=1)
    small = Case.from_fields(fields, "lora", {"options.rank": 1}, name="small", number=0, seeds=1)
    assert "baseline_options" not in whole.configuration
    assert small.configuration["baseline_options"] == {"rank": 1}
    assert small.recipe.options == whole.recipe.options
    trained = [run_isolated(case, case.runs[0], lambda *_: None).trained for case in (whole, small)]
    assert trained[0] == RANK * trained[1]
    with pytest.raises(ConfigError, match="rank"):  # an option of prefix tuning is what it is not
        Case.from_fields(fields, "prefix-tuning", {"options.rank": 1}, name="prefix", number=0, seeds=1)
