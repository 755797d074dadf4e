"""Computes a frozen model's linear layers from copies of their weights in the layout of the CPU's kernels.

A product of few tokens spends most of its time on rearranging the weights, which never change here. So they are
rearranged once (oneDNN's blocked layouts), and the copies used while a block lasts. The model's own tensors stay as
they are: what looks at them, saves or copies them sees no difference.

Letters: N inputs and M outputs of a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softtune.errors import AdapterError
from softtune.formatting import in_units

SHARE = 0.5
"""How much of the free memory the copies may take."""


@contextmanager
def packed_weights(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Compute a model's frozen linear layers from packed copies of their weights within the block.

    Those on other devices, of other packages, and with weights that are trained stay as they are. Warns, and packs
    none, where the copies would take more than half of the memory that is free.

    Args:
        model: the model.
        gradients: pack the weights for the backward pass too, which takes as much memory again.
    """
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    needed = sum(layer.weight.nbytes for layer in layers) * (2 if gradients else 1)
    if needed > SHARE * psutil.virtual_memory().available:
        warnings.warn(
            f"packed weights would take {in_units(needed)}, more than half of the free memory: they are not packed",
            stacklevel=3,
        )
        layers = []
    for layer in layers:
        layer.forward = PackedLinear(layer, gradients=gradients)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer with frozen weights on the CPU, which nothing else has changed."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or type(layer.weight) is not nn.Parameter:
        return False
    if layer.weight.device.type != "cpu" or layer.weight.dtype not in _dtypes():
        return False
    return not any(p.requires_grad for p in layer.parameters())


def _dtypes() -> tuple[torch.dtype, ...]:
    """The types that oneDNN has kernels for on this processor."""
    if not torch.backends.mkldnn.is_available():
        return ()
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bfloat16 else (torch.float32,)


def _packed(weight: Tensor) -> Tensor:
    """A copy of weights [M, N] in the layout of oneDNN's kernels, for any number of tokens."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def _product(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """[..., M] states [..., N] times packed weights, and a bias [M] added."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    return output


class PackedLinear:
    """The forward of one linear layer.

    Args:
        layer: the layer.
        gradients: whether to pack the weights for the backward pass too.
    """

    def __init__(self, layer: nn.Linear, *, gradients: bool) -> None:
        self.layer = layer
        self.packed = _packed(layer.weight)
        self.backward = _packed(layer.weight.t().contiguous()) if gradients else None
        self.weight, self.version = layer.weight, _version(layer.weight)

    def __call__(self, states: Tensor) -> Tensor:
        """[..., M] the output for states [..., N].

        Raises:
            AdapterError: the weights have changed since they were packed.
        """
        layer = self.layer
        if layer.weight is not self.weight or _version(self.weight) != self.version:
            raise AdapterError("weights of the base model changed while packed", "leave packed_weights() before")
        if states.dtype is not self.weight.dtype or torch.compiler.is_compiling():
            return F.linear(states, layer.weight, layer.bias)
        if not (torch.is_grad_enabled() and states.requires_grad):
            return _product(states, self.packed, layer.bias)
        output: Tensor = _PackedProduct.apply(states, self)  # type: ignore[no-untyped-call]
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied layer has its class's forward."""
        return nn.Linear.forward.__get__(memo[id(self.layer)])


def _version(tensor: Tensor) -> int:
    """A number that every change of a tensor in place raises."""
    return tensor._version


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(states: Tensor, linear: PackedLinear) -> Tensor:
        return _product(states, linear.packed, linear.layer.bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, PackedLinear], output: Tensor) -> None:
        ctx.linear = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packed = ctx.linear.backward
        return gradient @ ctx.linear.weight if packed is None else _product(gradient, packed, None), None
