"""BEFT: the same as PEFT's, in every model that PEFT takes, and for the values of every other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    TOKEN_CLS,
    adapted,
    answers,
    assert_same_gradients,
    base_model,
    batch,
    labels_for,
    scramble,
    takes,
    texts,
)
from torch import Tensor

import softtune
from softtune import AdapterMismatchError, BeftConfig, ConfigError, PeftModel, UnsupportedModelError, get_peft_model
from softtune.backbone.roles import BiasSlot
from softtune.injection.modules import ModuleChanges

KNOWN = peft.utils.TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", CAUSAL_LM, {}),
    ("qwen2", SEQ_CLS, {}),
    ("bert", SEQ_CLS, {}),
    ("t5", SEQ_2_SEQ_LM, {}),
    ("deberta_v2", TOKEN_CLS, {}),
    ("llama", CAUSAL_LM, {"target_modules": ["q_proj", "layers.1.mlp.down_proj"]}),
    ("bert", SEQ_CLS, {"target_modules": r".*\.1\..*(key|intermediate\.dense)"}),
    ("bloom", CAUSAL_LM, {"target_modules": ["query_key_value"]}),
    ("opt", CAUSAL_LM, {"target_modules": "all-linear"}),
    ("llama", CAUSAL_LM, {"target_modules": ["v_proj", "o_proj"], "modules_to_save": ["o_proj"]}),
]
LATENT = ("deepseek_v3",)
"""Families whose values are computed from a latent, with the keys."""
pytestmark = pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning")


def inputs_for(family: str, task: str) -> dict[str, Tensor]:
    rows = texts(family, task)
    inputs = {**batch(rows), **answers(task, len(rows))}
    labels = labels_for(task, inputs)
    return {**inputs, "labels": labels.clamp(max=2) if task == TOKEN_CLS else labels}


def pair(family: str, task: str, fields: dict[str, Any]) -> tuple[PeftModel, Any]:
    """The same random adapter in softtune and in PEFT."""
    theirs = scramble(peft.get_peft_model(base_model(family, task), peft.BeftConfig(task_type=task, **fields))).eval()
    ours = get_peft_model(base_model(family, task), BeftConfig(task_type=task, **fields)).eval()
    softtune.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours, theirs


def real_logits(model: torch.nn.Module, task: str, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of tokens that are no padding."""
    logits: Tensor = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()] if task in (CAUSAL_LM, TOKEN_CLS) else logits


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a loss, under the names of PEFT's files."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model(**inputs).loss, [*trained.values()])
    with torch.no_grad():
        for parameter, gradient in zip(trained.values(), found, strict=True):
            parameter.copy_(gradient)
    library = softtune if issubclass(type(model), PeftModel) else peft
    return dict(library.get_peft_model_state_dict(model))


@pytest.mark.promise(6, methods=("beft",))
@pytest.mark.parametrize(("family", "task", "fields"), CASES)
def test_outputs_and_gradients_are_pefts(family: str, task: str, fields: dict[str, Any]) -> None:
    (ours, theirs), inputs = pair(family, task, fields), inputs_for(family, task)
    expected = real_logits(theirs, task, inputs)
    torch.testing.assert_close(real_logits(ours, task, inputs), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(real_logits(base_model(family, task), task, inputs), expected, atol=1e-3)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    assert_same_gradients(gradients(ours, inputs), gradients(theirs, inputs), 1e-5)


@pytest.mark.promise(4, methods=("beft",))
@pytest.mark.parametrize(("family", "task", "fields"), CASES)
def test_folders_of_pefts(family: str, task: str, fields: dict[str, Any], tmp_path: Path) -> None:
    _, theirs = pair(family, task, fields)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    inputs = inputs_for(family, task)
    expected = real_logits(theirs, task, inputs)
    ours = PeftModel.from_pretrained(base_model(family, task), tmp_path / "theirs")
    torch.testing.assert_close(real_logits(ours, task, inputs), expected, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    found, kept = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    torch.testing.assert_close(found, kept, atol=0, rtol=0)
    again = peft.PeftModel.from_pretrained(base_model(family, task), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(real_logits(again, task, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.promise(4, methods=("beft",))
@pytest.mark.parametrize("family", [f for f in FAMILIES if takes(f, "beft")])
def test_folders_go_to_peft_or_stop_it(family: str, tmp_path: Path) -> None:
    """A fused projection's other features have zeros there."""
    task = FAMILIES[family].tasks[0]
    task = TOKEN_CLS if task == SEQ_CLS and TOKEN_CLS in FAMILIES[family].tasks else task
    ours, inputs = adapted(family, task, "beft"), inputs_for(family, task)
    ours.save_pretrained(tmp_path)
    expected = real_logits(ours, task, inputs)
    again = PeftModel.from_pretrained(base_model(family, task), tmp_path)
    assert torch.equal(real_logits(again, task, inputs), expected)
    assert again.get_nb_trainable_parameters()[0] == 0
    assert again.peft_config["default"].fused_roles == (
        ["value"] if FAMILIES[family].fused or family in LATENT else None
    )
    if family == "gpt2":
        with pytest.raises(TypeError, match=r"only `torch\.nn\.Linear` is supported"):
            peft.PeftModel.from_pretrained(base_model(family, task), str(tmp_path))
        return
    theirs = peft.PeftModel.from_pretrained(base_model(family, task), str(tmp_path)).eval()
    torch.testing.assert_close(real_logits(theirs, task, inputs), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(real_logits(base_model(family, task), task, inputs), expected, atol=1e-3)


@pytest.mark.parametrize("family", [f for f in FAMILIES if takes(f, "beft")])
def test_values_are_pefts_default(family: str) -> None:
    """In the models of PEFT's table; elsewhere they are the features of each layer's value projection."""
    base = base_model(family, FAMILIES[family].tasks[0])
    config = get_peft_model(base, BeftConfig()).peft_config["default"]
    if base.config.model_type in KNOWN:
        assert config.target_modules == KNOWN[base.config.model_type]
        assert config.fused_roles is None


def test_values_of_a_fused_projection_alone_move() -> None:
    for family, fused in ((f, row.fused) for f, row in FAMILIES.items() if row.fused):
        model = adapted(family, FAMILIES[family].tasks[0], "beft")
        for slot, change in model.adapter("default").module.additions():
            projection = model.get_base_model().get_submodule(slot.module)
            width = slot.fused_width
            assert width is not None
            x = torch.randn(1, 2, FAMILIES[family].sizes.get("hidden_size", 36) if family != "mpt" else 32)
            plain = projection(x)
            expected = plain.clone()
            expected[..., fused(width)["value"]] += change
            with changed(model, slot, change):
                torch.testing.assert_close(projection(x), expected)


def changed(model: PeftModel, slot: BiasSlot, change: Tensor) -> Any:
    return ModuleChanges(model.backbone, [[(slot, change)]], [{}]).applied()


def test_a_start_that_is_not_zero() -> None:
    model = get_peft_model(base_model("llama", CAUSAL_LM), BeftConfig(init_weights=False))
    changes = torch.cat([p for p in model.parameters() if p.requires_grad])
    assert 0.5 < changes.std() < 1.5
    zero = get_peft_model(base_model("llama", CAUSAL_LM), BeftConfig())
    ids = texts("llama", CAUSAL_LM)[0][None]
    assert torch.equal(zero(ids).logits, base_model("llama", CAUSAL_LM)(ids).logits)


def test_a_config_is_left_as_it_was_and_the_adapters_says_what_was_found(tmp_path: Path) -> None:
    config = BeftConfig(task_type=CAUSAL_LM)
    model = get_peft_model(base_model("bloom", CAUSAL_LM), config)
    assert (config.target_modules, config.fused_roles) == (None, None)
    own = model.peft_config["default"]
    assert (own.target_modules, own.fused_roles) == (["query_key_value"], ["value"])
    assert isinstance(config, peft.BeftConfig)
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())) <= set(vars(peft.BeftConfig())) | {
        "peft_version"
    }


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"target_modules": ["nowhere"]},
            ConfigError,
            r"no module \['nowhere'\] that is not excluded or trained as a whole: see named_modules",
        ),
        ({"target_modules": "nowhere.*"}, ConfigError, r"no module 'nowhere\.\*'"),
        (
            {"target_modules": ["embed_tokens"]},
            UnsupportedModelError,
            "embed_tokens is not called, or returns no features",
        ),
        ({"fused_roles": ["output"]}, ConfigError, "fused_roles"),
    ],
)
def test_modules_that_cannot_be_changed(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_peft_model(base_model("llama", CAUSAL_LM), BeftConfig(**fields))


def test_weights_of_another_width_are_refused() -> None:
    for family in ("bloom", "llama"):
        model = adapted(family, CAUSAL_LM, "beft")
        state = {name: torch.cat([x, x], dim=1) for name, x in softtune.get_peft_model_state_dict(model).items()}
        with pytest.raises(AdapterMismatchError, match="the base model needs"):
            softtune.set_peft_model_state_dict(model, state)
