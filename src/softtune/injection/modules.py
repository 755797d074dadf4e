"""Trained changes at the outputs of single modules: biases added, heads replaced. The base model's tensors stay.

Each adapter of a batch may have its own. Letters: R adapters, B rows, N features of an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from softtune.backbone.roles import BiasSlot
from softtune.errors import UnsupportedModelError
from softtune.injection.rows import multiplied

Additions = Sequence[tuple[BiasSlot, Tensor]]
"""Every place where an adapter adds to an output, and what [width] it adds there."""


def add_biases(model: nn.Module, adapters: Sequence[Additions], rows: Tensor | None = None) -> list[RemovableHandle]:
    """Add each adapter's changes to the outputs of its rows until the handles are removed.

    The handles outlive a forward, since gradient checkpointing runs the layers again during the backward pass.

    Args:
        model: the base model.
        adapters: R of them.
        rows: [B] which adapter each row has; None where there is only one.
    """
    changes: dict[str, list[Tensor | None]] = {}
    slots: dict[str, BiasSlot] = {}
    for number, additions in enumerate(adapters):
        for slot, change in additions:
            slots[slot.name] = slot
            changes.setdefault(slot.name, [None] * len(adapters))[number] = change
    return [
        model.get_submodule(slot.module).register_forward_hook(_adder(slot, changes[name], rows))
        for name, slot in slots.items()
    ]


def _adder(slot: BiasSlot, changes: Sequence[Tensor | None], rows: Tensor | None) -> Any:
    some = next(change for change in changes if change is not None)

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        added = torch.stack([torch.zeros_like(some) if c is None else c for c in changes]).to(output.dtype)
        if slot.index is not None:
            index = slot.index.to(added.device)
            added = added.new_zeros(len(added), output.shape[-1]).index_copy(1, index, added)
        return output + (added[0] if rows is None else _per_row(added, rows, output, args, slot))

    return add


def _per_row(added: Tensor, rows: Tensor, output: Tensor, args: Any, slot: BiasSlot) -> Tensor:
    """[B, 1, ..., N] each row's addition [N]; an output of B·T tokens in one dimension counts as B rows of T."""
    if isinstance(args[0], nn.Parameter) or len(output) % len(rows):
        raise UnsupportedModelError(
            f"{slot.module} computes one thing for all rows: run rows with BitFit adapters in batches of their own"
        )
    return added[multiplied(rows, len(output))].view(len(output), *[1] * (output.dim() - 2), -1)


def replace_modules(
    model: nn.Module, adapters: Sequence[Mapping[str, nn.Module]], rows: Tensor | None = None
) -> list[RemovableHandle]:
    """Let each adapter's copies answer for its rows, in place of the modules of these names, until the handles are
    removed.

    Args:
        model: the base model.
        adapters: R times the copies, by the names of the modules.
        rows: [B] which adapter each row has; None where there is only one.
    """

    def answer(copies: Sequence[nn.Module | None]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            for number, copy in enumerate(copies):
                if copy is not None:
                    if not isinstance(output, Tensor):
                        raise UnsupportedModelError(
                            f"modules_to_save: {type(module).__name__} returns more than one tensor, name one inside it"
                        )
                    own = _in_fp32(copy, args, kwargs).to(output.dtype)
                    output = own if rows is None else _choose(multiplied(rows, len(output)) == number, own, output)
            return output

        return hook

    names = {name: [copies.get(name) for copies in adapters] for own in adapters for name in own}
    return [model.get_submodule(n).register_forward_hook(answer(c), with_kwargs=True) for n, c in names.items()]


def _in_fp32(head: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """The output of a trained head, which stays in full precision beside a base model of half."""

    def raised(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    output: Tensor = head(*map(raised, args), **{name: raised(x) for name, x in kwargs.items()})
    return output


def _choose(mine: Tensor, own: Tensor, output: Tensor) -> Tensor:
    return torch.where(mine.to(output.device).view(-1, *[1] * (output.dim() - 1)), own, output)
