"""Adapters that start from another one's prompt: it is that prompt, in whatever layout its file has, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.families import CAUSAL_LM, METHODS, SEQ_2_SEQ_LM, SEQ_CLS, P, adapted, base_model, batch, scramble, texts
from torch import Tensor

from softtune import (
    AdapterMismatchError,
    CartridgeConfig,
    CheckpointError,
    ConfigError,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningV2Config,
    get_peft_model,
)

PREFIXES: dict[str, Any] = {
    "prefix": PrefixTuningConfig,
    "projection": lambda **k: PrefixTuningConfig(prefix_projection=True, **k),
    "v2": PTuningV2Config,
    "cartridge": CartridgeConfig,
}
SOURCES = ("prefix", "prefix_projection", "p_tuning_v2", "cartridge")
EVEN = {"d_kv": 8, "num_layers": 2}
"""The sizes of a T5 that PEFT can give a prefix."""


def prompt_of(model: PeftModel) -> Tensor:
    return model.get_prompt_embedding_to_save("default")


def started(family: str, task: str, config: PeftConfig, **overrides: Any) -> PeftModel:
    return get_peft_model(base_model(family, task, **overrides), config).eval()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("method", PREFIXES)
@pytest.mark.parametrize(("family", "task"), [("llama", CAUSAL_LM), ("t5", SEQ_2_SEQ_LM), ("bert", SEQ_CLS)])
def test_a_prefix_starts_from_any_other(family: str, task: str, method: str, source: str, tmp_path: Path) -> None:
    """From another task's as well: a head is not taken along."""
    saved = adapted(family, task, source)
    saved.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        for start in (None, "file"):
            config = PREFIXES[method](num_virtual_tokens=P, init_file=str(path), init_weights=start, task_type=task)
            model = started(family, task, config)
            torch.testing.assert_close(prompt_of(model), prompt_of(saved), atol=1e-5, rtol=1e-5)
            if method != "projection":
                assert torch.equal(prompt_of(model), prompt_of(saved))


@pytest.mark.parametrize("method", PREFIXES)
@pytest.mark.parametrize("theirs", [peft.PrefixTuningConfig, peft.CartridgeConfig])
def test_a_prefix_starts_from_pefts(method: str, theirs: Any, tmp_path: Path) -> None:
    source = peft.get_peft_model(base_model("llama", CAUSAL_LM), theirs(task_type=CAUSAL_LM, num_virtual_tokens=P))
    source.save_pretrained(str(tmp_path))
    expected = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    model = started("llama", CAUSAL_LM, PREFIXES[method](num_virtual_tokens=P, init_file=str(tmp_path)))
    torch.testing.assert_close(prompt_of(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", PREFIXES)
def test_pefts_layout_of_encoder_decoders_is_read(method: str, tmp_path: Path) -> None:
    """As where the folder is loaded, and for the decoder's self-attention alone."""
    config = peft.PrefixTuningConfig(task_type=SEQ_2_SEQ_LM, num_virtual_tokens=P)
    scramble(peft.get_peft_model(base_model("t5", SEQ_2_SEQ_LM, **EVEN), config)).save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base_model("t5", SEQ_2_SEQ_LM, **EVEN), tmp_path)
    fields = {"num_virtual_tokens": P, "init_file": str(tmp_path)}
    model = started("t5", SEQ_2_SEQ_LM, PREFIXES[method](sites=["decoder"], **fields), **EVEN)
    torch.testing.assert_close(prompt_of(model), prompt_of(loaded), atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterMismatchError, match=r"set sites=\['decoder'\]"):
        started("t5", SEQ_2_SEQ_LM, PREFIXES[method](**fields), **EVEN)


def test_pefts_layout_of_uneven_layers_is_read_once_saved_here(tmp_path: Path) -> None:
    """Gemma 4's, in which each layer has room for the largest, and some have no prefix."""
    config = peft.PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=P)
    scramble(peft.get_peft_model(base_model("gemma4", CAUSAL_LM), config)).save_pretrained(str(tmp_path / "theirs"))
    loaded = PeftModel.from_pretrained(base_model("gemma4", CAUSAL_LM), tmp_path / "theirs")
    loaded.save_pretrained(tmp_path / "ours")
    fields = {"num_virtual_tokens": P, "layers": loaded.peft_config["default"].layers}  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="holds the shape"):
        started("gemma4", CAUSAL_LM, PTuningV2Config(init_file=str(tmp_path / "theirs"), **fields))
    model = started("gemma4", CAUSAL_LM, PTuningV2Config(init_file=str(tmp_path / "ours"), **fields))
    assert torch.equal(prompt_of(model), prompt_of(loaded))


@pytest.mark.parametrize("method", PREFIXES)
@pytest.mark.parametrize(("family", "task"), [("llama", CAUSAL_LM), ("deepseek_v3", CAUSAL_LM), ("t5", SEQ_2_SEQ_LM)])
def test_chosen_layers_start_from_their_own(family: str, task: str, method: str, tmp_path: Path) -> None:
    saved = adapted(family, task, "prefix")
    saved.save_pretrained(tmp_path)
    sites = ["cross"] if task == SEQ_2_SEQ_LM else ["decoder"]
    config = PREFIXES[method](num_virtual_tokens=P, init_file=str(tmp_path), layers="last:1", sites=sites)
    found = started(family, task, config).adapter("default").module.prompt().prefixes
    assert len(found) == 1
    whole = saved.adapter("default").module.prompt().prefixes
    for place, pair in found.items():
        torch.testing.assert_close(pair, whole[place], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", PREFIXES)
def test_chosen_sites_start_from_their_own(method: str, tmp_path: Path) -> None:
    sites = {"sites": ["cross", "decoder"]}
    saved = started("t5", SEQ_2_SEQ_LM, PREFIXES[method](num_virtual_tokens=P, **sites))
    scramble(saved).save_pretrained(tmp_path)
    fields = {"num_virtual_tokens": P, "init_file": str(tmp_path)}
    model = started("t5", SEQ_2_SEQ_LM, PREFIXES[method](**fields, **sites))
    torch.testing.assert_close(prompt_of(model), prompt_of(saved), atol=1e-5, rtol=1e-5)
    whole = saved.adapter("default").module.prompt().prefixes
    one = started("t5", SEQ_2_SEQ_LM, PREFIXES[method](**fields, sites=["decoder"]))
    found = one.adapter("default").module.prompt().prefixes
    assert len(found) == 2
    for place, pair in found.items():
        torch.testing.assert_close(pair, whole[place], atol=1e-5, rtol=1e-5)


def test_a_start_answers_as_what_it_started_from(tmp_path: Path) -> None:
    saved = adapted("llama", CAUSAL_LM, "prefix")
    saved.save_pretrained(tmp_path)
    model = started("llama", CAUSAL_LM, CartridgeConfig(num_virtual_tokens=P, init_file=str(tmp_path)))
    inputs = batch(texts("llama", CAUSAL_LM), "left")
    assert torch.equal(model(**inputs).logits, saved(**inputs).logits)
    model.save_pretrained(tmp_path / "again")
    (tmp_path / "adapter_model.safetensors").unlink()
    again = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path / "again")  # needs the file no more
    assert torch.equal(prompt_of(again), prompt_of(saved))


@pytest.mark.parametrize("method", PREFIXES)
def test_prefixes_that_do_not_fit(method: str, tmp_path: Path) -> None:
    adapted("llama", CAUSAL_LM, "prefix").save_pretrained(tmp_path / "prefix")
    adapted("llama", CAUSAL_LM, "prefix_last").save_pretrained(tmp_path / "last")
    adapted("llama", CAUSAL_LM, "prompt").save_pretrained(tmp_path / "vectors")
    adapted("llama", CAUSAL_LM, "bitfit_added").save_pretrained(tmp_path / "biases")
    adapted("gpt2", CAUSAL_LM, "prefix").save_pretrained(tmp_path / "gpt2")
    other = get_peft_model(base_model("llama", CAUSAL_LM, seed=4), METHODS["prefix"]())
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x08")
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("prefix", {"num_virtual_tokens": 7}, CheckpointError, r"\(5, 64\).*\(7, 64\): change num_virtual_tokens"),
        ("last", {}, AdapterMismatchError, "for other layers than this one"),
        ("last", {"layers": "first:1"}, AdapterMismatchError, "for other layers than this one: set layers and sites"),
        ("vectors", {}, CheckpointError, r"\(5, 48\)"),
        ("biases", {}, CheckpointError, "holds no prompt"),
        ("gpt2", {}, AdapterMismatchError, "another base model"),
        ("gpt2/adapter_model.safetensors", {}, AdapterMismatchError, "another base model"),
        ("other", {}, AdapterMismatchError, "another base model"),
        ("damaged.safetensors", {}, CheckpointError, "no prompt can be read"),
        ("nowhere", {}, CheckpointError, "nowhere"),
    ]
    for name, fields, error, message in cases:
        config = PREFIXES[method](**{"num_virtual_tokens": P, "init_file": str(tmp_path / name)} | fields)
        with pytest.raises(error, match=message) as refusal:
            started("llama", CAUSAL_LM, config)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("method", PREFIXES)
def test_starts_that_contradict_each_other(method: str) -> None:
    cases = [
        ({"init_weights": "file"}, "init_weights = 'file' needs init_file: name the adapter to start from"),
        ({"init_weights": "zero", "init_file": "a"}, "has no use for init_file"),
        ({"init_weights": "text", "init_text": "a", "init_file": "b"}, "has no use for init_file"),
        ({"init_text": "a", "init_file": "b"}, "init_text and init_file are two starts: drop one of them"),
        ({"init_file": "b", "tokenizer_name_or_path": "c"}, "tokenizer_name_or_path is for init_text"),
    ]
    for fields, message in cases:
        with pytest.raises(ConfigError, match=message):
            PREFIXES[method](**fields)


# Vectors


@pytest.mark.parametrize("source", ["prompt", "p_tuning_mlp", "p_tuning_lstm"])
def test_prompt_tuning_starts_from_p_tuning(source: str, tmp_path: Path) -> None:
    saved = adapted("llama", CAUSAL_LM, source)
    saved.save_pretrained(tmp_path)
    config = PromptTuningConfig(num_virtual_tokens=P, prompt_tuning_init="FILE", prompt_tuning_init_file=str(tmp_path))
    model = started("llama", CAUSAL_LM, config)
    assert torch.equal(prompt_of(model), prompt_of(saved))
    inputs = batch(texts("llama", CAUSAL_LM))
    torch.testing.assert_close(model(**inputs).logits, saved(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize("source", ["prompt", "p_tuning_lstm"])
def test_p_tuning_starts_from_vectors(source: str, encoder: str, tmp_path: Path) -> None:
    saved = adapted("llama", CAUSAL_LM, source)
    saved.save_pretrained(tmp_path)
    config = PromptEncoderConfig(num_virtual_tokens=P, encoder_reparameterization_type=encoder, init_file=str(tmp_path))
    torch.testing.assert_close(prompt_of(started("llama", CAUSAL_LM, config)), prompt_of(saved), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source", ["prompt", "p_tuning_mlp", "embedding_only"])
def test_an_embedding_only_prefix_starts_from_vectors(source: str, tmp_path: Path) -> None:
    saved = adapted("llama", CAUSAL_LM, source)
    saved.save_pretrained(tmp_path)
    config = PrefixTuningConfig(num_virtual_tokens=P, embedding_only=True, init_file=str(tmp_path))
    assert torch.equal(prompt_of(started("llama", CAUSAL_LM, config)), prompt_of(saved))


@pytest.mark.parametrize("method", [PromptEncoderConfig, PromptTuningConfig])
def test_vectors_that_do_not_fit(method: Any, tmp_path: Path) -> None:
    adapted("llama", CAUSAL_LM, "prompt").save_pretrained(tmp_path / "prompt")
    get_peft_model(base_model("llama", CAUSAL_LM, seed=4), METHODS["prompt"]()).save_pretrained(tmp_path / "other")

    def config(name: str, length: int) -> PeftConfig:
        path = str(tmp_path / name)
        fields = (
            {"init_file": path}
            if method is PromptEncoderConfig
            else {"prompt_tuning_init": "FILE", "prompt_tuning_init_file": path}
        )
        made: PeftConfig = method(num_virtual_tokens=length, **fields)
        return made

    with pytest.raises(CheckpointError, match=r"\(5, 48\).*\(3, 48\)"):
        started("llama", CAUSAL_LM, config("prompt", 3))
    with pytest.raises(AdapterMismatchError, match="another base model"):
        started("llama", CAUSAL_LM, config("other", P))
