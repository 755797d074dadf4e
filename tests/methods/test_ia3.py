"""IA3: the same as PEFT's, in every model that PEFT takes, and beside other methods in one batch."""

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
    METHODS,
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
from softtune import AdapterMismatchError, ConfigError, IA3Config, PeftModel, UnsupportedModelError, get_peft_model
from softtune.compat import disable_checkpointing, enable_checkpointing
from softtune.injection.modules import ModuleChanges
from softtune.serving.prompt_export import export_prompt, load_prompt, save_prompt

PROJECTIONS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", CAUSAL_LM, {}),
    ("qwen2", SEQ_CLS, PROJECTIONS),
    ("bert", SEQ_CLS, {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}),
    ("deberta_v2", TOKEN_CLS, {"target_modules": ["key_proj", "value_proj"], "feedforward_modules": []}),
    ("t5", SEQ_2_SEQ_LM, {}),
    ("bart", SEQ_2_SEQ_LM, {"target_modules": ["q_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}),
    (
        "gpt2",
        CAUSAL_LM,
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
    ),
    (
        "bloom",
        SEQ_CLS,
        {"target_modules": ["query_key_value", "dense_4h_to_h"], "feedforward_modules": r".*dense_4h_to_h"},
    ),
    ("opt", CAUSAL_LM, {"target_modules": "all-linear", "feedforward_modules": "none"}),
    ("llama", CAUSAL_LM, {"target_modules": r".*(v_proj|up_proj)", "feedforward_modules": r".*\.1\.mlp\.up_proj"}),
    ("llama", CAUSAL_LM, PROJECTIONS | {"exclude_modules": r".*layers\.0.*"}),
    ("llama", CAUSAL_LM, PROJECTIONS | {"exclude_modules": ["0.mlp.down_proj"], "modules_to_save": ["q_proj"]}),
]
AS_IN_PEFT = [("llama", CAUSAL_LM), ("t5", SEQ_2_SEQ_LM), ("mistral", CAUSAL_LM)]
"""Families for which PEFT's default modules are keys, values and feed-forward layers."""


def inputs_for(family: str, task: str) -> dict[str, Tensor]:
    rows = texts(family, task)
    inputs = {**batch(rows), **answers(task, len(rows))}
    labels = labels_for(task, inputs)
    return {**inputs, "labels": labels.clamp(max=2) if task == TOKEN_CLS else labels}


def pair(family: str, task: str, fields: dict[str, Any]) -> tuple[PeftModel, Any]:
    """The same random adapter in softtune and in PEFT."""
    theirs = scramble(peft.get_peft_model(base_model(family, task), peft.IA3Config(task_type=task, **fields))).eval()
    ours = get_peft_model(base_model(family, task), IA3Config(task_type=task, **fields)).eval()
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


@pytest.mark.promise(6, methods=("ia3",))
@pytest.mark.parametrize(("family", "task", "fields"), CASES)
def test_outputs_and_gradients_are_pefts(family: str, task: str, fields: dict[str, Any]) -> None:
    (ours, theirs), inputs = pair(family, task, fields), inputs_for(family, task)
    expected = real_logits(theirs, task, inputs)
    torch.testing.assert_close(real_logits(ours, task, inputs), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(real_logits(base_model(family, task), task, inputs), expected, atol=1e-3)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    assert_same_gradients(gradients(ours, inputs), gradients(theirs, inputs), 1e-5)


@pytest.mark.promise(4, methods=("ia3",))
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


@pytest.mark.promise(4, methods=("ia3",))
@pytest.mark.parametrize("family", [f for f in FAMILIES if takes(f, "ia3")])
def test_folders_go_to_peft(family: str, tmp_path: Path) -> None:
    """A fused projection's queries have ones there."""
    tasks = FAMILIES[family].tasks
    task = TOKEN_CLS if TOKEN_CLS in tasks else tasks[0]
    ours, inputs = adapted(family, task, "ia3"), inputs_for(family, task)
    ours.save_pretrained(tmp_path)
    expected = real_logits(ours, task, inputs)
    again = PeftModel.from_pretrained(base_model(family, task), tmp_path, is_trainable=True).eval()
    assert torch.equal(real_logits(again, task, inputs), expected)
    assert again.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()
    theirs = peft.PeftModel.from_pretrained(base_model(family, task), str(tmp_path)).eval()
    torch.testing.assert_close(real_logits(theirs, task, inputs), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(real_logits(base_model(family, task), task, inputs), expected, atol=1e-3)


@pytest.mark.parametrize(("family", "task"), AS_IN_PEFT)
def test_default_modules_are_pefts_where_its_table_has_the_papers(family: str, task: str) -> None:
    ours, theirs = pair(family, task, {})
    config, known = ours.peft_config["default"], theirs.peft_config["default"]
    assert (set(config.target_modules), set(config.feedforward_modules)) == (
        known.target_modules,
        known.feedforward_modules,
    )


def test_a_start_at_one_is_the_base_model() -> None:
    ids = texts("gpt2", CAUSAL_LM)[0][None]
    ones = get_peft_model(base_model("gpt2", CAUSAL_LM), IA3Config())
    assert torch.equal(ones(ids).logits, base_model("gpt2", CAUSAL_LM)(ids).logits)
    assert ones.peft_config["default"].fan_in_fan_out
    drawn = get_peft_model(base_model("gpt2", CAUSAL_LM), IA3Config(init_ia3_weights=False))
    assert 0.5 < torch.cat([p for p in drawn.parameters() if p.requires_grad]).std() < 1.5


# Beside other methods


def mixed(family: str, task: str, methods: tuple[str, ...]) -> tuple[PeftModel, list[str]]:
    """A model with an adapter of each method, and the names of a batch's rows."""
    model = PeftModel(base_model(family, task))
    for number, method in enumerate(methods):
        model.add_adapter(method, METHODS[method](task_type=task))
        model.set_adapter(method)
        scramble(model, seed=number)
    model.set_requires_grad(methods)
    return model.eval(), [*methods, "__base__", methods[0]]


@pytest.mark.parametrize(
    ("family", "task"), [("llama", CAUSAL_LM), ("bloom", CAUSAL_LM), ("t5", SEQ_2_SEQ_LM), ("bert", SEQ_CLS)]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_other_methods(family: str, task: str, side: str) -> None:
    """Outputs and gradients are those of each row alone."""
    if side == "left" and task == SEQ_2_SEQ_LM:
        side = "right"
    model, names = mixed(family, task, ("ia3", "beft", "bitfit_added", "prefix"))
    rows = texts(family, task, (7, 4, 2, 5, 3, 6))
    inputs, replies = batch(rows, side), answers(task, len(rows))
    found = model(**inputs, **replies, adapter_names=names).logits
    total = torch.zeros(())
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        reply = {key: x[number : number + 1] for key, x in replies.items()}
        alone = model(row[None], **reply, adapter_names=[name]).logits[0]
        real = inputs["attention_mask"][number].bool()
        mine = found[number][real] if task == CAUSAL_LM else found[number]
        torch.testing.assert_close(mine, alone, atol=1e-5, rtol=1e-5)
        total = total + alone.square().mean()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "heads" not in n}
    expected = torch.autograd.grad(total, [*trained.values()], allow_unused=True)
    output = model(**inputs, **replies, adapter_names=names).logits
    real = inputs["attention_mask"].bool()
    parts = [o[r] if task == CAUSAL_LM else o for o, r in zip(output, real, strict=True)]
    own = torch.autograd.grad(sum(p.square().mean() for p in parts), [*trained.values()], allow_unused=True)
    both = [{n: g for n, g in zip(trained, each, strict=True) if g is not None} for each in (own, expected)]
    assert_same_gradients({n: both[0][n] for n in both[1]}, both[1], 1e-5)


def test_generation_of_rows_of_other_methods() -> None:
    model, names = mixed("llama", CAUSAL_LM, ("ia3", "beft", "bitfit_added", "prefix"))
    rows = texts("llama", CAUSAL_LM, (7, 4, 2, 5, 3, 6))
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    found = model.generate(**batch(rows, "left"), **settings, adapter_names=names)[:, -4:]
    for row, name, tokens in zip(rows, names, found, strict=True):
        assert torch.equal(model.generate(row[None], **settings, adapter_names=[name])[0, -4:], tokens)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_that_run_again_are_scaled_again(family: str, use_reentrant: bool) -> None:
    model, names = mixed(family, CAUSAL_LM, ("ia3", "bitfit_added", "prefix"))
    inputs = batch(texts(family, CAUSAL_LM, (7, 4, 6, 5, 3)))
    trained = {n: p for n, p in model.train().named_parameters() if p.requires_grad}

    def found() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels_for(CAUSAL_LM, inputs), adapter_names=names).loss.backward()
        return {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}

    expected = found()
    enable_checkpointing(model.get_base_model(), use_reentrant=use_reentrant)
    assert_same_gradients(found(), expected, 1e-5)
    disable_checkpointing(model.get_base_model())


def changes(model: PeftModel, biases: Any = (), scalings: Any = ()) -> ModuleChanges:
    return ModuleChanges(model.backbone, biases, [], scalings=scalings)


def test_scaling_comes_before_a_bias() -> None:
    """The order at one module: its own output is scaled, then the bias is added."""
    base = base_model("llama", CAUSAL_LM)
    model = get_peft_model(base, IA3Config())
    (slot, _), *_ = model.adapter("default").module.scalings()
    part = base.get_submodule(slot.module)
    x, factor, bias = torch.randn(2, 3, 48), torch.randn(slot.width), torch.randn(slot.width)
    plain = part(x)
    with changes(model, [[(slot, bias)]], [[(slot, factor)]]).applied():
        torch.testing.assert_close(part(x), plain * factor + bias)


def test_rows_of_modules_that_do_not_compute_row_by_row_are_refused() -> None:
    model = get_peft_model(base_model("deberta_v2", SEQ_CLS), IA3Config(task_type=SEQ_CLS)).eval()
    inputs = batch(texts("deberta_v2", SEQ_CLS))
    with pytest.raises(UnsupportedModelError, match="key_proj does not compute row by row"):
        model(**inputs, adapter_names=["default", "__base__", "default"])
    assert model(**inputs).logits.shape == (3, 3)


@pytest.mark.parametrize("is_input", [True, False])
def test_half_precision_keeps_factors_in_single(is_input: bool) -> None:
    model = adapted("llama", CAUSAL_LM, "ia3")
    model.get_base_model().bfloat16()
    scalings = model.adapter("default").module.scalings()
    slot, factor = next(pair for pair in scalings if pair[0].is_input is is_input)
    part: Any = model.get_base_model().get_submodule(slot.module)
    x = torch.randn(2, 3, part.in_features, dtype=torch.bfloat16)
    expected = part((x.float() * factor).bfloat16()) if is_input else (part(x).float() * factor).bfloat16()
    with changes(model, scalings=[[(slot, factor)]]).applied():
        assert torch.equal(part(x), expected)
        assert torch.equal(part(input=x), expected)
    assert factor.dtype == torch.float32
    assert model(texts("llama", CAUSAL_LM)[0][None]).logits.dtype == torch.bfloat16


# Config and files


def test_a_config_is_left_as_it_was_and_the_adapters_says_what_was_found(tmp_path: Path) -> None:
    config = IA3Config(task_type=CAUSAL_LM)
    model = get_peft_model(base_model("bloom", CAUSAL_LM), config)
    assert (config.target_modules, config.feedforward_modules, config.fused_roles) == (None, None, None)
    own = model.peft_config["default"]
    assert (own.target_modules, own.feedforward_modules) == (["dense_4h_to_h", "query_key_value"], ["dense_4h_to_h"])
    assert own.fused_roles == ["key", "value"]
    assert isinstance(config, peft.IA3Config)
    assert model.get_nb_trainable_parameters()[0] == 2 * (2 * 32 + 4 * 32)
    model.save_pretrained(tmp_path)
    assert "Method: IA3, 384 trained values" in (tmp_path / "README.md").read_text()
    known = set(vars(peft.IA3Config())) | {"peft_version"}
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())) <= known


def test_all_linear_layers_are_named_in_any_case() -> None:
    found = []
    for targets in ("all-linear", "ALL-LINEAR"):
        config = IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
        own = get_peft_model(base_model("llama", CAUSAL_LM), config).peft_config["default"]
        found.append((own.target_modules, own.feedforward_modules))
    assert found[0] == found[1]
    assert "down_proj" in found[0][0]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["nowhere"]}, ConfigError, "no module"),
        ({"target_modules": ["embed_tokens"]}, UnsupportedModelError, "not called, or returns no features"),
        ({"target_modules": ["v_proj"], "feedforward_modules": ["fc"]}, ConfigError, "should be a subset"),
        (
            {"exclude_modules": r".*"},
            ConfigError,
            "no module for keys, values and feed-forward layers that is not excluded",
        ),
    ],
)
def test_modules_that_cannot_be_scaled(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_peft_model(base_model("llama", CAUSAL_LM), IA3Config(**fields))


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_weights_of_another_width_are_refused(family: str) -> None:
    model = adapted(family, CAUSAL_LM, "ia3")
    state = {name: torch.cat([x, x]) for name, x in softtune.get_peft_model_state_dict(model).items()}
    with pytest.raises(AdapterMismatchError, match="the base model needs"):
        softtune.set_peft_model_state_dict(model, state)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("method", ["ia3", "beft"])
def test_the_form_for_serving(family: str, method: str, tmp_path: Path) -> None:
    model = adapted(family, CAUSAL_LM, method)
    prompt = export_prompt(model.backbone, model.adapter("default"))
    save_prompt(prompt, model.backbone, tmp_path)
    loaded = load_prompt(tmp_path, model.backbone)
    for found, expected in ((loaded.additions, prompt.additions), (loaded.scalings, prompt.scalings)):
        found, expected = (sorted(each, key=lambda pair: pair[0].name) for each in (found, expected))
        assert [(s.name, s.is_input, s.width) for s, _ in found] == [(s.name, s.is_input, s.width) for s, _ in expected]
        for (own, tensor), (slot, other) in zip(found, expected, strict=True):
            assert torch.equal(tensor, other)
            assert (own.index is None) == (slot.index is None)
            assert own.index is None or torch.equal(own.index, slot.index)
