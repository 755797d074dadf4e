"""Precisions and compilation: adapters in fp32 over a base model of any, and the same outputs when compiled."""

from __future__ import annotations

import pytest
import torch

from softtune import get_peft_model
from tests.families import (
    CAUSAL_LM,
    METHODS,
    SEQ_CLS,
    adapted,
    answers,
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
ERRORS = {torch.bfloat16: 0.06, torch.float16: 0.01}
"""Of the logits, relative to the largest: what eight and eleven bits leave after two layers."""


def run(model: torch.nn.Module, family: str, task: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs = {**batch(texts(family, task), "left" if task == CAUSAL_LM else "right"), **answers(task, 3)}
    labels = labels_for(task, inputs)
    output = model(**{k: v for k, v in inputs.items() if k != "decoder_input_ids"}, labels=labels)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in trained(model).items()}


@pytest.mark.parametrize(("family", "task", "method"), CASES)
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_adapters_stay_in_full_precision(family: str, task: str, method: str, dtype: torch.dtype) -> None:
    exact, _ = run(adapted(family, task, method), family, task)
    half = base_model(family, task).to(dtype)
    model = scramble(get_peft_model(half, METHODS[method](task_type=task))).eval()
    logits, gradients = run(model, family, task)
    assert logits.dtype is dtype
    real = labels_for(task, batch(texts(family, task), "left")) if task == CAUSAL_LM else None
    error = (logits.float() - exact).abs()
    error = error if real is None else error[real != -100]
    assert error.max() < ERRORS[dtype] * exact.abs().max()
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert all(g.dtype is torch.float32 and bool(g.isfinite().all()) for g in gradients.values())


@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_autocast(family: str, task: str, method: str) -> None:
    exact, _ = run(adapted(family, task, method), family, task)
    model = adapted(family, task, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, gradients = run(model, family, task)
    real = labels_for(task, batch(texts(family, task), "left")) if task == CAUSAL_LM else None
    error = (logits.float() - exact).abs()
    error = error if real is None else error[real != -100]
    assert error.max() < ERRORS[torch.bfloat16] * exact.abs().max()
    assert all(g.dtype is torch.float32 and bool(g.isfinite().all()) for g in gradients.values())


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
