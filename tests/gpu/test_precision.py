"""Base models in half precision, with adapters that stay in full precision."""

from __future__ import annotations

import pytest
import torch

from softtune import get_peft_model
from tests.families import METHODS, base_model, cases, scramble, trained
from tests.gpu.running import output_on, to_cpu
from tests.test_modes import ERRORS, assert_close_to_exact

FAMILIES = ("llama", "gpt2", "bert", "t5", "gemma3")
CASES = cases(("prompt", "prompt_suffix", "prefix", "p_tuning_v2", "bitfit_added"), FAMILIES)


@pytest.mark.parametrize(("family", "task", "method"), CASES)
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_half_precision_differs_from_float32_by_rounding(
    device: torch.device, family: str, task: str, method: str, dtype: torch.dtype
) -> None:
    base = base_model(family, task).to(device, dtype)
    model = scramble(get_peft_model(base, METHODS[method](task_type=task))).eval()
    output = output_on(device, model, family, task)
    output.loss.backward()
    assert output.logits.dtype is dtype
    gradients = {name: parameter.grad.cpu() for name, parameter in trained(model).items()}
    assert_close_to_exact(to_cpu(output.logits), gradients, family, task, method, dtype)


@pytest.mark.parametrize(("family", "task", "method"), cases(("prompt", "prefix", "bitfit_added"), ("llama", "bert")))
def test_autocast(device: torch.device, family: str, task: str, method: str) -> None:
    model = scramble(get_peft_model(base_model(family, task).to(device), METHODS[method](task_type=task))).eval()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = output_on(device, model, family, task)
        output.loss.backward()
    gradients = {name: parameter.grad.cpu() for name, parameter in trained(model).items()}
    assert_close_to_exact(to_cpu(output.logits), gradients, family, task, method, torch.bfloat16)
