"""Linear layers from packed weights: outputs and gradients of the plain ones, and a model that stays as it is."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.injection.test_sparse_logits import batch, found, llama, phi
from torch import Tensor, nn

from softtune import AdapterError, PrefixTuningConfig, get_peft_model
from softtune.backbone import prepacked_weights as module
from softtune.backbone.prepacked_weights import PrepackedLinear, prepacked_weights

SIZES = [(1, 1), (3, 5), (17, 64), (64, 17)]
ROWS = [(1,), (2, 3), (2, 1, 40), (65,)]


def layer(inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(inputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_outputs_and_gradients_are_those_of_the_plain_layer(
    rows: tuple[int, ...], sizes: tuple[int, int], bias: bool, gradients: bool
) -> None:
    plain, states = layer(*sizes, bias=bias), torch.randn(*rows, sizes[0], requires_grad=True)
    weights = torch.randn(*rows, sizes[1])

    def run() -> list[Tensor]:
        output = plain(states)
        return [output, *torch.autograd.grad((output * weights).sum(), [states])]

    expected = run()
    with prepacked_weights(plain, gradients=gradients):
        assert isinstance(vars(plain)["forward"], PrepackedLinear)
        torch.testing.assert_close(run(), expected)
        with torch.no_grad():
            torch.testing.assert_close(plain(states), expected[0].detach())


def test_bfloat16_is_off_by_its_own_rounding() -> None:
    plain = layer(300, 200, bias=True, dtype=torch.bfloat16)
    states = torch.randn(7, 300, dtype=torch.bfloat16)
    exact = states.double() @ plain.weight.double().t() + plain.bias.double()
    with prepacked_weights(plain):
        error = plain(states).double() - exact
    assert float(error.norm() / exact.norm()) < torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("make", [llama, phi])
@pytest.mark.parametrize("is_training", [True, False])
def test_a_models_losses_gradients_and_texts(make: Any, is_training: bool) -> None:
    model = get_peft_model(make(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train(is_training)
    ids = batch("left")["input_ids"][:1]

    def results() -> Any:
        return found(model, batch("left")), model.generate(ids, max_new_tokens=5, do_sample=False)

    expected = results()
    for gradients in (False, True):
        with model.prepacked_weights(gradients=gradients):
            torch.testing.assert_close(results(), expected)
            assert isinstance(vars(model.get_base_model().lm_head)["forward"], PrepackedLinear)


def test_the_model_shows_no_difference() -> None:
    base = llama().requires_grad_(False)
    before, modules = base.state_dict(), {name: {*vars(part)} for name, part in base.named_modules()}
    with prepacked_weights(base):
        within = base.state_dict()
        copied = copy.deepcopy(base)
        ids = torch.tensor([[1, 2, 3]])
        torch.testing.assert_close(copied(ids).logits, base(ids).logits)
        copied.lm_head.weight.zero_()
        assert not copied(ids).logits.any()  # which has weights of its own
        assert base(ids).logits.any()
    assert {name: tensor.data_ptr() for name, tensor in within.items()} == {
        name: tensor.data_ptr() for name, tensor in before.items()
    }
    assert {name: {*vars(part)} for name, part in base.named_modules()} == modules


@pytest.mark.parametrize(
    "change",
    [
        lambda base: base.lm_head.weight.mul_(2),
        lambda base: nn.init.zeros_(base.lm_head.weight),
        lambda base: base.load_state_dict({"lm_head.weight": torch.ones(50, 16)}, strict=False),
        lambda base: setattr(base.lm_head.weight, "data", 2 * base.lm_head.weight),
        lambda base: setattr(base.lm_head, "weight", nn.Parameter(2 * base.lm_head.weight, requires_grad=False)),
        lambda base: base.to(torch.bfloat16),
    ],
)
def test_weights_that_change_while_packed_are_refused(change: Any) -> None:
    base = llama().requires_grad_(False)
    with prepacked_weights(base):
        change(base)
        with pytest.raises(AdapterError, match="changed while prepacked: leave prepacked_weights"):
            base(torch.tensor([[1, 2, 3]]))
    base(torch.tensor([[1, 2, 3]]))


def test_layers_that_are_trained_meanwhile_are_plain() -> None:
    plain, states = layer(3, 5, bias=True), torch.randn(2, 3)
    with prepacked_weights(plain, gradients=True):
        plain.bias.requires_grad_()
        plain(states).sum().backward()
    assert plain.bias.grad.tolist() == [2.0] * 5


def test_autocast_and_graphs_are_as_without() -> None:
    plain, states = layer(3, 5, bias=True), torch.randn(2, 3)
    with prepacked_weights(plain):
        with torch.autocast("cpu", torch.bfloat16):
            assert plain(states).dtype is torch.bfloat16
        compiled = torch.compile(plain, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(states), plain(states))


def test_a_second_derivative_is_refused() -> None:
    plain, states = layer(3, 5, bias=True), torch.randn(2, 3, requires_grad=True)
    with prepacked_weights(plain, gradients=True):
        (first,) = torch.autograd.grad(plain(states).square().sum(), states, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_a_model_saved_in_the_block_is_the_plain_one(tmp_path: Path) -> None:
    base = llama().requires_grad_(False)
    ids = torch.tensor([[1, 2, 3]])
    with prepacked_weights(base):
        torch.save(base, tmp_path / "model")
    loaded = torch.load(tmp_path / "model", weights_only=False)
    torch.testing.assert_close(loaded(ids).logits, base(ids).logits)


def test_a_container_has_its_own_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CONTAINER", tmp_path)
    whole = module._free_memory()
    (tmp_path / "memory.current").write_text("1000\n")
    for most, free in (("max\n", None), ("3500\n", 2500)):
        (tmp_path / "memory.max").write_text(most)
        assert module._free_memory() == (pytest.approx(whole, rel=0.5) if free is None else free)


def test_what_another_library_has_put_there_meanwhile_stays() -> None:
    base = llama().requires_grad_(False)
    with prepacked_weights(base):
        base.lm_head.forward = other = base.lm_head.forward.__call__
    assert base.lm_head.forward is other
    assert "forward" not in vars(base.model.layers[0].mlp.up_proj)


def test_too_little_memory_is_said_and_nothing_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = llama().requires_grad_(False)
    needed = sum(part.weight.nbytes for part in base.modules() if isinstance(part, nn.Linear))
    monkeypatch.setattr(module, "CONTAINER", tmp_path)
    for available, gradients, fits in ((2 * needed, False, True), (2 * needed, True, False), (needed, False, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda size=available: type("", (), {"available": size}))
        expects = nullcontext() if fits else pytest.warns(UserWarning, match="prepacked weights would take .* left out")
        with expects, prepacked_weights(base, gradients=gradients):
            assert ("forward" in vars(base.lm_head)) is fits


def test_other_layers_stay_as_they_are() -> None:
    other = type("Quantised", (nn.Linear,), {})
    model = nn.ModuleDict(
        {
            "trained": nn.Linear(3, 3),
            "in_float16": layer(3, 3, bias=True, dtype=torch.float16),
            "in_float64": layer(3, 3, bias=True, dtype=torch.float64),
            "elsewhere": layer(3, 3, bias=True).to("meta"),
            "quantised": other(3, 3).requires_grad_(False),
            "hooked": layer(3, 3, bias=True),
        }
    )
    model["hooked"].forward = model["hooked"].forward
    before = {name: vars(part).get("forward") for name, part in model.items()}
    with prepacked_weights(model):
        assert {name: vars(part).get("forward") for name, part in model.items()} == before
    assert {name: vars(part).get("forward") for name, part in model.items()} == before
