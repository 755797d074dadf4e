"""A cache belongs to the adapter that filled it, be it the caller's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from softtune import AdapterError, PeftModel, PrefixTuningConfig
from softtune.compat import cache_of
from tests.families import CAUSAL_LM, SEQ_2_SEQ_LM, adapted

IDS = torch.tensor([[5, 6, 7, 8]])
SETTINGS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


def filled(model: PeftModel, how: str) -> tuple[DynamicCache, Tensor]:
    """The caller's own cache, and the text that goes on from it."""
    cache = DynamicCache()
    with torch.no_grad():
        if how == "generate":
            text = model.generate(IDS, cache=cache, **SETTINGS)
        else:
            text = IDS
            model(IDS, cache=cache, use_cache=False if how == "forward without an output" else None)
    return cache, torch.cat([text, torch.tensor([[4]])], dim=1)


@pytest.mark.parametrize("how", ["generate", "forward", "forward without an output"])
@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit"])
def test_an_adapter_goes_on_from_its_own_cache(method: str, how: str) -> None:
    model = adapted("gpt2", CAUSAL_LM, method)
    cache, text = filled(model, how)
    expected = model.generate(text, **SETTINGS)
    assert torch.equal(model.generate(text, cache=cache, **SETTINGS), expected)


@pytest.mark.parametrize("how", ["generate", "forward", "forward without an output"])
@pytest.mark.parametrize("method", ["prefix", "prompt", "bitfit"])
def test_nobody_goes_on_from_anothers_cache(method: str, how: str) -> None:
    model = adapted("gpt2", CAUSAL_LM, method)
    cache, text = filled(model, how)
    with model.disable_adapter():
        with pytest.raises(AdapterError, match="computed with default, not the base model"):
            model.generate(text, cache=cache, **SETTINGS)
        with pytest.raises(AdapterError, match="computed with default, not the base model"):
            model(text[:, -1:], cache=cache)
        cache, text = filled(model, how)
    with pytest.raises(AdapterError, match="computed with the base model, not default"):
        model.generate(text, cache=cache, **SETTINGS)


def test_a_cache_that_a_broken_call_filled_has_an_owner() -> None:
    model, cache = adapted("gpt2", CAUSAL_LM, "prefix"), DynamicCache()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(IDS, cache=cache)
    handle.remove()
    with model.disable_adapter(), pytest.raises(AdapterError, match="computed with default"):
        model(IDS[:, :1], cache=cache)


def test_an_empty_cache_is_anyones() -> None:
    model, cache = adapted("gpt2", CAUSAL_LM, "prefix"), DynamicCache()
    model.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=2, task_type=CAUSAL_LM))
    with pytest.raises(AdapterError, match="no adapter"):
        model(IDS, cache=cache, adapter_names=["nobody"])
    model(IDS, cache=cache, adapter_names=["b"])
    with pytest.raises(AdapterError, match="computed with b, not default"):
        model(IDS[:, :1], cache=cache)


def test_the_cache_of_an_encoder_decoder() -> None:
    model = adapted("t5", SEQ_2_SEQ_LM, "prefix")
    made = model.generate(IDS, **SETTINGS, return_dict_in_generate=True)
    with model.disable_adapter(), pytest.raises(AdapterError, match="computed with default"):
        model(IDS, decoder_input_ids=made.sequences[:, -1:], cache=cache_of(made))
