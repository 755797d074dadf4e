"""Base models with quantised weights, by the packages that quantise them, and the same with the weights dequantised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.tiny import WORDS, tokenizer


def save_base(folder: Path) -> str:
    """Save a tiny Llama with biases, whose sizes all kernels take, and its tokenizer."""
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"vocab_size": len(WORDS) + 3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "attention_bias": True, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(**size, **special, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer(ends=False).save_pretrained(folder)
    return str(folder)


def is_linear(name: str, module: nn.Module) -> bool:
    """Whether a module is a linear layer below the head."""
    return isinstance(module, nn.Linear) and name != "lm_head"


def load(folder: str, config: Any = None) -> PreTrainedModel:
    """Load the model of a folder, quantised by a config of transformers."""
    more = {} if config is None else {"quantization_config": config, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def _bnb(folder: str, **options: Any) -> PreTrainedModel:
    from transformers import BitsAndBytesConfig

    return load(folder, BitsAndBytesConfig(**options))


def _torchao(folder: str, name: str = "Int8WeightOnlyConfig") -> PreTrainedModel:
    from torchao import quantization

    model = load(folder)
    quantization.quantize_(model, getattr(quantization, name)(), filter_fn=lambda m, n: is_linear(n, m))
    return model


def _hqq(folder: str) -> PreTrainedModel:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return with_layers(
        load(folder), lambda layer: HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"), is_linear
    )


def with_layers(
    model: PreTrainedModel, new: Callable[[Any], nn.Module], which: Callable[[str, nn.Module], bool]
) -> PreTrainedModel:
    """Replace those modules of a model that ``which`` picks by their names and themselves."""
    for name, layer in [*model.named_modules()]:
        if which(name, layer):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new(layer))
    return model.eval()


def _bnb_4bit_weight(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _bnb_8bit_weight(layer: Any) -> Tensor:
    numbers, scales = (getattr(layer.weight, n) if layer.state.CB is None else getattr(layer.state, n) for n in SCALED)
    return numbers.float() * (scales[:, None] / 127)


SCALED = ("CB", "SCB")
"""Where bitsandbytes keeps the numbers of 8 bits, and the scale of each row."""


@dataclass(frozen=True)
class Quantisation:
    """A way to quantise a base model."""

    package: str
    load: Callable[[str], PreTrainedModel]
    """Loads the model of a folder with quantised layers."""
    layer: str
    """The class of quantised layers."""
    weight: Callable[[Any], Tensor]
    """Dequantises a layer's weight [out, in]."""

    @property
    def missing(self) -> bool:
        return find_spec(self.package) is None

    def dequantised(self, folder: str) -> PreTrainedModel:
        """The model with plain layers of the dequantised weights."""

        def plain(layer: Any) -> nn.Module:
            weight = self.weight(layer).detach().float()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
            linear.weight.data = weight
            if layer.bias is not None:
                linear.bias.data = layer.bias.detach().clone()
            return linear

        return with_layers(
            self.load(folder), plain, lambda n, m: type(m).__name__ == self.layer and n != "lm_head"
        ).requires_grad_(False)


QUANTISATIONS = {
    "bnb-4bit": Quantisation("bitsandbytes", lambda f: _bnb(f, load_in_4bit=True), "Linear4bit", _bnb_4bit_weight),
    "bnb-4bit-nested": Quantisation(
        "bitsandbytes",
        lambda f: _bnb(f, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "Linear4bit",
        _bnb_4bit_weight,
    ),
    "bnb-8bit": Quantisation("bitsandbytes", lambda f: _bnb(f, load_in_8bit=True), "Linear8bitLt", _bnb_8bit_weight),
    "torchao-int8": Quantisation("torchao", _torchao, "Linear", lambda layer: layer.weight.dequantize()),
    "hqq-4bit": Quantisation("hqq", _hqq, "HQQLinear", lambda layer: layer.dequantize()),
}


def without_backward(folder: str) -> PreTrainedModel:
    """The model with int8 weights and activations of torchao, whose product has no backward."""
    return _torchao(folder, "Int8DynamicActivationInt8WeightConfig")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a base model, those of quantised layers by their parts."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "__tensor_flatten__"):
            found |= {f"{name}.{part}": getattr(value, part).clone() for part in value.__tensor_flatten__()[0]}
        elif isinstance(value, Tensor):
            found[name] = value.clone()
    return found
