"""Calls within calls, and in several threads: each is what it would be alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from softtune import PeftModel
from softtune.compat import enable_checkpointing
from tests.families import CAUSAL_LM, METHODS, adapted, batch, labels_for, pad, scramble, texts, trained

CASES = [
    ("llama", "prefix"),
    ("llama", "prompt"),
    ("gpt2", "prompt_suffix"),
    ("gpt2", "bitfit_added"),
    ("bloom", "prefix"),
    ("gemma3", "infix"),
]
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


class Nested(LogitsProcessor):
    """Calls the model at every step of ``generate``."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        self.call = call
        self.found: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.found.append((input_ids, self.call(input_ids)))
        return scores


def generate(model: PeftModel, ids: Tensor, call: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    """Generate with nested calls, each of which must give what it gives alone."""
    nested = Nested(call)
    output: Tensor = model.generate(ids, logits_processor=LogitsProcessorList([nested]), **GREEDY, **options)
    assert len(nested.found) == 3
    for given, found in nested.found:
        assert torch.equal(found, call(given))
    return output


@pytest.fixture(params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest) -> PeftModel:
    return adapted(request.param[0], CAUSAL_LM, request.param[1])


@pytest.fixture
def ids(model: PeftModel) -> Tensor:
    return pad(texts("gpt2", CAUSAL_LM, (5, 5)))


@torch.no_grad()
def test_a_forward_within_generate(model: PeftModel, ids: Tensor) -> None:
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(generate(model, ids, lambda given: model(given).logits), expected)


@torch.no_grad()
def test_the_base_model_within_generate(model: PeftModel, ids: Tensor) -> None:
    def base(given: Tensor) -> Tensor:
        with model.disable_adapter():
            logits: Tensor = model(given).logits
        return logits

    expected = model.generate(ids, **GREEDY)
    assert torch.equal(generate(model, ids, base), expected)


@torch.no_grad()
def test_an_adapter_within_generate_of_the_base_model(model: PeftModel, ids: Tensor) -> None:
    names = ["__base__"] * len(ids)
    expected = model.generate(ids, adapter_names=names, **GREEDY)
    assert torch.equal(generate(model, ids, lambda given: model(given).logits, adapter_names=names), expected)


@torch.no_grad()
def test_generate_within_generate(model: PeftModel, ids: Tensor) -> None:
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(generate(model, ids, lambda given: model.generate(given, **GREEDY)), expected)


@torch.no_grad()
def test_an_error_within_generate_leaves_the_outer_call_alone(model: PeftModel, ids: Tensor) -> None:
    def fail(given: Tensor) -> Tensor:
        with pytest.raises(IndexError):
            model(torch.full_like(given, 1000))
        return given

    expected = model.generate(ids, **GREEDY)
    assert torch.equal(generate(model, ids, fail), expected)


def test_threads_with_adapters_of_their_own() -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    for number, method in enumerate(("bitfit_added", "prompt_suffix")):
        model.add_adapter(method, METHODS[method](task_type=CAUSAL_LM))
        model.set_adapter(method)
        scramble(model, seed=number)
    inputs = batch(texts("gpt2", CAUSAL_LM))
    names = ["default", "bitfit_added", "prompt_suffix", "__base__"]

    @torch.no_grad()
    def logits(name: str) -> Tensor:
        found: Tensor = model(**inputs, adapter_names=[name] * 3).logits
        return found

    expected = {name: logits(name) for name in names}
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(names * 20, pool.map(logits, names * 20), strict=True):
            assert torch.equal(found, expected[name])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["prefix", "bitfit_added"])
def test_layers_run_again_within_another_call(method: str, reentrant: bool) -> None:
    """A backward pass under gradient checkpointing, while another adapter acts."""
    model = adapted("gpt2", CAUSAL_LM, method)
    model.add_adapter("other", METHODS["bitfit_added"](task_type=CAUSAL_LM))
    model.set_adapter("other")
    scramble(model)
    model.set_adapter("default")
    inputs = batch(texts("gpt2", CAUSAL_LM))

    def loss() -> Tensor:
        found: Tensor = model(**inputs, labels=labels_for(CAUSAL_LM, inputs)).loss
        return found

    loss().backward()
    expected = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    model.zero_grad()
    enable_checkpointing(model.get_base_model(), use_reentrant=reentrant)
    model.train()
    waiting = [loss()]
    model.eval()

    def go_back(given: Tensor) -> Tensor:
        while waiting:
            with torch.enable_grad():
                waiting.pop().backward()
        return given

    ids = inputs["input_ids"][:1]
    processors = LogitsProcessorList([Nested(go_back)])
    model.generate(ids, adapter_names=["other"], logits_processor=processors, **GREEDY)
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name])
