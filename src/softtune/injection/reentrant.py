"""Gradients through reentrant checkpointing, which only tracks a layer's tensor arguments.

Such a layer first runs without gradients. It runs again, with a backward pass of its own, when the gradient of its
output arrives. A tensor that reaches it other than as an argument must be a leaf of the graph, and its input must
require a gradient. So prompts go in as leaves, and an anchor at the layers' input passes on the gradients that the
leaves have accumulated: its backward runs after that of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softtune.backbone import Place
from softtune.methods.prompt import KeyValue


class Anchor:
    """Leaves in place of a prompt's tensors, whose gradients it passes back to them.

    Args:
        prefixes: each layer's prefix, with gradients.
        others: further tensors, with gradients.
    """

    def __init__(self, prefixes: Mapping[Place, KeyValue], others: Sequence[Tensor] = ()) -> None:
        self._tensors = [*(part for prefix in prefixes.values() for part in prefix), *others]
        self._leaves = [part.detach().requires_grad_(part.requires_grad) for part in self._tensors]
        self._by_id = {id(part): leaf for part, leaf in zip(self._tensors, self._leaves, strict=True)}
        self.prefixes = {place: KeyValue(*map(self.leaf, prefix)) for place, prefix in prefixes.items()}

    def leaf(self, tensor: Tensor) -> Tensor:
        """The leaf in place of one of the tensors."""
        return self._by_id[id(tensor)]

    def tie(self, states: Tensor) -> Tensor:
        """The layers' input [B, S, D], whose backward passes the leaves' gradients back."""
        tied: Tensor = _HandOn.apply(states, self._leaves, *self._tensors)  # type: ignore[no-untyped-call]  # torch has no types here
        return tied if tied.requires_grad else tied.requires_grad_()


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, leaves: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.leaves = leaves
        return states.view_as(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradients = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return gradient, None, *gradients
