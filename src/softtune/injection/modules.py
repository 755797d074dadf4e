"""Trained changes to the outputs of single modules: added biases and replaced heads. The base model's tensors stay.

Each adapter of a batch may have its own. Letters: R adapters, B rows, N features of an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from softtune.backbone import Backbone, around_runs, model_session
from softtune.backbone.roles import CHANNELS_FIRST, BiasSlot
from softtune.errors import UnsupportedModelError
from softtune.injection.rows import multiplied

Additions = Sequence[tuple[BiasSlot, Tensor]]
"""Each bias that an adapter adds to a module's output: its slot, and the added tensor [width]."""


class ModuleChanges:
    """Hooks that apply the changes of a batch's adapters to the outputs of single modules.

    Args:
        backbone: the base model.
        biases: each of the R adapters' added biases.
        heads: each of the R adapters' trained copies of modules, by module name. They compute the output instead.
        rows: [B] index of each row's adapter; None where there is only one.
    """

    def __init__(
        self,
        backbone: Backbone,
        biases: Sequence[Additions],
        heads: Sequence[Mapping[str, nn.Module]],
        rows: Tensor | None = None,
    ) -> None:
        self._model = backbone.model
        self._hooks: dict[nn.Module, list[Any]] = {}
        self._is_applied = False
        for name, hook in [*_adders(backbone, biases, rows), *_answers(heads, rows)]:
            hook = hook if rows is None or name in backbone.row_modules else partial(_refuse, name)
            self._hooks.setdefault(self._model.get_submodule(name), []).append(hook)

    def reach(self, part: nn.Module) -> bool:
        """Whether a part of the model contains a changed module."""
        return any(module in self._hooks for module in part.modules())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Change outputs for the length of the block, and whenever a layer checkpointed in it is recomputed."""
        with self._inside(self._model), around_runs(self._model, self._again):
            yield

    @contextmanager
    def _again(self, layer: nn.Module) -> Iterator[None]:
        """Change a recomputed layer's outputs in a model session, unless the whole model's are being changed."""
        if self._is_applied:
            yield
            return
        with model_session(self._model), self._inside(layer):
            yield

    @contextmanager
    def _inside(self, part: nn.Module) -> Iterator[None]:
        """Change the outputs of a part of the model for the length of the block."""
        with ExitStack() as stack:
            for module in part.modules() if self._hooks else ():
                for hook in self._hooks.get(module, ()):
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            self._is_applied = True
            try:
                yield
            finally:
                self._is_applied = False


def _refuse(name: str, *_: Any) -> None:
    raise UnsupportedModelError(
        f"{name} does not compute row by row", "run rows of adapters that change it in batches of their own"
    )


def _adders(backbone: Backbone, adapters: Sequence[Additions], rows: Tensor | None) -> list[tuple[str, Any]]:
    """Module names, and the hooks that add each adapter's biases to their outputs."""
    changes: dict[str, list[Tensor | None]] = {}
    slots: dict[str, BiasSlot] = {}
    for number, additions in enumerate(adapters):
        for slot, change in additions:
            slots[slot.name] = slot
            changes.setdefault(slot.name, [None] * len(adapters))[number] = change
    by_head = {slot.module: rows is not None and backbone.is_by_head(slot.module) for slot in slots.values()}
    return [(slot.module, _adder(slot, changes[name], rows, by_head[slot.module])) for name, slot in slots.items()]


def _adder(slot: BiasSlot, changes: Sequence[Tensor | None], rows: Tensor | None, is_by_head: bool) -> Any:
    some = next(change for change in changes if change is not None)

    def add(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        added = torch.stack([torch.zeros_like(some) if c is None else c for c in changes]).to(output.dtype)
        if (index := slot.index_on(added.device)) is not None:
            added = added.new_zeros(len(added), output.shape[-1]).index_copy(1, index, added)
        if isinstance(module, CHANNELS_FIRST):
            added = added.view(*added.shape, *[1] * (output.dim() - 2))
        return output + (added[0] if rows is None else _per_row(added, rows, output, is_by_head))

    return add


def _per_row(added: Tensor, rows: Tensor, output: Tensor, is_by_head: bool) -> Tensor:
    """[B, 1, ..., N] each row's addition [N]. An output of B·T tokens in one dimension counts as B rows of T, and one
    row of B tokens as B rows."""
    if len(output) == 1 and output.shape[1 + is_by_head] == len(rows):
        return added[rows].view(1, *[1] * is_by_head, len(rows), *[1] * (output.dim() - 3 - is_by_head), -1)
    return added[multiplied(rows, len(output))].view(len(output), *[1] * (output.dim() - 2), -1)


def _answers(adapters: Sequence[Mapping[str, nn.Module]], rows: Tensor | None) -> list[tuple[str, Any]]:
    """Module names, and the hooks that replace the outputs for each adapter's rows by those of its copies."""
    names = {name: [copies.get(name) for copies in adapters] for heads in adapters for name in heads}
    return [(name, _answer(copies, rows)) for name, copies in names.items()]


def _answer(copies: Sequence[nn.Module | None], rows: Tensor | None) -> Any:
    def answer(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        for number, copy in enumerate(copies):
            if copy is not None:
                if not isinstance(output, Tensor):
                    raise UnsupportedModelError(
                        f"modules_to_save: {type(module).__name__} returns more than one tensor, name one inside it"
                    )
                replaced = _in_fp32(copy, args, kwargs).to(output.dtype)
                output = (
                    replaced if rows is None else _choose(multiplied(rows, len(output)) == number, replaced, output)
                )
        return output

    return answer


def _in_fp32(head: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """The output of a trained head, which stays in float32 beside a base model in half precision."""

    def raised(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    output: Tensor = head(*map(raised, args), **{name: raised(x) for name, x in kwargs.items()})
    return output


def _choose(is_replaced: Tensor, replaced: Tensor, output: Tensor) -> Tensor:
    return torch.where(is_replaced.to(output.device).view(-1, *[1] * (output.dim() - 1)), replaced, output)
