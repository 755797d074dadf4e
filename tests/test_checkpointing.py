"""Under gradient checkpointing, what acted in a forward acts again in its backward pass, whatever is called in between,
and nothing outlives a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softtune import BitFitConfig, PeftModel
from softtune.compat import CHECKPOINT, disable_checkpointing, enable_checkpointing
from tests.families import (
    CAUSAL_LM,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    adapted,
    base_model,
    batch,
    labels_for,
    scramble,
    texts,
    trained,
)

MODELS = {"gpt2": CAUSAL_LM, "bert": SEQ_CLS, "t5": SEQ_2_SEQ_LM, "qwen2": CAUSAL_LM}
INSIDE_A_LAYER = {"gpt2": "mlp", "bert": "intermediate", "t5": "wo", "qwen2": "mlp"}


def two_adapters(family: str) -> PeftModel:
    """A model that trains two adapters' biases, and modules inside the layers with the second."""
    task = MODELS[family]
    model = PeftModel(base_model(family, task))
    for seed, (name, modules) in enumerate({"a": None, "b": [INSIDE_A_LAYER[family]]}.items()):
        model.add_adapter(name, BitFitConfig(add_missing=True, modules_to_save=modules, task_type=task))
        model.set_adapter(name)
        scramble(model, seed)
    return choose(model.train(), "a")


def choose(model: PeftModel, name: str) -> PeftModel:
    """Let one adapter act, and train both."""
    model.set_adapter(name)
    model.set_requires_grad(["a", "b"])
    return model


def loss_of(model: PeftModel, family: str, **names: Any) -> Tensor:
    inputs = batch(texts(family, MODELS[family]))
    loss: Tensor = model(**inputs, labels=labels_for(MODELS[family], inputs), **names).loss
    return loss


def two_forwards(model: PeftModel, family: str) -> Tensor:
    return loss_of(model, family) + 2 * loss_of(choose(model, "b"), family)


def a_forward_without_adapter(model: PeftModel, family: str) -> Tensor:
    loss = loss_of(model, family)
    with model.disable_adapter():
        return loss + loss_of(model, family)


def an_evaluation(model: PeftModel, family: str) -> Tensor:
    loss = loss_of(model, family)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        loss_of(model, family)
    model.train()
    return loss


def a_switch(model: PeftModel, family: str) -> Tensor:
    loss = loss_of(model, family)
    choose(model, "b")
    return loss


def mixed_rows(model: PeftModel, family: str) -> Tensor:
    return loss_of(model, family, adapter_names=["b", "__base__", "a"]) + loss_of(model, family)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("step", [two_forwards, a_forward_without_adapter, an_evaluation, a_switch, mixed_rows])
def test_gradients_are_those_without(family: str, reentrant: bool, step: Callable[[PeftModel, str], Tensor]) -> None:
    gradients = []
    for checkpoints in (False, True):
        model = two_adapters(family)
        if checkpoints:
            enable_checkpointing(model, use_reentrant=reentrant)
        step(model, family).backward()
        gradients.append({n: p.grad for n, p in trained(model).items()})
    assert any(g is not None for g in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_outlives_a_call_or_its_backward_pass(reentrant: bool) -> None:
    model = two_adapters("gpt2")
    enable_checkpointing(model, use_reentrant=reentrant)
    before = traces(model)
    loss = loss_of(model, "gpt2", adapter_names=["a", "b", "a"])
    assert traces(model) == before
    loss.backward()
    assert traces(model) == before


def traces(model: PeftModel) -> list[tuple[list[int], Any]]:
    """Every module's hooks, and what it is checkpointed by."""
    modules = model.base_model.modules()
    return [(list(m._forward_hooks), getattr(m, CHECKPOINT, None)) for m in modules]


def test_disabled_checkpointing_is_none() -> None:
    model = adapted("gpt2", CAUSAL_LM, "bitfit").train()
    expected = loss_of(model, "gpt2")
    enable_checkpointing(model)
    disable_checkpointing(model)
    assert torch.equal(loss_of(model, "gpt2"), expected)


@pytest.mark.parametrize(
    ("family", "task"), [("bert", SEQ_CLS), ("deberta", SEQ_CLS), ("deberta_v2", SEQ_CLS), ("qwen2", CAUSAL_LM)]
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the call without an adapter
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_prefix_comes_back_with_its_layers(family: str, task: str, reentrant: bool) -> None:
    gradients = []
    for checkpoints in (False, True):
        model = adapted(family, task, "prefix").train()
        if checkpoints:
            enable_checkpointing(model, use_reentrant=reentrant)
        inputs = batch(texts(family, task))
        loss = model(**inputs, labels=labels_for(task, inputs)).loss
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
        loss.backward()
        gradients.append({n: p.grad for n, p in trained(model).items()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_layers_that_another_library_recomputes(family: str) -> None:
    """As FSDP's ``activation_checkpointing`` does, which transformers' own checkpointing knows nothing of."""
    task = {"llama": CAUSAL_LM, "t5": SEQ_2_SEQ_LM}[family]
    inputs = batch(texts(family, task))
    gradients = []
    for wraps in (False, True):
        model = adapted(family, task, "prefix").train()
        for layer in [layer for stack in model.backbone.stacks for layer in stack.layers] if wraps else []:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        loss = model(**inputs, labels=labels_for(task, inputs)).loss
        gradients.append(torch.autograd.grad(loss, list(trained(model).values())))
    torch.testing.assert_close(*gradients)
