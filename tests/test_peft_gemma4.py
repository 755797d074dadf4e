"""Prefixes that PEFT wrote for Gemma 4, whose layers differ in heads and head sizes, or share keys and values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from softtune import AdapterMismatchError, PeftModel, PrefixTuningConfig, get_peft_model
from softtune.checkpoint import OWN_CONFIG_NAME
from softtune.compat import renamed
from softtune.methods.initialization import WEIGHTS_NAME
from tests.families import CAUSAL_LM, P, base_model, batch, scramble, texts

GEMMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "uneven heads' sizes": ("gemma4", {}),
    "shared keys": ("gemma4_small", {}),
    "shared keys, uneven": ("gemma4_small", {"global_head_dim": 16}),
    "fewer heads in global layers": ("gemma4", {"num_global_key_value_heads": 1, "attention_k_eq_v": True}),
}
"""Gemmas, by what is special in them: a family and what its config has beside."""
WITH_PREFIX = {
    "uneven heads' sizes": [0, 1, 2],
    "shared keys": [0, 1],
    "shared keys, uneven": [0, 1],
    "fewer heads in global layers": [2],
}
"""The layers to which PEFT gives a prefix in the cache. Positions count on from the first layer's."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    # What PEFT 0.21.2 calls by names of before transformers 5.24.
    pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Both .* are set:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers:UserWarning"),
]


def gemma(kind: str) -> PreTrainedModel:
    family, sizes = GEMMAS[kind]
    return base_model(family, CAUSAL_LM, **sizes)


def written_by_peft(kind: str, folder: Path) -> peft.PeftModel:
    config = peft.PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=P)
    model = scramble(peft.get_peft_model(gemma(kind), config)).eval()
    model.save_pretrained(folder)
    assert not (folder / OWN_CONFIG_NAME).exists()
    return model


def short_texts() -> dict[str, Tensor]:
    """Texts that see PEFT's whole prefix within a window of 8 tokens."""
    return batch(texts("gemma4", CAUSAL_LM, (3, 2, 1)))


def of_tokens(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return logits[inputs["attention_mask"].bool()]


@torch.no_grad()
def by_hand(base: PreTrainedModel, prompt: Tensor, kind: str, ids: Tensor) -> Tensor:
    """[1, T, V] logits of one text behind a cache that holds PEFT's prefix, cut for each layer by its config."""
    config = base.config.get_text_config()
    heads, size = largest(config)
    cache = DynamicCache(config=config)
    parts = prompt.view(P, config.num_hidden_layers, 2, heads, size).permute(1, 2, 3, 0, 4)
    for number in WITH_PREFIX[kind]:
        shape = config.per_layer_config[number]
        key, value = (part[None, : shape.num_key_value_heads, :, : shape.head_dim] for part in parts[number])
        cache.update(key, value, number)
    mask = torch.ones(1, P + ids.shape[1], dtype=torch.long)
    positions = torch.arange(ids.shape[1])[None] + cache.get_seq_length()
    behind = renamed({"cache": cache}, base.forward)
    logits: Tensor = base(ids, attention_mask=mask, position_ids=positions, **behind).logits
    return logits


def largest(config: Any) -> tuple[int, int]:
    """Heads and head size of the layer with the largest heads, for which PEFT makes room."""
    shapes = [config.per_layer_config[number] for number in range(config.num_hidden_layers)]
    chosen = max(shapes, key=lambda shape: shape.head_dim)
    return chosen.num_key_value_heads, chosen.head_dim


@pytest.mark.parametrize("kind", GEMMAS)
def test_pefts_prefix_acts_as_in_peft(kind: str, tmp_path: Path) -> None:
    theirs, inputs = written_by_peft(kind, tmp_path), short_texts()
    ours = PeftModel.from_pretrained(gemma(kind), tmp_path)
    with torch.no_grad():
        expected = theirs(**inputs).logits[:, -inputs["input_ids"].shape[1] :]
        found, alone = ours(**inputs).logits, gemma(kind)(**inputs).logits
    assert float((of_tokens(expected, inputs) - of_tokens(alone, inputs)).abs().max()) > 0.1
    torch.testing.assert_close(of_tokens(found, inputs), of_tokens(expected, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", GEMMAS)
def test_pefts_prefix_acts_as_a_cache_of_the_base_model(kind: str, tmp_path: Path) -> None:
    theirs = written_by_peft(kind, tmp_path)
    prompt = theirs.prompt_encoder["default"].embedding.weight.detach()
    ours = PeftModel.from_pretrained(gemma(kind), tmp_path)
    for ids in texts("gemma4", CAUSAL_LM, (3, 2)):
        with torch.no_grad():
            found = ours(ids[None]).logits
        torch.testing.assert_close(found, by_hand(gemma(kind), prompt, kind, ids[None]), atol=1e-5, rtol=1e-4)
        written = ours.generate(
            ids[None], max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        torch.testing.assert_close(written.logits[0], found[:, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", GEMMAS)
def test_a_loaded_prefix_is_saved_and_trained(kind: str, tmp_path: Path) -> None:
    written_by_peft(kind, tmp_path / "theirs")
    ours, inputs = PeftModel.from_pretrained(gemma(kind), tmp_path / "theirs", is_trainable=True), short_texts()
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(gemma(kind), tmp_path / "ours").eval()
    if 0 in WITH_PREFIX[kind]:  # else the folder's config says otherwise than the loaded one's where texts start
        again.load_adapter(tmp_path / "theirs", "default")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, ours.eval()(**inputs).logits)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ours.train()(**inputs, labels=labels).loss.backward()
    assert all(bool(p.grad.any()) for p in ours.parameters() if p.requires_grad)


def test_layers_without_room_are_named_in_the_config(tmp_path: Path) -> None:
    written_by_peft("fewer heads in global layers", tmp_path)
    ours = PeftModel.from_pretrained(gemma("fewer heads in global layers"), tmp_path)
    config = ours.peft_config["default"]
    assert (config.layers, config.shift_positions) == ([2], False)


def test_a_prefix_for_another_gemma_is_refused(tmp_path: Path) -> None:
    written_by_peft("shared keys, uneven", tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"token_dim|shape|num_layers"):
        PeftModel.from_pretrained(gemma("uneven heads' sizes"), tmp_path)


def test_softtunes_own_prefixes_load_as_before(tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=P)
    ours, inputs = scramble(get_peft_model(gemma("shared keys"), config)).eval(), short_texts()
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        again = PeftModel.from_pretrained(gemma("shared keys"), tmp_path)
        assert torch.equal(again(**inputs).logits, ours(**inputs).logits)
    assert (tmp_path / WEIGHTS_NAME).exists()
