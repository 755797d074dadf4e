"""Computes a frozen model's linear layers from copies of their weights in the layout of the CPU's kernels.

A product of few tokens spends most of its time on rearranging the weights, which never change here. So they are
rearranged once (torch's compiler calls such weights prepacked), and the copies used while a block lasts. The model's
own tensors stay as they are.

Letters: N inputs and M outputs of a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softtune.backbone.session import model_session
from softtune.errors import AdapterError
from softtune.formatting import in_units

SHARE = 0.5
"""How much of the free memory the copies may take."""
CONTAINER = Path("/sys/fs/cgroup")
"""Where Linux says how much memory a container may take."""


@contextmanager
def prepacked_weights(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Compute a model's frozen linear layers from prepacked copies of their weights within the block.

    Those on other devices, of other packages, and with weights that are trained stay as they are. Warns, and copies
    none, where the copies would take more than half of the memory that is free.

    Args:
        model: the model.
        gradients: copy the weights for the backward pass too, which takes as much memory again.
    """
    dtypes, frozen = _dtypes(), filter(is_frozen_linear, model.modules())
    layers = [layer for layer in frozen if layer.weight.dtype in dtypes and "forward" not in vars(layer)]
    needed = sum(layer.weight.nbytes for layer in layers) * (2 if gradients else 1)
    if needed > SHARE * _free_memory():
        warnings.warn(
            f"prepacked weights would take {in_units(needed)}, more than half of the free memory: they are left out",
            stacklevel=3,
        )
        layers = []
    forwards = [(layer, PrepackedLinear(layer, gradients=gradients)) for layer in layers]
    with model_session(model):  # no call is half way through
        for layer, forward in forwards:
            layer.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        with model_session(model):
            for layer, forward in forwards:
                if vars(layer).get("forward") is forward:
                    del layer.forward


def is_frozen_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a module is torch's linear layer, with plain weights on the CPU that are not trained."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    return module.weight.device.type == "cpu" and not any(p.requires_grad for p in module.parameters())


class PrepackedLinear:
    """The forward of one linear layer. Copied and pickled, it is the plain one.

    Args:
        layer: the layer.
        gradients: whether to copy the weights for the backward pass too.
    """

    def __init__(self, layer: nn.Linear, *, gradients: bool) -> None:
        self.layer = layer
        self.prepacked = _prepacked(layer.weight)
        self.backward = _prepacked(layer.weight.t().contiguous()) if gradients else None
        self.state = _state(layer.weight)

    def __call__(self, states: Tensor) -> Tensor:
        """[..., M] the output for states [..., N].

        Raises:
            AdapterError: the weights have changed since they were copied.
        """
        layer = self.layer
        if torch.compiler.is_compiling():
            return F.linear(states, layer.weight, layer.bias)
        if _state(layer.weight) != self.state:
            raise AdapterError("weights of the base model changed while prepacked", "leave prepacked_weights() before")
        is_trained = any(p.requires_grad for p in layer.parameters())
        if is_trained or states.dtype is not layer.weight.dtype or torch.is_autocast_enabled("cpu"):
            return F.linear(states, layer.weight, layer.bias)
        if not (torch.is_grad_enabled() and states.requires_grad):
            return _product(states, self.prepacked, layer.bias)
        output: Tensor = _PrepackedProduct.apply(states, self)  # type: ignore[no-untyped-call]
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_forward, (self.layer,)


def _plain_forward(layer: nn.Linear) -> Any:
    return nn.Linear.forward.__get__(layer)


class _PrepackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(states: Tensor, linear: PrepackedLinear) -> Tensor:
        return _product(states, linear.prepacked, linear.layer.bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, PrepackedLinear], output: Tensor) -> None:
        ctx.linear = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        prepacked, weight = ctx.linear.backward, ctx.linear.layer.weight
        return gradient @ weight if prepacked is None else _product(gradient, prepacked, None), None


def _dtypes() -> tuple[torch.dtype, ...]:
    """The types that oneDNN has kernels for on this processor."""
    if not torch.backends.mkldnn.is_available():
        return ()
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bfloat16 else (torch.float32,)


def _prepacked(weight: Tensor) -> Tensor:
    """A copy of weights [M, N] in the layout of oneDNN's kernels, for any number of tokens."""
    prepacked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return prepacked


def _product(states: Tensor, prepacked: Tensor, bias: Tensor | None) -> Tensor:
    """[..., M] states [..., N] times prepacked weights, and a bias [M] added."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(states, prepacked, bias, "none", [], "")
    return output


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """What every change of a tensor changes, but for those in place by way of ``tensor.data``."""
    version = None if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr(), tensor.dtype


def _free_memory() -> float:
    """Bytes of memory that this machine, and the container that this process is in, have left."""
    free = float(psutil.virtual_memory().available)
    try:
        most, used = ((CONTAINER / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    return free if most == "max" else min(free, float(most) - float(used))
