"""Precisions and compilation: adapters in fp32 over a base model of any, and the same outputs when compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtune import get_peft_model
from softtune.injection import _lay_together
from tests.families import (
    CAUSAL_LM,
    METHODS,
    SEQ_CLS,
    adapted,
    base_model,
    batch,
    cases,
    labels_for,
    scramble,
    texts,
    trained,
)

CASES = cases(
    ("prompt", "prompt_suffix", "prefix", "p_tuning_v2", "bitfit_added"),
    ("llama", "gpt2", "bloom", "bert", "t5", "gemma3"),
)
ERRORS = {torch.bfloat16: (0.1, 0.2), torch.float16: (0.015, 0.03)}
"""What eight and eleven bits may change: of the logits, relative to what the adapter does to them, and of the
gradients."""


def output(model: torch.nn.Module, family: str, task: str) -> Any:
    """Of a batch with labels."""
    inputs = batch(texts(family, task), "left" if task == CAUSAL_LM else "right")
    return model(**inputs, labels=labels_for(task, inputs))


def run(model: torch.nn.Module, family: str, task: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of a batch."""
    found = output(model, family, task)
    found.loss.backward()
    return found.logits.detach(), {n: p.grad for n, p in trained(model).items()}


def assert_close_to_exact(
    logits: torch.Tensor, gradients: dict[str, torch.Tensor], family: str, task: str, method: str, dtype: torch.dtype
) -> None:
    """Compare with full precision."""
    model = adapted(family, task, method)
    exact, exact_gradients = run(model, family, task)
    with model.disable_adapter(), torch.no_grad():
        base = output(model, family, task).logits
    read = torch.ones(exact.shape[:-1], dtype=torch.bool)
    if task == CAUSAL_LM:
        read = batch(texts(family, task), "left")["attention_mask"] != 0
    of_logits, of_gradients = ERRORS[dtype]
    assert distance(logits[read], exact[read]) < of_logits * distance(base[read], exact[read])
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    found, expected = (torch.cat([g[name].flatten() for name in exact_gradients]) for g in (gradients, exact_gradients))
    assert distance(found, expected) < of_gradients * expected.norm()


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() - b).norm()


@pytest.mark.parametrize(("family", "task", "method"), CASES)
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_adapters_stay_in_full_precision(family: str, task: str, method: str, dtype: torch.dtype) -> None:
    half = base_model(family, task).to(dtype)
    model = scramble(get_peft_model(half, METHODS[method](task_type=task))).eval()
    logits, gradients = run(model, family, task)
    assert logits.dtype is dtype
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert_close_to_exact(logits, gradients, family, task, method, dtype)


@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_autocast(family: str, task: str, method: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, gradients = run(adapted(family, task, method), family, task)
    assert_close_to_exact(logits, gradients, family, task, method, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize(("family", "task"), [("llama", CAUSAL_LM), ("bert", SEQ_CLS), ("bloom", CAUSAL_LM)])
@pytest.mark.parametrize("method", ["prompt", "prefix", "bitfit_added"])
def test_compiled(family: str, task: str, method: str) -> None:
    torch.compiler.reset()
    model = adapted(family, task, method)
    compiled = torch.compile(model, backend="aot_eager")
    outputs = []
    for form in (model, compiled):
        model.zero_grad()
        logits, gradients = run(form, family, task)
        outputs.append([logits, *(gradients[n].clone() for n in gradients)])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_layers_compiled_one_by_one(method: str) -> None:
    torch.compiler.reset()
    logits, gradients = run(adapted("llama", CAUSAL_LM, method), "llama", CAUSAL_LM)
    model = adapted("llama", CAUSAL_LM, method)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(run(model, "llama", CAUSAL_LM), (logits, gradients), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_language_head_gets_states_that_lie_together(rows: int) -> None:
    """In bf16 on a CPU, others are multiplied tens of times as slowly; one row's lie apart by their strides alone."""
    states = torch.randn(rows, 3, 8)[:, -1:]
    (laid,) = _lay_together(torch.nn.Identity(), (states,))
    assert laid.stride() == (8, 8, 1)
    assert torch.equal(laid, states)
