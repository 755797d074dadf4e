"""Going on from what an encoder-decoder's encoder returned: only where the same adapters act in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from softtune import PeftModel, PrefixTuningConfig, get_peft_model
from softtune.errors import AdapterError
from tests.families import METHODS, SEQ_2_SEQ_LM, P, adapted, answers, base_model, batch, scramble, texts

BASE = "__base__"
THE_BASE = "the base model"
INPUTS = batch(texts("bart", SEQ_2_SEQ_LM))
ANSWERS = answers(SEQ_2_SEQ_LM, 3)
MASK = {"attention_mask": INPUTS["attention_mask"]}


def encoded(model: PeftModel, **options: Any) -> BaseModelOutput:
    """What the model returns of its encoder."""
    return BaseModelOutput(model(**INPUTS, **ANSWERS, **options).encoder_last_hidden_state)


def logits(model: PeftModel, **options: Any) -> Tensor:
    found: Tensor = model(**ANSWERS, **options).logits
    return found


@torch.no_grad()
@pytest.mark.parametrize("method", ["prefix", "bitfit_added", "memory", "adaption_prompt"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_models_own(family: str, method: str) -> None:
    model = adapted(family, SEQ_2_SEQ_LM, method)
    outputs = encoded(model)
    assert torch.equal(logits(model, encoder_outputs=outputs, **MASK), logits(model, **INPUTS))
    as_tuple = (outputs.last_hidden_state,)
    assert torch.equal(logits(model, encoder_outputs=as_tuple, **MASK), logits(model, **INPUTS))
    for options in ({}, {"num_beams": 2}):
        greedy: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, **options}
        found = model.generate(encoder_outputs=outputs, **MASK, **greedy)
        assert torch.equal(found, model.generate(**INPUTS, **greedy))


@torch.no_grad()
@pytest.mark.parametrize("method", ["prefix", "bitfit_added", "memory", "adaption_prompt"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_those_of_others(family: str, method: str) -> None:
    model = adapted(family, SEQ_2_SEQ_LM, method)
    bare = model.get_base_model().get_encoder()(**INPUTS)
    with pytest.raises(
        AdapterError, match=f"encoder_outputs were computed with {THE_BASE}, not default: pass input_ids"
    ):
        logits(model, encoder_outputs=bare, **MASK)
    with pytest.raises(AdapterError, match="encoder_outputs"):
        model.generate(encoder_outputs=bare, **MASK)
    own = encoded(model)
    with model.disable_adapter(), pytest.raises(AdapterError, match=f"computed with default, not {THE_BASE}"):
        logits(model, encoder_outputs=own, **MASK)


@torch.no_grad()
def test_those_without_virtual_tokens() -> None:
    model = adapted("t5", SEQ_2_SEQ_LM, "prompt")
    outputs = encoded(model)
    with pytest.raises(AdapterError, match="encoder_outputs lack the virtual tokens: pass input_ids"):
        logits(model, encoder_outputs=outputs, **MASK)
    with model.disable_adapter(), pytest.raises(AdapterError, match=f"computed with default, not {THE_BASE}"):
        logits(model, encoder_outputs=outputs, **MASK)


@torch.no_grad()
def test_mixed_rows() -> None:
    model = adapted("bart", SEQ_2_SEQ_LM, "prefix")
    model.add_adapter("other", METHODS["prefix"](task_type=SEQ_2_SEQ_LM))
    model.set_adapter("other")
    scramble(model, seed=2)
    names = ["other", BASE, "default"]
    outputs = encoded(model, adapter_names=names)
    found = logits(model, encoder_outputs=outputs, **MASK, adapter_names=names)
    assert torch.equal(found, logits(model, **INPUTS, adapter_names=names))
    with pytest.raises(AdapterError, match=f"computed with other, {THE_BASE}, default, not default, other, {THE_BASE}"):
        logits(model, encoder_outputs=outputs, **MASK, adapter_names=["default", "other", BASE])


@torch.no_grad()
def test_an_adapter_that_leaves_the_encoder_alone() -> None:
    """Whoever computed the encoder's outputs, they are the base model's."""
    config = PrefixTuningConfig(num_virtual_tokens=P, sites=["decoder", "cross"], task_type=SEQ_2_SEQ_LM)
    model = scramble(get_peft_model(base_model("t5", SEQ_2_SEQ_LM), config)).eval()
    bare = model.get_base_model().get_encoder()(**INPUTS)
    assert torch.equal(logits(model, encoder_outputs=bare, **MASK), logits(model, **INPUTS))
