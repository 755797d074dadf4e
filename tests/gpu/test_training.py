"""Training on a device is training on the CPU, up to rounding: every method, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from softtune import PeftModel
from softtune.pretrained import LoadOptions, load_base_model
from softtune.training.recipe import Recipe
from softtune.training.run import train
from tests.families import CAUSAL_LM, METHODS, assert_same_gradients, base_model, cases, trained
from tests.gpu.running import inputs_on, output_on, pair, to_cpu
from tests.tiny import LABELS, recipe_fields, save_models

CASES = cases(tuple(METHODS), ("llama", "bert", "t5"))
STEPS = 3


@pytest.mark.parametrize(("family", "task", "method"), CASES)
def test_outputs_and_gradients_are_the_cpus(device: torch.device, family: str, task: str, method: str) -> None:
    found = []
    for model in pair(device, family, task, method):
        output = output_on(model.device, model, family, task)
        output.loss.backward()
        found.append((to_cpu(output.logits), {name: p.grad.cpu() for name, p in trained(model).items()}))
    (logits, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)
    assert_same_gradients(gradients, expected_gradients, 1e-4)


@pytest.mark.parametrize("method", ["prompt", "p_tuning_mlp", "prefix", "p_tuning_v2", "bitfit_added"])
def test_steps_and_the_saved_adapter_are_the_cpus(device: torch.device, method: str, tmp_path: Path) -> None:
    ours, theirs = pair(device, "llama", CAUSAL_LM, method)
    losses = [[step(model) for model in (ours, theirs)] for _ in range(STEPS)]
    for on_device, on_cpu in losses:
        assert on_device == pytest.approx(on_cpu, rel=1e-3)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama", CAUSAL_LM), tmp_path).eval()
    inputs = inputs_on(torch.device("cpu"), "llama", CAUSAL_LM)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, theirs(**inputs).logits, atol=1e-3, rtol=1e-3)


def step(model: PeftModel) -> float:
    """A step of gradient descent; its loss."""
    parameters = list(trained(model).values())
    output = output_on(model.device, model, "llama", CAUSAL_LM)
    gradients = torch.autograd.grad(output.loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.01 * gradient
    return float(output.loss.detach())


def test_a_recipe_trains_and_predicts_on_the_device(device: torch.device, tmp_path: Path) -> None:
    """The default suite trains the same recipe on the CPU."""
    base = save_models(tmp_path / "models", attention_dropout=0.0)["llama"]
    scores = []
    for name, output in ((device.type, "here"), ("cpu", "there")):
        fields = recipe_fields(base, tmp_path, device=name, output=str(tmp_path / output), dtype="float32", epochs=2)
        train(Recipe.model_validate(fields))
        model, tokenizer = load_base_model(base, options=LoadOptions(device=name, dtype="float32"))
        assert model.device.type == name
        adapted = PeftModel.from_pretrained(model, fields["output"]).eval()
        words = [tokenizer(word)["input_ids"] for word in LABELS]
        scores.append(next_words(adapted, tokenizer("text : red label : ")["input_ids"], words))
    torch.testing.assert_close(*scores, atol=5e-3, rtol=1e-2)


def next_words(model: PeftModel, ids: list[int], words: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of words behind a text."""
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device)).logits[0, -1].float().log_softmax(-1).cpu()
    return logits[[word[0] for word in words]]
