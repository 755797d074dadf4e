"""Generation on a device: the CPU's texts, from growing and static caches, compiled and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

from softtune import PeftModel
from tests.families import CAUSAL_LM, METHODS, batch, texts
from tests.gpu.running import adapted_on, pair

KINDS = ("prompt", "prompt_suffix", "prefix", "infix", "p_tuning_v2", "bitfit_added")
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def logits(model: PeftModel, **options: Any) -> torch.Tensor:
    """[6, B, V] of the tokens that the model writes."""
    inputs = {name: x.to(model.device) for name, x in batch(texts("llama", CAUSAL_LM), "left").items()}
    return torch.stack(model.generate(**inputs, **SETTINGS, **options).logits).cpu()


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_texts_are_the_cpus(device: torch.device, family: str, method: str) -> None:
    ours, theirs = pair(device, family, CAUSAL_LM, method)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-3, rtol=1e-2)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("method", KINDS)
def test_a_static_cache_writes_the_same(device: torch.device, method: str) -> None:
    """transformers compiles the steps of a static cache, and on a GPU runs them as CUDA graphs."""
    torch.compiler.reset()
    model = adapted_on(device, "llama", CAUSAL_LM, method)
    expected = logits(model)
    how: dict[str, Any] = {}
    if device.type == "cpu":  # whose compiler needs one of C++
        how["compile_config"] = CompileConfig(backend="aot_eager", mode=None)
        how["compile_config"]._compile_all_devices = True
    for _ in range(2):  # a graph is captured in the first call, and replayed in the second
        found = logits(model, cache_implementation="static", **how)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("method", ["prompt", "prefix", "bitfit_added"])
def test_compiled_layers_write_and_learn_the_same(device: torch.device, method: str) -> None:
    torch.compiler.reset()
    plain, compiled = (adapted_on(device, "llama", CAUSAL_LM, method) for _ in range(2))
    if device.type == "cpu":  # whose compiler needs one of C++
        for layer in compiled.get_base_model().model.layers:
            layer.compile(backend="aot_eager")
    else:
        compiled.backbone.compile_layers()
    torch.testing.assert_close(logits(compiled), logits(plain), atol=1e-3, rtol=1e-2)
    ids = batch(texts("llama", CAUSAL_LM))["input_ids"].to(device)
    losses = [model.train()(ids, labels=ids).loss for model in (compiled, plain)]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-3)
    for loss in losses:
        loss.backward()
    gradients = [[p.grad for p in model.parameters() if p.requires_grad] for model in (compiled, plain)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-2)


def test_rows_of_several_adapters(device: torch.device) -> None:
    model = adapted_on(device, "llama", CAUSAL_LM, "prefix")
    model.add_adapter("other", METHODS["prompt"](task_type=CAUSAL_LM))
    rows = texts("llama", CAUSAL_LM)
    names = ["default", "other", "__base__"]
    inputs = {name: x.to(device) for name, x in batch(rows, "left").items()}
    with torch.no_grad():
        found = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = model(rows[row][None].to(device), adapter_names=[name]).logits[0]
            torch.testing.assert_close(found[row, -len(alone) :], alone, atol=1e-4, rtol=1e-3)
