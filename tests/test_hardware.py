"""Flash and flex attention as they run in earnest: with their kernels on a GPU, and compiled.

What they compute is tested in ``test_implementations`` on any machine; this is about the kernels' own demands.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from softtune import PeftModel, get_peft_model
from tests import flash
from tests.families import CAUSAL_LM, METHODS, SEQ_CLS, base_model, batch, scramble, texts
from tests.test_implementations import choose, run
from tests.test_modes import ERRORS

SIZES = {"hidden_size": 64, "num_attention_heads": 4}
"""Flex attention's kernels take heads of 16 numbers and more."""
CASES = [(*case, method) for case in (("llama", CAUSAL_LM), ("bert", SEQ_CLS)) for method in ("prompt", "prefix")]
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of the compiler
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that CUDA finds")
needs_flash = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(p) is None, reason=f"{p} is not installed"))
    for name, p in PACKAGES.items()
]


def model_on(implementation: str, family: str, task: str, method: str, **placed: Any) -> PeftModel:
    base = base_model(family, task, **SIZES).to(**placed)
    base.set_attn_implementation(implementation)
    return scramble(get_peft_model(base, METHODS[method](task_type=task))).eval()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@needs_gpu
@pytest.mark.parametrize(("family", "task", "method"), CASES)
@pytest.mark.parametrize("implementation", needs_flash)
def test_flash_attention_on_a_gpu(implementation: str, family: str, task: str, method: str) -> None:
    same_on_a_gpu(implementation, family, task, method, torch.bfloat16, ERRORS[torch.bfloat16][0])


@needs_gpu
@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_flex_attention_on_a_gpu(family: str, task: str, method: str) -> None:
    same_on_a_gpu("flex_attention", family, task, method, torch.float32, 0.01)


def same_on_a_gpu(
    implementation: str,
    family: str,
    task: str,
    method: str,
    dtype: torch.dtype,
    error: float,
    device: str = "cuda",
) -> None:
    """Outputs and gradients are those with sdpa, and generation is that of the uncached forward."""
    models = [model_on(n, family, task, method, device=device, dtype=dtype) for n in ("sdpa", implementation)]
    for side in ("right", "left"):
        inputs = {name: tensor.to(device) for name, tensor in batch(texts(family, task), side).items()}
        (expected, expected_gradients), (found, gradients) = (run(model, task, inputs) for model in models)
        assert relative(found.float(), expected.float()) < error
        for name, gradient in gradients.items():
            assert relative(gradient, expected_gradients[name]) < 2 * error, name
        for model in models:
            model.zero_grad()
    if task == CAUSAL_LM:
        settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        settings |= {"return_dict_in_generate": True, "output_logits": True}
        expected, found = (torch.stack(m.generate(**inputs, **settings).logits[:1]) for m in models)
        assert relative(found.float(), expected.float()) < error


@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_what_a_gpu_is_tested_by(family: str, task: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with the kernels' stand-ins."""
    flash.install(monkeypatch)
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", choose)
    same_on_a_gpu("flash_attention_2", family, task, method, torch.float64, 1e-9, device="cpu")


# torch 2.13 mixes up the names of lengths that vary in the C++ that it writes.
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)
@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_flex_attention_compiled(family: str, task: str, method: str) -> None:
    """On the CPU, where it has no gradients."""
    torch.compiler.reset()
    with torch.no_grad():
        models = [model_on(name, family, task, method) for name in ("sdpa", "flex_attention")]
        for rows in (texts(family, task), texts(family, task, (9, 3))):
            inputs = batch(rows)
            expected, found = (model(**inputs).logits for model in models)
            if task == CAUSAL_LM:
                expected, found = (logits[inputs["attention_mask"] != 0] for logits in (expected, found))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_flash_attention_compiled(family: str, task: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels' stand-ins."""
    torch.compiler.reset()
    flash.install(monkeypatch)
    inputs = batch(texts(family, task))
    models = [
        get_peft_model(choose(base_model(family, task), "flash_attention_2"), METHODS[method](task_type=task))
        for _ in "ab"
    ]
    expected = run(scramble(models[0]).eval(), task, inputs)
    found = run(torch.compile(scramble(models[1]).eval(), backend="aot_eager"), task, inputs)
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name.removeprefix("_orig_mod.")], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(found[0], expected[0], atol=1e-7, rtol=1e-5)
