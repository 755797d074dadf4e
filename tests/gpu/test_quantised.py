"""Quantised base models on a device: gradients are those through the weights that the layers compute with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from softtune import PeftModel, get_peft_model
from softtune.pretrained import LoadOptions, load_base_model
from tests.families import CAUSAL_LM, METHODS, scramble, trained
from tests.quantised import save_base, with_layers

PACKAGES = {"none": "torch", "bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}
"""Quantisations, and the packages that have them. Without one, all else of the test is the same."""
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed"))
    for kind, package in PACKAGES.items()
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 8, 7, 6, 5, 4]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


def quantised(folder: str, kind: str, device: torch.device) -> Any:
    # bitsandbytes computes in eight bits by half precision.
    dtype = "float16" if kind == "bnb-8bit" else "auto" if kind == "bnb-4bit" else "float32"
    quantization = None if kind == "none" else kind
    options = LoadOptions(device=device.type, quantization=quantization, dtype=dtype)
    return load_base_model(folder, options=options)[0]


def with_plain_weights(model: Any) -> Any:
    """The model with plain layers in place of quantised ones, whose weights are what these do to unit vectors."""
    return with_layers(model, lambda layer: plain(layer, model.dtype), is_replaced)


def is_replaced(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and name != "lm_head"


@torch.no_grad()
def plain(layer: Any, dtype: torch.dtype) -> nn.Linear:
    device = next(layer.parameters()).device
    weight = layer(torch.eye(layer.in_features, device=device, dtype=dtype)).T
    weight = weight if layer.bias is None else weight - layer.bias[:, None]
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).to(device, dtype)
    made.weight.copy_(weight)
    if layer.bias is not None:
        made.bias.copy_(layer.bias)
    return made.requires_grad_(False)


def gradients(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = IDS.to(model.device)
    output = model(ids, labels=ids)
    output.loss.backward()
    return output.logits.detach().float(), {n: p.grad.float() for n, p in trained(model).items()}


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning_mlp", "p_tuning_v2", "bitfit"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through_the_weights(device: torch.device, folder: str, kind: str, method: str) -> None:
    found, expected = (
        gradients(scramble(get_peft_model(base, METHODS[method](task_type=CAUSAL_LM))).train())
        for base in (quantised(folder, kind, device), with_plain_weights(quantised(folder, kind, device)))
    )
    scale = float(expected[0].abs().max())
    assert float((found[0] - expected[0]).abs().max()) < 0.05 * scale
    both = [torch.cat([g[name].flatten() for name in expected[1]]) for g in (found[1], expected[1])]
    assert float(both[1].norm()) > 0
    assert float((both[0] - both[1]).norm()) < 0.1 * float(both[1].norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_trained_evaluated_saved_and_loaded(
    device: torch.device, folder: str, kind: str, tmp_path: Path
) -> None:
    model = get_peft_model(quantised(folder, kind, device), METHODS["prefix"](task_type=CAUSAL_LM))
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05)
    ids, losses = IDS.to(device), []
    for _ in range(6):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            model.eval()(ids)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(folder, kind, device), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, atol=1e-2, rtol=1e-2)
