"""Promises 4 and 5: what is saved is what was trained, to the last bit, and the baked form computes the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from softtune import PeftModel
from tests.families import (
    BY_MODULE,
    CAUSAL_LM,
    FAMILIES,
    PREFIX_METHODS,
    REPARAMETERISED,
    SEQ_CLS,
    adapted,
    answers,
    base_model,
    batch,
    cases,
    head_names,
    is_decoder_only,
    labels_for,
    texts,
    trained,
)

FILES = {"adapter_config.json", "adapter_model.safetensors", "softtune_config.json", "README.md"}
READABLE = {"prompt", "p_tuning_mlp", "p_tuning_lstm", "prefix", "prefix_projection", "cartridge", "cpt", "multitask"}


def is_even(family: str) -> bool:
    """Whether the model is as PEFT supposes: one site, and a prefix of one size at every layer, alike for keys and
    values."""
    row = FAMILIES[family]
    sizes = {s for _, s in row.layers()}
    even = len(row.attention) == 1 and len(sizes) == 1 and all(key == value for _, key, value in sizes)
    depth = getattr(base_model(family, row.tasks[0]).config, "num_hidden_layers", None)
    return even and len(row.layers()) == depth and row.plain_cache


def keys(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.promise(4, 5)
@pytest.mark.parametrize(("family", "task", "method"), cases())
def test_saved_and_loaded_is_the_same(family: str, task: str, method: str, tmp_path: Path) -> None:
    model = adapted(family, task, method)
    inputs = {**batch(texts(family, task), "left"), **answers(task, 3)}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(family, task), tmp_path)
    assert not loaded.training
    assert not trained(loaded)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    heads = {f"{start}{n}" for n in head_names(family, task) for start in ("base_model.", "base_model.model.")}
    own = keys(tmp_path / "adapter_model.safetensors") - heads
    tensors = {name for name, _ in loaded.prompt_encoder["default"].named_parameters()}
    if method == "ia3":  # keys and values of a fused projection are in one tensor there
        tensors = {
            re.sub(r"(c_attn|query_key_value|Wqkv|qkv_proj|in_proj|kv_b_proj)/(key|value)$", r"\1", name)
            for name in tensors
        }
    assert len(tensors) == len(own)


@pytest.mark.promise(4)
@pytest.mark.parametrize(("family", "task", "method"), [c for c in cases() if c[2] not in BY_MODULE])
def test_files_and_keys(family: str, task: str, method: str, tmp_path: Path) -> None:
    adapted(family, task, method).save_pretrained(tmp_path)
    state = {"training_state.safetensors"} if method in REPARAMETERISED else set()
    assert {p.name for p in tmp_path.iterdir()} == FILES | state
    plain_words = FAMILIES[family].word_scale == 1.0 and (is_decoder_only(family) or not FAMILIES[family].window)
    is_peft = method in READABLE and (is_even(family) if method in PREFIX_METHODS else plain_words)
    expected = {"prompt_embeddings" if is_peft else "softtune.prompt_embeddings"}
    expected |= {"prefix_task_cols", "prefix_task_rows"} if method == "multitask" else set()
    expected |= {f"base_model.{name}" for name in head_names(family, task)}
    assert keys(tmp_path / "adapter_model.safetensors") == expected


@pytest.mark.promise(4, methods=("bitfit",))
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_bitfit_keys_are_the_biases(family: str, tmp_path: Path) -> None:
    adapted(family, SEQ_CLS, "bitfit").save_pretrained(tmp_path)
    base = base_model(family, SEQ_CLS)
    biases = {n for n, _ in base.base_model.named_parameters(prefix=base.base_model_prefix) if n.endswith(".bias")}
    for name in [n for n in biases if "c_attn" in n]:
        biases.remove(name)
        biases |= {name.replace(".bias", f".{part}.bias") for part in ("query", "key", "value")}
    assert keys(tmp_path / "adapter_model.safetensors") == biases | {
        f"base_model.{n}" for n in head_names(family, SEQ_CLS)
    }


def step(model: PeftModel, family: str, task: str) -> None:
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    inputs = batch(texts(family, task))
    model(**inputs, labels=labels_for(task, inputs)).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


@pytest.mark.promise(4)
@pytest.mark.parametrize(("family", "task", "method"), cases())
def test_training_goes_on_as_if_never_saved(family: str, task: str, method: str, tmp_path: Path) -> None:
    model = adapted(family, task, method)
    step(model, family, task)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(family, task), tmp_path, is_trainable=True)
    assert trained(loaded).keys() == trained(model).keys()
    step(model, family, task)
    step(loaded, family, task)
    for name, parameter in trained(model).items():
        assert torch.equal(trained(loaded)[name], parameter), name


def test_other_adapters_have_folders_of_their_own(tmp_path: Path) -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    model.add_adapter("other", model.peft_config["default"])
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == FILES | {"other"}
    assert {p.name for p in (tmp_path / "other").iterdir()} == FILES
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"other"}


def test_saving_again_keeps_the_model_card(tmp_path: Path) -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nTrained on tea leaves.\n")
    model.save_pretrained(tmp_path)
    assert "Trained on tea leaves." in card.read_text()


def test_half_precision_models_have_fp32_adapters(tmp_path: Path) -> None:
    for method in ("prompt", "p_tuning_lstm", "prefix", "p_tuning_v2", "bitfit"):
        model = adapted("gpt2", SEQ_CLS, method, dtype=torch.bfloat16)
        inputs = batch(texts("gpt2", SEQ_CLS))
        assert model.get_base_model().dtype == torch.bfloat16
        assert {p.dtype for n, p in trained(model).items() if n.startswith("prompt_encoder")} == {torch.float32}, method
        model(**inputs, labels=labels_for(SEQ_CLS, inputs)).loss.backward()
        model.save_pretrained(tmp_path / method)
        loaded = PeftModel.from_pretrained(base_model("gpt2", SEQ_CLS, dtype=torch.bfloat16), tmp_path / method)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits), method
