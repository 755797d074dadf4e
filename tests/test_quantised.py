"""Adapters on base models with quantised weights, beside the same models with the weights dequantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import softtune.serving.bases
from softtune import PeftModel, UnsupportedModelError, get_peft_model
from softtune.backbone import Backbone, evaluating, model_session
from softtune.backbone.quantization import has_backward, unpacked
from softtune.compat import enable_checkpointing
from softtune.methods import PeftConfig
from tests.families import CAUSAL_LM, METHODS, batch, scramble, trained
from tests.quantised import (
    QUANTISATIONS,
    Quantisation,
    is_linear,
    load,
    save_base,
    tensors_of,
    with_layers,
    without_backward,
)
from tests.serving.test_http import complete, serving

ADAPTERS = ("prefix", "prompt", "p_tuning_mlp", "p_tuning_lstm", "p_tuning_v2", "bitfit_added")
TOLERANCE = 5e-5
"""Of the distance of all gradients from those through dequantised weights, relative to their length. It is rounding in
fp32: 0 in 4 bits of bitsandbytes and HQQ, 2.3e-6 in 8 bits of bitsandbytes, 1.2e-5 at most with torchao."""
Q_PROJ = "model.layers.0.self_attn.q_proj"
ROWS = [torch.tensor(row) for row in ([5, 9, 7, 4, 12, 8], [6, 3, 11], [10, 4, 8, 13])]

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=QUANTISATIONS)
def quantisation(request: pytest.FixtureRequest) -> Quantisation:
    found = QUANTISATIONS[request.param]
    if found.missing:
        pytest.skip(f"{found.package} is not installed: make test-quant")
    return found


def config(method: str) -> PeftConfig:
    return METHODS[method](task_type=CAUSAL_LM)


def inputs() -> dict[str, Tensor]:
    found = batch(ROWS, side="left")
    return {**found, "labels": found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)}


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs()).loss.backward()
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("method", ADAPTERS)
def test_gradients_are_those_of_dequantised_weights(quantisation: Quantisation, method: str, folder: str) -> None:
    models = [quantisation.load(folder), quantisation.dequantised(folder)]
    found, expected = (gradients(scramble(get_peft_model(m, config(method))).train()) for m in models)
    assert found.keys() == expected.keys()
    whole = [torch.cat([x.flatten() for x in each.values()]) for each in (found, expected)]
    assert whole[1].norm() > 0
    assert distance(*whole) < TOLERANCE


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(quantisation: Quantisation, folder: str, is_reentrant: bool) -> None:
    base = quantisation.load(folder)
    before, model = tensors_of(base), scramble(get_peft_model(base, config("prefix"))).train()
    expected = gradients(model)
    enable_checkpointing(model, use_reentrant=is_reentrant)
    found = gradients(model)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    after = tensors_of(base)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def learn(model: PeftModel, steps: int) -> list[float]:
    """Losses of some steps in training mode."""
    optimizer = torch.optim.AdamW(trained(model.train()).values(), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(**inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def evaluate(model: PeftModel) -> Tensor:
    """Logits in evaluation mode, after a generation with the adapter and a forward without."""
    found = {name: value for name, value in inputs().items() if name != "labels"}
    model.eval()
    with torch.no_grad():
        model.generate(**found, max_new_tokens=3, do_sample=False)
        with model.disable_adapter():
            model(**found)
        return model(**found).logits


@pytest.mark.parametrize("method", ADAPTERS)
def test_training_goes_on_after_an_evaluation(quantisation: Quantisation, method: str, folder: str) -> None:
    base = quantisation.load(folder)
    before = tensors_of(base)
    model, beside = (scramble(get_peft_model(b, config(method))) for b in (base, quantisation.load(folder)))
    evaluate(model)
    losses = learn(model, 3)
    evaluate(model)
    losses += learn(model, 3)
    assert losses == learn(beside, 3) + learn(beside, 3)
    assert losses[-1] < losses[0]
    after = tensors_of(base)
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_saved_adapter_has_the_same_logits(
    quantisation: Quantisation, method: str, folder: str, tmp_path: Path
) -> None:
    model = scramble(get_peft_model(quantisation.load(folder), config(method)))
    learn(model, 1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantisation.load(folder), tmp_path)
    # An LSTM's prompt is computed in another order than it is read.
    torch.testing.assert_close(evaluate(again), evaluate(model), rtol=0, atol=1e-5 if "lstm" in method else 0)


def test_a_server_generates_the_same(
    quantisation: Quantisation, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_base, texts = softtune.serving.bases.load_base_model, ["the sky is", "red good"]
    monkeypatch.setattr(
        softtune.serving.bases, "load_base_model", lambda *a, **k: (quantisation.load(folder), load_base(*a, **k)[1])
    )
    tokenizer = load_base(folder, CAUSAL_LM)[1]
    expected = {}
    for seed, method in enumerate(ADAPTERS):
        model = scramble(get_peft_model(quantisation.load(folder), config(method)), seed).eval()
        model.save_pretrained(tmp_path / method)
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            expected[method, text] = tokenizer.decode(written, skip_special_tokens=True)
    with serving(folder, tmp_path) as client:
        found = {
            (method, text): complete(client, model=method, prompt=text, max_tokens=8).json()["choices"][0]["text"]
            for method, text in expected
        }
    assert found == expected


def test_bitfit_sees_the_widths_of_all_layers(quantisation: Quantisation, folder: str) -> None:
    slots = [Backbone.of(m).bias_slots() for m in (quantisation.load(folder), quantisation.dequantised(folder))]
    found, expected = ([(s.name, s.role, s.width, s.has_bias) for s in each] for each in slots)
    assert found == expected


def test_parameters_of_4_bits_are_counted_as_peft_does(folder: str) -> None:
    pytest.importorskip("bitsandbytes", reason="make test-quant")
    quantisation = QUANTISATIONS["bnb-4bit"]
    counts = [
        get_peft_model(m, config("prefix")).get_nb_trainable_parameters()
        for m in (quantisation.load(folder), quantisation.dequantised(folder))
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", [*ADAPTERS, "prompt_suffix", "bitfit"])
def test_training_on_int8_activations_is_refused(method: str, folder: str) -> None:
    pytest.importorskip("torchao", reason="make test-quant")
    model = get_peft_model(without_backward(folder), config(method)).train()
    with pytest.raises(
        UnsupportedModelError, match=r"no gradient passes through .*q_proj and 13 more layers: .*no_grad"
    ):
        model(**inputs())
    evaluate(model)  # nothing is trained


def test_training_on_packed_weights_is_refused(folder: str) -> None:
    pytest.importorskip("bitsandbytes", reason="make test-quant")
    base = QUANTISATIONS["bnb-4bit"].load(folder)
    if not base.model.layers[0].self_attn.q_proj.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights on a CPU with AVX512-BF16 alone")
    model = get_peft_model(base, config("prompt"))
    learn(model, 1)
    with torch.no_grad():
        base.eval()(**inputs())  # by the caller, not by softtune
    evaluate(model)
    with pytest.raises(UnsupportedModelError, match=r"packed the weights of .*q_proj and 13 more layers .*: load"):
        learn(model, 1)


class Packing(nn.Linear):
    """A layer that packs its weight as bitsandbytes' does on a CPU with AVX512-BF16, after which it has no backward."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.requires_grad_(False)
        self.support_avx512bf16_for_cpu = True
        self.is_packed = False

    def forward(self, x: Tensor) -> Tensor:
        self.is_packed |= self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad
        output = super().forward(x)
        return output.detach() if self.is_packed else output


class Named(nn.Module):
    """A layer without a weight: GPTQ's and AWQ's have words of 32 bits instead, [in / 8, out] or [in, out / 8]."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", torch.zeros(layer.in_features // 8, layer.out_features, dtype=torch.int32))
        self.bias = layer.bias
        self.plain = [layer]  # no submodule

    def forward(self, x: Tensor) -> Tensor:
        return self.plain[0](x)


@pytest.mark.parametrize("method", ADAPTERS)
def test_nothing_is_packed_while_softtune_runs_the_model(method: str, folder: str) -> None:
    base = with_layers(load(folder), Packing, is_linear)
    layers = [m for m in base.modules() if isinstance(m, Packing)]
    model, plain = (scramble(get_peft_model(b, config(method))) for b in (base, load(folder)))
    losses = learn(model, 2)
    evaluate(model)
    assert losses + learn(model, 2) == learn(plain, 2) + learn(plain, 2)
    assert not any(layer.is_packed for layer in layers)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)


def test_blocks_that_keep_weights_unpacked_overlap(folder: str) -> None:
    base = with_layers(load(folder), Packing, is_linear)
    layer = base.get_submodule(Q_PROJ)
    first, second = model_session(base), unpacked(base.model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not layer.support_avx512bf16_for_cpu
    second.__exit__(None, None, None)
    assert layer.support_avx512bf16_for_cpu
    with evaluating(base.model):
        assert not layer.support_avx512bf16_for_cpu
    layer.support_avx512bf16_for_cpu = False
    with unpacked(base):
        pass
    assert not layer.support_avx512bf16_for_cpu


def test_bitfit_sees_the_width_of_a_layer_without_a_weight(folder: str) -> None:
    base, plain = with_layers(load(folder), Named, is_linear), load(folder)
    found, expected = (scramble(get_peft_model(b, config("bitfit_added"))).train() for b in (base, plain))
    assert torch.equal(evaluate(found), evaluate(expected))
    assert len(trained(found)) == 2 * 7 + 5
    assert learn(found, 2) == learn(expected, 2)


class Detaching(Named):
    """A kernel without a backward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Zeroing(Named):
    """A kernel whose backward returns zeros."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output.detach() + 0 * output


@pytest.mark.parametrize("kind", [Detaching, Zeroing])
def test_one_layer_without_a_backward_is_named(kind: type[Named], folder: str) -> None:
    base = with_layers(load(folder), kind, lambda name, _: name == Q_PROJ)
    model = get_peft_model(base, config("prefix"))
    with pytest.raises(UnsupportedModelError, match=rf"no gradient passes through the quantised weights of {Q_PROJ}: "):
        model.train()(**inputs())
    with pytest.raises(UnsupportedModelError, match="no gradient"):
        model.eval()(**inputs())
    evaluate(model)
    loaded = get_peft_model(base, METHODS["prefix"](task_type=CAUSAL_LM, inference_mode=True))
    loaded(**inputs())


def test_a_layer_of_zeros_is_not_said_to_have_no_backward() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.data.zero_()
    assert has_backward(layer, torch.float32, torch.device("cpu"))
