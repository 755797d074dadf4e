"""CPT: parity with PEFT where PEFT is right, and with a slow reference where it is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.families import (
    CAUSAL_LM,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    VOCABULARY,
    adapted,
    base_model,
    batch,
    labels_for,
    pad,
    texts,
    trained,
)
from torch import Tensor
from torch.nn import functional as F

from softtune import (
    AdapterError,
    ConfigError,
    CPTConfig,
    DataError,
    PeftModel,
    UnsupportedModelError,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from softtune.compat import disable_checkpointing, enable_checkpointing
from softtune.experiments.cases import DEFAULT_ENTRIES, ENTRIES
from softtune.training.compatibility import check_compatible
from softtune.training.recipe import Recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:.past.key.values. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
TWO_EXAMPLES = {
    "cpt_token_ids": [30, 41, 42, 7, 50, 31, 43, 8, 51],
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 5, 6, 7, 8],
}
"""Their types end with a label's, so that PEFT's shift of the input's types is right too."""
LABEL_FIRST = {"cpt_token_ids": [30, 41, 42, 7], "cpt_tokens_type_mask": [4, 2, 0, 8]}
WIDE = {"opt_projection_epsilon": 6.0, "opt_projection_format_epsilon": 4.0}
DECAY = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.6}


def configs(**fields: Any) -> dict[str, Any]:
    return {"task_type": CAUSAL_LM, **TWO_EXAMPLES, **fields}


def pair(family: str, size: float = 1.0, **fields: Any) -> tuple[PeftModel, peft.PeftModel]:
    """softtune's model and PEFT's with the same changes, before they are projected."""
    ours = get_peft_model(base_model(family, CAUSAL_LM), CPTConfig(**configs(**fields))).train()
    theirs = peft.get_peft_model(base_model(family, CAUSAL_LM), peft.CPTConfig(**configs(**fields))).train()
    delta = ours.prompt_encoder["default"].delta_embedding.weight
    changes = size * torch.randn(delta.shape, generator=torch.Generator().manual_seed(5))
    for model in (ours, theirs):
        model.prompt_encoder["default"].delta_embedding.weight.data.copy_(changes)
    return ours, theirs


def delta_of(model: torch.nn.Module) -> torch.nn.Parameter:
    return model.prompt_encoder["default"].delta_embedding.weight  # type: ignore[index,union-attr,return-value]


def types_for(inputs: dict[str, Tensor]) -> Tensor:
    """[B, T] types that differ by row, labels among them; 0 for padding."""
    counted = (inputs["attention_mask"].cumsum(1) + torch.arange(len(inputs["input_ids"]))[:, None] + 1) // 2
    return counted * inputs["attention_mask"]


def all_labels(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def slow_loss(
    model: PeftModel, inputs: dict[str, Tensor], labels: Tensor, types: Tensor | None, fields: dict[str, Any]
) -> Tensor:
    """Row by row, label by label, with the prompt written in front of the row's text. Padding is left out."""
    base, prompt = model.get_base_model(), model.prompt_encoder["default"]()
    ids, own = fields["cpt_token_ids"], fields["cpt_tokens_type_mask"]
    shift = -(-max(own) // 4) * 4
    decay = fields["opt_loss_decay_factor"] if fields.get("opt_weighted_loss_type") == "decay" else 1.0
    losses = []
    for number, mask in enumerate(inputs["attention_mask"].bool()):
        words = inputs["input_ids"][number, mask]
        row_types = [4] * len(words) if types is None else types[number, mask].tolist()
        whole = torch.cat([prompt, base.get_input_embeddings()(words)])
        logits = base(inputs_embeds=whole[None]).logits[0]
        targets = [*ids, *labels[number, mask].tolist()]
        kinds = [*own, *(kind + shift if kind > 0 else 0 for kind in row_types)]
        examples = sorted({kind for kind in kinds[1:] if kind > 0 and kind % 4 == 0}, reverse=True)
        for place in range(1, len(targets)):
            if kinds[place] in examples and targets[place] != -100:
                loss = F.cross_entropy(logits[place - 1], torch.tensor(targets[place]))
                losses.append(loss * decay ** examples.index(kinds[place]))
    return torch.stack(losses).mean()


# Configs


def test_defaults_are_pefts() -> None:
    ours, theirs = CPTConfig(task_type=CAUSAL_LM), peft.CPTConfig(task_type=CAUSAL_LM)
    names = ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "num_virtual_tokens", "tokenizer_name_or_path")
    names += tuple(name for name in vars(theirs) if name.startswith("opt_"))
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert CPTConfig(**configs()).num_virtual_tokens == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_type": SEQ_CLS}, "only supports task_type = CAUSAL_LM"),
        ({"task_type": None}, "only supports task_type = CAUSAL_LM"),
        ({"cpt_mask": [1]}, "must have the same length"),
        ({"cpt_tokens_type_mask": [1]}, "they have 9, 9 and 1"),
        ({"cpt_token_ids": []}, "of at least 1"),
        ({"cpt_token_ids": [-1] * 9}, "cpt_token_ids"),
        ({"opt_weighted_loss_type": "linear"}, "opt_weighted_loss_type"),
        ({"opt_projection_epsilon": -1.0}, "opt_projection_epsilon"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        CPTConfig(**configs(**fields))
    assert "\n" not in str(error.value)


def test_fields_without_effect_are_left_out_with_a_word() -> None:
    with pytest.warns(UserWarning, match="cpt_mask of CPTConfig"):
        assert CPTConfig(**configs(cpt_mask=[0] + [1] * 8)).cpt_mask == [1] * 9
    with pytest.warns(UserWarning, match="num_virtual_tokens of CPTConfig"):
        assert CPTConfig(**configs(num_virtual_tokens=20)).num_virtual_tokens == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CPTConfig(**configs(cpt_mask=[1] * 9, num_virtual_tokens=9))


@pytest.mark.filterwarnings("ignore:.* is not trained by an adapter:UserWarning")
@pytest.mark.parametrize(("family", "task"), [("bert", SEQ_CLS), ("t5", SEQ_2_SEQ_LM), ("gpt2", SEQ_CLS)])
def test_models_of_other_tasks_are_refused(family: str, task: str) -> None:
    with pytest.raises(UnsupportedModelError, match="is no causal language model"):
        get_peft_model(base_model(family, task), CPTConfig(**configs()))


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"cpt_token_ids has 97, the vocabulary {VOCABULARY} entries"):
        get_peft_model(base_model("gpt2", CAUSAL_LM), CPTConfig(task_type=CAUSAL_LM, cpt_token_ids=[5, 97]))


def test_it_has_as_many_parameters_as_pefts() -> None:
    ours, theirs = pair("gpt2")
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


# Outputs


@pytest.mark.promise(6, methods=("cpt",))
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "bloom"])
def test_it_starts_as_the_text_in_front_of_each_row(family: str) -> None:
    model = get_peft_model(base_model(family, CAUSAL_LM), CPTConfig(**configs())).eval()
    prompt = torch.tensor(TWO_EXAMPLES["cpt_token_ids"])
    for row in texts(family, CAUSAL_LM):
        expected = model.get_base_model()(torch.cat([prompt, row])[None]).logits[:, len(prompt) :]
        torch.testing.assert_close(model(row[None]).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-3, 0.1, 3.0])
def test_changes_are_projected_as_pefts(size: float) -> None:
    """In training in place, twice as once; elsewhere the prompt alone."""
    ours, theirs = pair("gpt2", size, **WIDE)
    own, other = ours.prompt_encoder["default"], theirs.prompt_encoder["default"]
    raw = delta_of(ours).detach().clone()
    expected = other(torch.arange(9))
    ours.eval()
    torch.testing.assert_close(own(), expected, atol=1e-7, rtol=1e-6)
    assert torch.equal(delta_of(ours), raw)
    ours.train()
    vectors = own()
    torch.testing.assert_close(vectors, expected, atol=1e-7, rtol=1e-6)
    once = delta_of(ours).detach().clone()
    torch.testing.assert_close(once, delta_of(theirs), atol=1e-7, rtol=1e-6)
    assert torch.equal(own(), vectors)
    assert torch.equal(delta_of(ours), once)
    assert torch.equal(ours.eval().prompt_encoder["default"](), vectors)
    if size > 1:
        scale = (own.embedding.weight.shape[1] / 2048) ** 0.5
        radii = torch.tensor([4, 6, 6, 4, 0, 4, 6, 4, 0]) * scale
        torch.testing.assert_close(once.norm(dim=1), radii, atol=1e-6, rtol=1e-5)


def test_gradients_reach_the_tokens_that_are_no_labels() -> None:
    ours, _ = pair("gpt2", **WIDE)
    ours(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    moved = delta_of(ours).grad.abs().sum(dim=1) > 0  # type: ignore[union-attr]
    assert moved.tolist() == [kind % 4 != 0 for kind in TWO_EXAMPLES["cpt_tokens_type_mask"]]


# The loss


@pytest.mark.promise(6, methods=("cpt",))
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("fields", [{}, DECAY, LABEL_FIRST, {**LABEL_FIRST, **DECAY}], ids=str)
@pytest.mark.parametrize("typed", [False, True])
def test_loss_and_gradients_are_pefts(family: str, fields: dict[str, Any], typed: bool) -> None:
    """A row's first token is predicted by the prompt. The caller's types stay as they are, which PEFT raises."""
    ours, theirs = pair(family, **WIDE, **fields)
    inputs = batch(texts(family, CAUSAL_LM))
    types = {"input_type_mask": types_for(inputs)} if typed else {}
    kept = {name: value.clone() for name, value in types.items()}
    found = ours(**inputs, labels=all_labels(inputs), **types)
    assert types.keys() == kept.keys()
    assert all(torch.equal(types[name], value) for name, value in kept.items())
    expected = theirs(**inputs, labels=all_labels(inputs), **kept)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=1e-6)
    size = len(fields.get("cpt_token_ids", TWO_EXAMPLES["cpt_token_ids"]))
    is_text = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.logits[is_text], expected.logits[:, size:][is_text], atol=1e-5, rtol=1e-4)
    found.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(delta_of(ours).grad, delta_of(theirs).grad, atol=1e-5, rtol=1e-4)


@pytest.mark.promise(6, methods=("cpt",))
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "fields",
    [
        {"cpt_token_ids": [0], "cpt_tokens_type_mask": [1]},
        {"cpt_token_ids": [30, 41, 7, 8], "cpt_tokens_type_mask": [1, 2, 4, 6], **DECAY},
        {**TWO_EXAMPLES, **DECAY},
    ],
    ids=["default", "no multiple of 4", "two examples"],
)
@pytest.mark.parametrize("typed", [False, True])
def test_loss_and_gradients_are_the_slow_ones(side: str, fields: dict[str, Any], typed: bool) -> None:
    """Also where PEFT's loss is NaN, or leaves labels out, and where rows are padded on the left."""
    ours, _ = pair("llama", **WIDE, **fields)
    inputs = batch(texts("llama", CAUSAL_LM), side)
    types = types_for(inputs) if typed else None
    expected = slow_loss(ours, inputs, all_labels(inputs), types, fields)
    found = ours(**inputs, labels=all_labels(inputs), **({} if types is None else {"input_type_mask": types})).loss
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(found, delta_of(ours))
    (wanted,) = torch.autograd.grad(expected, delta_of(ours))
    assert float(wanted.abs().max()) > 1e-3
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


def test_a_head_that_is_trained_too_predicts_the_prompts_labels() -> None:
    ours, _ = pair("llama", **WIDE)
    ours.add_adapter("head", CPTConfig(**configs(**WIDE), modules_to_save=["lm_head"]))
    ours.set_adapter("head")
    (head,) = ours.adapter("head").heads.values()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    inputs = batch(texts("llama", CAUSAL_LM))
    found = ours(**inputs, labels=all_labels(inputs)).loss
    (gradient,) = torch.autograd.grad(found, [head.weight])
    single = get_peft_model(base_model("llama", CAUSAL_LM), CPTConfig(**configs(**WIDE)))
    single.get_base_model().lm_head.load_state_dict(head.state_dict())
    weight = single.get_base_model().lm_head.weight.requires_grad_()
    expected = slow_loss(single, inputs, all_labels(inputs), None, TWO_EXAMPLES | WIDE)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    (wanted,) = torch.autograd.grad(expected, [weight])
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


def test_pefts_default_types_have_no_loss() -> None:
    """The reason for which the reference above is softtune's own."""
    ours, theirs = pair("gpt2", cpt_token_ids=[0], cpt_tokens_type_mask=[1])
    inputs = batch(texts("gpt2", CAUSAL_LM))
    assert torch.isnan(theirs(**inputs, labels=all_labels(inputs)).loss)
    assert torch.isfinite(ours(**inputs, labels=all_labels(inputs)).loss)


def test_the_loss_is_that_of_the_logits_that_are_kept() -> None:
    ours, _ = pair("llama", **WIDE)
    inputs = batch(texts("llama", CAUSAL_LM), "left")
    labels = labels_for(CAUSAL_LM, inputs)
    labels[:, :4] = -100
    whole = ours(**inputs, labels=labels)
    for kept in (4, torch.arange(3, 7)):
        part = ours(**inputs, labels=labels, logits_to_keep=kept)
        assert part.logits.shape[1] == 4
        torch.testing.assert_close(part.loss, whole.loss)
    unnamed = ours(**inputs, labels=labels, return_dict=False)
    assert torch.equal(unnamed[0], whole.loss)
    assert torch.equal(unnamed[1], whole.logits)


def test_several_batches_of_an_update_share_it() -> None:
    """As a Trainer passes the number of the update's labels."""
    ours, _ = pair("llama", cpt_token_ids=[4, 5], cpt_tokens_type_mask=[1, 2])
    inputs = batch(texts("llama", CAUSAL_LM))
    labels = labels_for(CAUSAL_LM, inputs)
    labels[2, 1] = 9
    count = labels[:, 1:].ne(-100).sum()
    whole = ours(**inputs, labels=labels).loss
    parts = [
        ours(**{n: x[i : i + 1] for n, x in inputs.items()}, labels=labels[i : i + 1], num_items_in_batch=count).loss
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_batch_without_labels_is_refused() -> None:
    nothing = torch.full((1, 3), -100)
    ids = torch.tensor([[5, 6, 7]])
    ours, _ = pair("gpt2", cpt_token_ids=[0], cpt_tokens_type_mask=[1])
    with pytest.raises(DataError, match="no label in the batch, and none in the prompt: drop rows without an answer"):
        ours(ids, labels=nothing)
    with pytest.raises(DataError, match="no label in the batch"):
        ours(ids, labels=ids, input_type_mask=torch.ones_like(ids))
    demonstrated, _ = pair("gpt2")
    assert torch.isfinite(demonstrated(ids, labels=nothing).loss)


def test_arguments_that_do_not_fit_are_refused() -> None:
    ids = torch.tensor([[5, 6, 7]])
    ours, _ = pair("gpt2")
    with pytest.raises(DataError, match=r"input_type_mask \[1, 2\] do not fit the input \[1, 3\]"):
        ours(ids, labels=ids, input_type_mask=torch.ones(1, 2))
    with pytest.raises(DataError, match="leave out cache and prompt_positions"):
        ours(ids, labels=ids, prompt_positions=torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(AdapterError, match="input_type_mask is for CPT"):
        adapted("gpt2", CAUSAL_LM, "prompt")(ids, input_type_mask=torch.ones_like(ids))
    with ours.disable_adapter():
        plain = ours(ids, labels=ids, input_type_mask=torch.ones_like(ids))
    assert torch.equal(plain.loss, base_model("gpt2", CAUSAL_LM)(ids, labels=ids).loss)


def test_padding_and_checkpointing_change_nothing() -> None:
    rows = texts("llama", CAUSAL_LM)
    found = []
    for side, checkpoints in (("right", None), ("left", None), ("right", False), ("left", True)):
        ours, _ = pair("llama", **WIDE, **DECAY)
        inputs = batch(rows, side, width=9)
        if checkpoints is not None:
            enable_checkpointing(ours.get_base_model(), use_reentrant=checkpoints)
        loss = ours(**inputs, labels=all_labels(inputs)).loss
        loss.backward()
        disable_checkpointing(ours.get_base_model())
        found.append((loss.detach(), delta_of(ours).grad))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-4)


# Rows of several adapters


def test_rows_of_two_adapters_have_the_loss_of_both() -> None:
    ours, _ = pair("gpt2", **WIDE)
    ours.add_adapter("other", CPTConfig(task_type=CAUSAL_LM, cpt_token_ids=[9, 8, 60], cpt_tokens_type_mask=[1, 4, 3]))
    ours.set_requires_grad(["default", "other"])
    inputs = batch(texts("gpt2", CAUSAL_LM))
    labels = all_labels(inputs)
    names = ["other", "default", "other"]
    loss = ours(**inputs, labels=labels, adapter_names=names).loss
    sums, count = torch.zeros(()), 0
    for number, name in enumerate(names):
        ours.set_adapter(name)
        row = {n: x[number : number + 1] for n, x in inputs.items()}
        own = labels[number : number + 1]
        size = int((own != -100).sum()) + {"other": 1, "default": 2}[name]
        sums, count = sums + size * ours(**row, labels=own).loss, count + size
    torch.testing.assert_close(loss, sums / count)
    ours.set_requires_grad(["default", "other"])
    parameters = list(trained(ours).values())
    pairs = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(sums / count, parameters), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("other", ["prompt", "__base__"])
def test_rows_of_other_methods_are_as_if_alone_but_have_no_loss_with_it(other: str) -> None:
    model = adapted("gpt2", CAUSAL_LM, "cpt")
    model.add_adapter("prompt", METHODS["prompt"](task_type=CAUSAL_LM))
    inputs = batch(texts("gpt2", CAUSAL_LM, (4, 4)))
    mixed = model(**inputs, adapter_names=["default", other]).logits
    torch.testing.assert_close(mixed[:1], model(inputs["input_ids"][:1]).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="run them apart, or without labels") as error:
        model(**inputs, labels=inputs["input_ids"], adapter_names=["default", other])
    assert "\n" not in str(error.value)


def test_runs_that_train_at_once_are_refused(tmp_path: Path) -> None:
    fields = {"model": "m", "task": CAUSAL_LM, "train": "t.csv", "label_column": "b", "template": "{a} "}
    recipe = {**fields, "output": str(tmp_path), "method": "CPT", "options": TWO_EXAMPLES}
    with pytest.raises(ConfigError, match="CPT trains one adapter at a time"):
        check_compatible([Recipe.from_fields({**recipe, "ensemble": 2})])
    with pytest.raises(ConfigError, match="label_smoothing_factor is not for CPT"):
        Recipe.from_fields({**recipe, "label_smoothing_factor": 0.1})
    assert "cpt" in ENTRIES
    assert "cpt" not in DEFAULT_ENTRIES


# Generation


def test_generation_is_pefts_and_of_the_text_in_front() -> None:
    ours, theirs = pair("gpt2", **WIDE)
    rows = texts("gpt2", CAUSAL_LM, (5, 5))
    inputs = batch(rows)
    found = ours.eval().generate(**inputs, max_new_tokens=6, do_sample=False)
    vectors = ours.get_prompt(2)
    embeds = torch.cat([vectors, ours.word_embeddings(inputs["input_ids"])], dim=1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    expected = ours.get_base_model().generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(found[:, 5:], expected)
    padded = ours.generate(**batch(rows, "left", width=8), max_new_tokens=6, do_sample=False)
    assert torch.equal(padded[:, 8:], expected)
    # Beside a cache, PEFT 0.21.2 inserts the prompt again at each step with transformers 5.24.
    written = theirs.eval().generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(found, written)


# Folders


@pytest.mark.promise(4, methods=("cpt",))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folders_go_both_ways(family: str, tmp_path: Path) -> None:
    ours, theirs = pair(family, **WIDE, **DECAY)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = theirs.eval()(ids).logits[:, 9:]
    theirs.save_pretrained(str(tmp_path / "theirs"))
    read = PeftModel.from_pretrained(base_model(family, CAUSAL_LM), tmp_path / "theirs")
    torch.testing.assert_close(read(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert read.peft_config["default"].opt_loss_decay_factor == 0.6
    ours.save_pretrained(tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(base_model(family, CAUSAL_LM), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(read(ids).logits[:, 9:], expected, atol=1e-5, rtol=1e-4)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    torch.testing.assert_close(*weights, atol=1e-7, rtol=1e-6)


def test_training_goes_on_from_pefts_folder(tmp_path: Path) -> None:
    """PEFT's file has the prompt alone: less the tokens' embeddings, it is the changes. PEFT makes the prompt the
    centre of new balls."""
    ours, theirs = pair("gpt2", **WIDE)
    theirs.save_pretrained(str(tmp_path))
    read = PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path, is_trainable=True)
    ours(torch.tensor([[5]]))
    torch.testing.assert_close(delta_of(read), delta_of(ours), atol=1e-6, rtol=1e-6)
    ours.eval()
    set_peft_model_state_dict(read, get_peft_model_state_dict(ours))
    torch.testing.assert_close(get_peft_model_state_dict(read), get_peft_model_state_dict(ours), atol=1e-6, rtol=0)
    steps = []
    for model in (ours, read):
        model.train()
        inputs = batch(texts("gpt2", CAUSAL_LM))
        optimiser = torch.optim.SGD(list(trained(model).values()), lr=5.0)
        for _ in range(2):
            optimiser.zero_grad()
            model(**inputs, labels=all_labels(inputs)).loss.backward()
            optimiser.step()
        steps.append(model.eval()(pad(texts("gpt2", CAUSAL_LM)[:1])).logits)
    torch.testing.assert_close(*steps, atol=1e-4, rtol=1e-4)


@pytest.mark.promise(8, methods=("cpt",))
def test_training_steps_are_pefts() -> None:
    """Projected gradient descent: three steps with an evaluation in between."""
    ours, theirs = pair("gpt2", 0.0, **WIDE)
    inputs = batch(texts("gpt2", CAUSAL_LM))
    for model in (ours, theirs):
        optimiser = torch.optim.SGD(model.parameters(), lr=20.0)
        for _ in range(3):
            optimiser.zero_grad()
            model.train()(**inputs, labels=all_labels(inputs)).loss.backward()
            optimiser.step()
            if model is ours:
                model.eval()(**inputs)
                get_peft_model_state_dict(model)
    assert float(delta_of(ours).detach().norm(dim=1).max()) > 6 * (36 / 2048) ** 0.5
    torch.testing.assert_close(delta_of(ours), delta_of(theirs), atol=1e-5, rtol=1e-4)
