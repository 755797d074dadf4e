"""Trained changes at the outputs of single modules: biases added, heads replaced. The base model's tensors stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softtune.backbone.roles import BiasSlot


def add_biases(model: nn.Module, additions: Iterable[tuple[BiasSlot, Tensor]]) -> list[RemovableHandle]:
    """Add each change [width] to the output of its module until its handle is removed.

    The handles outlive a forward, since gradient checkpointing runs the layers again during the backward pass.
    """
    return [model.get_submodule(slot.module).register_forward_hook(_adder(slot, change)) for slot, change in additions]


def _adder(slot: BiasSlot, change: Tensor) -> Any:
    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        addition = change.to(output.dtype)
        if slot.index is not None:
            addition = addition.new_zeros(output.shape[-1]).index_copy(0, slot.index.to(addition.device), addition)
        return output + addition

    return add


def replace_modules(model: nn.Module, copies: Mapping[str, nn.Module]) -> list[RemovableHandle]:
    """Let trained copies answer in place of the modules of these names until their handles are removed."""

    def answer(copy: nn.Module) -> Any:
        return lambda module, args, kwargs, output: copy(*args, **kwargs)

    return [model.get_submodule(n).register_forward_hook(answer(c), with_kwargs=True) for n, c in copies.items()]
