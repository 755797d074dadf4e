"""Quantised linear layers: which they are, whether they have a gradient, and bitsandbytes' packing of 4-bit weights.

A layer is recognized by its attributes, so that no quantisation package is imported. bitsandbytes packs a 4-bit layer's
weights for inference when it first runs in evaluation mode on a CPU with AVX512-BF16. Packed weights have no backward,
their scales are rounded to bf16, and nothing restores them exactly. Knows nothing about adapters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

PACKS, IS_PACKED = "support_avx512bf16_for_cpu", "packing_format_for_cpu"
"""bitsandbytes' attribute of a 4-bit layer that is to be packed, and that of the state of packed weights."""

_UNPACKED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""The 4-bit layers that are kept from being packed, with the number of blocks that keep them."""
_LOCK = Lock()


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from packing a model's 4-bit weights for the length of the block, which may overlap with
    others."""
    with _LOCK:
        layers = [m for m in model.modules() if vars(m).get(PACKS) or m in _UNPACKED]
        for layer in layers:
            _UNPACKED[layer] = _UNPACKED.get(layer, 0) + 1
            setattr(layer, PACKS, False)
    try:
        yield
    finally:
        with _LOCK:
            for layer in layers:
                _UNPACKED[layer] -= 1
                if not _UNPACKED[layer]:
                    del _UNPACKED[layer]
                    setattr(layer, PACKS, True)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """A model's quantised linear layers by name, without the layers of PEFT around them."""
    return {n: m for n, m in model.named_modules() if is_quantized(m) and not [*m.children()]}


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weights are stored in another form than a plain tensor of floats.

    bitsandbytes and torchao have their own classes of tensors, GPTQ, AWQ and HQQ their own names for them.
    """
    weight: Any = getattr(module, "weight", None)
    if not isinstance(getattr(module, "out_features", None), int):
        return False
    if not isinstance(weight, Tensor):
        return any(True for _ in _tensors(module))
    return weight.dtype.itemsize == 1 or not type(weight).__module__.startswith("torch.")


def is_packed(layer: nn.Module) -> bool:
    """Whether bitsandbytes has packed a layer's weights for inference."""
    return bool(getattr(getattr(getattr(layer, "weight", None), "quant_state", None), IS_PACKED, False))


def has_backward(layer: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a gradient at the output of a quantised layer reaches its input.

    Args:
        layer: the layer, whose weights are not packed.
        dtype: the dtype of its input.
        device: where its input is, if all its tensors are offloaded.
    """
    device = next((tensor.device for tensor in _tensors(layer) if not tensor.is_meta), device)
    states = torch.linspace(-1, 1, layer.in_features, dtype=dtype, device=device)
    states = torch.stack([states, torch.zeros_like(states)]).requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, where a kernel has no backward
        output = layer.forward(states)  # not the layer itself, whose hooks would see one more call
        if not output.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(output.sum(), states, allow_unused=True)
    is_constant = torch.equal(output[0], output[1])
    return is_constant or (gradient is not None and bool(gradient.any()))


def plain_parts(tensor: Tensor) -> list[tuple[Tensor, str]]:
    """The plain tensors of which a tensor is made, each as an attribute of another: ``data`` of most, and several of a
    class of its own that implements torch's ``__tensor_flatten__``, as torchao's do."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [(tensor, "data")]
    names = tensor.__tensor_flatten__()[0]
    parts = [(name, getattr(tensor, name)) for name in names]
    nested = {name: plain_parts(part) for name, part in parts if hasattr(part, "__tensor_flatten__")}
    return [leaf for name in names for leaf in nested.get(name, [(tensor, name)])]


def num_weights(parameter: Tensor) -> int:
    """The number of weights in a parameter, of which bitsandbytes stores two in a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
    return math.prod(shape)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))
