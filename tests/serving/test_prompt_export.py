"""An exported adapter has the keys and values that the base model itself computes, and comes back from its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from softtune import PeftModel, compat
from softtune.backbone import Backbone, Site
from softtune.errors import AdapterMismatchError, CheckpointError, UnsupportedModelError
from softtune.methods.prompt import KeyValue, Prompt
from softtune.serving import prompt_export
from softtune.serving.prompt_export import PROMPT_NAME, export_prompt, load_adapter, load_prompt, save_prompt
from tests.families import CAUSAL_LM, KINDS, METHODS, P, scramble
from tests.tiny import save_models


@pytest.fixture
def backbone(llama: str) -> Backbone:
    return PeftModel(AutoModelForCausalLM.from_pretrained(llama).eval()).backbone


def exported(backbone: Backbone, folder: Path, *, as_kv: bool = True) -> Prompt:
    return export_prompt(backbone, load_adapter(backbone, folder), as_kv=as_kv)


def cached_by_the_model(backbone: Backbone, vectors: Tensor) -> dict[tuple[Site, int], KeyValue]:
    """Keys and values in the base model's own cache after reading some vectors."""
    with torch.no_grad():
        cache = compat.cache_of(backbone.model(inputs_embeds=vectors[None], use_cache=True))
    layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    return {(Site.DECODER, number): KeyValue(*states) for number, states in enumerate(layers)}


def assert_same(found: Prompt, expected: Prompt) -> None:
    assert found.num_virtual_tokens == expected.num_virtual_tokens
    assert (found.after_text, found.shifts_positions) == (expected.after_text, expected.shifts_positions)
    assert (found.vectors is None) == (expected.vectors is None)
    if found.vectors is not None and expected.vectors is not None:
        assert torch.equal(found.vectors, expected.vectors)
    assert found.prefixes.keys() == expected.prefixes.keys()
    for place, states in expected.prefixes.items():
        for part, other in zip(found.prefixes[place], states, strict=True):
            assert torch.equal(part, other)
    assert found.terms == expected.terms
    assert all(torch.equal(memory, expected.memories[place]) for place, memory in found.memories.items())
    for place, gated in found.gated.items():
        assert all(torch.equal(*pair) for pair in zip(gated, expected.gated[place], strict=True))
    for pairs in ((found.additions, expected.additions), (found.scalings, expected.scalings)):
        by_name = [{(slot.name, slot.is_input): tensor for slot, tensor in each} for each in pairs]
        assert by_name[0].keys() == by_name[1].keys()
        assert all(torch.equal(tensor, by_name[1][name]) for name, tensor in by_name[0].items())


@pytest.mark.parametrize("kind", [*KINDS, "p_tuning_lstm"])
def test_a_prompt_comes_back_from_its_file(backbone: Backbone, adapters: Path, tmp_path: Path, kind: str) -> None:
    prompt = exported(backbone, adapters / kind)
    save_prompt(prompt, backbone, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PROMPT_NAME]
    assert_same(load_prompt(tmp_path, backbone), prompt)


@pytest.mark.parametrize(
    ("kind", "has_prefix", "has_vectors", "changes"),
    [
        ("prefix", True, False, None),
        ("prompt", True, False, None),
        ("p_tuning_lstm", True, False, None),
        ("prompt_suffix", False, True, None),
        ("bitfit_added", False, False, "additions"),
        ("ia3", False, False, "scalings"),
    ],
)
def test_what_each_method_comes_to(
    backbone: Backbone, adapters: Path, kind: str, has_prefix: bool, has_vectors: bool, changes: str | None
) -> None:
    prompt = exported(backbone, adapters / kind)
    assert prompt.num_virtual_tokens == (0 if changes else P)
    assert (len(prompt.prefixes) == 2, prompt.vectors is not None) == (has_prefix, has_vectors)
    assert bool(prompt.additions) == (changes == "additions")
    assert bool(prompt.scalings) == (changes == "scalings")
    tensors = [*(part for states in prompt.prefixes.values() for part in states), prompt.vectors]
    assert not any(tensor.requires_grad for tensor in tensors if tensor is not None)


def test_leading_virtual_tokens_become_what_the_model_would_cache(backbone: Backbone, adapters: Path) -> None:
    vectors = load_adapter(backbone, adapters / "prompt").module.prompt().vectors
    prompt = exported(backbone, adapters / "prompt")
    for place, states in cached_by_the_model(backbone, vectors).items():
        for part, other in zip(prompt.prefixes[place], states, strict=True):
            torch.testing.assert_close(part, other, atol=1e-5, rtol=1e-5)


def test_virtual_tokens_within_a_text_stay_vectors(backbone: Backbone, adapters: Path) -> None:
    trained = load_adapter(backbone, adapters / "prompt").module.prompt().vectors
    prompt = exported(backbone, adapters / "prompt", as_kv=False)
    assert prompt.vectors is not None
    assert torch.equal(prompt.vectors, trained)
    assert not prompt.prefixes


def test_a_prefix_is_left_in_the_file_where_another_reads_it(
    backbone: Backbone, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    @contextmanager
    def watched(*args: Any, **how: Any) -> Iterator[Any]:
        with safe_open(*args, **how) as opened:
            yield Mock(wraps=opened, get_tensor=lambda name: read.append(name) or opened.get_tensor(name))

    monkeypatch.setattr(prompt_export, "safe_open", watched)
    for kind in ("prefix", "prompt_suffix"):
        (tmp_path / kind).mkdir()
        save_prompt(exported(backbone, adapters / kind), backbone, tmp_path / kind)
    without = load_prompt(tmp_path / "prefix", backbone, with_prefix=False)
    assert (without.num_virtual_tokens, without.prefixes, without.vectors) == (P, {}, None)
    vectors = load_prompt(tmp_path / "prompt_suffix", backbone, with_prefix=False).vectors
    assert vectors is not None
    assert vectors.shape == (P, 24)
    assert read == ["vectors"]


def test_the_file_says_what_a_worker_needs_to_know(backbone: Backbone, adapters: Path, tmp_path: Path) -> None:
    save_prompt(exported(backbone, adapters / "prefix_last"), backbone, tmp_path)
    with safe_open(tmp_path / PROMPT_NAME, "pt") as opened:
        facts = json.loads(opened.metadata()["prompt"])
        assert opened.get_slice("prefix").get_shape() == [P, 2 * 2 * 6]  # keys and values of 2 heads of size 6
    assert facts == {"num_virtual_tokens": P, "layers": [1], "after_text": False, "shifts_positions": True}


def test_an_adapter_is_loaded_for_inference(backbone: Backbone, adapters: Path) -> None:
    adapter = load_adapter(backbone, adapters / "p_tuning_lstm")
    assert adapter.config.inference_mode
    assert not any(module.training for module in adapter.module.modules())
    assert not any(parameter.requires_grad for parameter in adapter.module.parameters())


def test_modules_of_its_own_are_refused(backbone: Backbone, llama: str, tmp_path: Path) -> None:
    config = METHODS["prompt"](task_type=CAUSAL_LM, modules_to_save=["lm_head"])
    scramble(PeftModel(AutoModelForCausalLM.from_pretrained(llama), config)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="has a lm_head of its own, beside which no other adapter writes"):
        exported(backbone, tmp_path)


def test_what_is_broken_or_anothers_is_refused(backbone: Backbone, adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_adapter(backbone, tmp_path / "nowhere")
    shutil.copytree(adapters / "prefix", tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        load_adapter(backbone, tmp_path / "damaged")
    other = save_models(tmp_path / "models", seed=7)["llama"]
    with pytest.raises(AdapterMismatchError, match="was trained on another base model"):
        load_adapter(PeftModel(AutoModelForCausalLM.from_pretrained(other)).backbone, adapters / "prefix")
