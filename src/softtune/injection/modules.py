"""Trained changes at single modules: scaled outputs and inputs, added biases, replaced heads. The base model's tensors
stay.

An output is scaled first, then a bias is added; a head's copy replaces both. Each adapter of a batch may have its own.
Letters: R adapters, B rows, N features of an output or input.
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
Scalings = Sequence[tuple[BiasSlot, Tensor]]
"""Each factor by which an adapter scales a module's output or input: its slot, and the factor [width]."""


class ModuleChanges:
    """Hooks that apply the changes of a batch's adapters to the outputs and inputs of single modules.

    Args:
        backbone: the base model.
        biases: each of the R adapters' added biases.
        heads: each of the R adapters' trained copies of modules, by module name. They compute the output instead.
        rows: [B] index of each row's adapter; None where there is only one.
        scalings: each of the R adapters' factors.
    """

    def __init__(
        self,
        backbone: Backbone,
        biases: Sequence[Additions],
        heads: Sequence[Mapping[str, nn.Module]],
        rows: Tensor | None = None,
        *,
        scalings: Sequence[Scalings] = (),
    ) -> None:
        self._model = backbone.model
        self._hooks: dict[nn.Module, list[Any]] = {}
        self._input_hooks: dict[nn.Module, list[Any]] = {}
        self._is_applied = False
        of_outputs, of_inputs = ([[p for p in s if p[0].is_input is on] for s in scalings] for on in (False, True))
        scalers = _hooks_by_slot(backbone, of_outputs, rows, _output_scaler)
        adders = _hooks_by_slot(backbone, biases, rows, _adder)
        for name, hook in [*scalers, *adders, *_answers(heads, rows)]:
            hook = hook if rows is None or name in backbone.row_modules else partial(_refuse, name)
            self._hooks.setdefault(self._model.get_submodule(name), []).append(hook)
        for name, hook in _hooks_by_slot(backbone, of_inputs, rows, _input_scaler):
            hook = hook if rows is None or name in backbone.row_inputs else partial(_refuse, name)
            self._input_hooks.setdefault(self._model.get_submodule(name), []).append(hook)

    def reach(self, part: nn.Module) -> bool:
        """Whether a part of the model contains a changed module."""
        return any(module in self._hooks or module in self._input_hooks for module in part.modules())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the changes for the length of the block, and whenever a layer checkpointed in it is recomputed."""
        with self._inside(self._model), around_runs(self._model, self._again):
            yield

    @contextmanager
    def _again(self, layer: nn.Module) -> Iterator[None]:
        """Make a recomputed layer's changes in a model session, unless the whole model's are being made."""
        if self._is_applied:
            yield
            return
        with model_session(self._model), self._inside(layer):
            yield

    @contextmanager
    def _inside(self, part: nn.Module) -> Iterator[None]:
        """Make the changes in a part of the model for the length of the block."""
        with ExitStack() as stack:
            for module in part.modules() if self._hooks or self._input_hooks else ():
                for hook in self._hooks.get(module, ()):
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
                for hook in self._input_hooks.get(module, ()):
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            self._is_applied = True
            try:
                yield
            finally:
                self._is_applied = False


def _refuse(name: str, *_: Any) -> None:
    raise UnsupportedModelError(
        f"{name} does not compute row by row", "run rows of adapters that change it in batches of their own"
    )


def _hooks_by_slot(
    backbone: Backbone, adapters: Sequence[Sequence[tuple[BiasSlot, Tensor]]], rows: Tensor | None, make: Any
) -> list[tuple[str, Any]]:
    """Module names, and the hooks that ``make`` returns for each slot and each adapter's tensor there."""
    tensors: dict[str, list[Tensor | None]] = {}
    slots: dict[str, BiasSlot] = {}
    for number, pairs in enumerate(adapters):
        for slot, tensor in pairs:
            slots[slot.name] = slot
            tensors.setdefault(slot.name, [None] * len(adapters))[number] = tensor
    return [
        (
            slot.module,
            make(
                slot, tensors[name], rows, rows is not None and backbone.is_by_head(slot.module, is_input=slot.is_input)
            ),
        )
        for name, slot in slots.items()
    ]


def _adder(slot: BiasSlot, changes: Sequence[Tensor | None], rows: Tensor | None, is_by_head: bool) -> Any:
    def add(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        added = _spread(_stacked(changes, 0.0).to(output.dtype), 0.0, slot, module, output)
        return output + (added[0] if rows is None else _per_row(added, rows, output, is_by_head))

    return add


def _output_scaler(slot: BiasSlot, factors: Sequence[Tensor | None], rows: Tensor | None, is_by_head: bool) -> Any:
    def scale(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return _scaled(output, slot, factors, rows, is_by_head, module)

    return scale


def _input_scaler(slot: BiasSlot, factors: Sequence[Tensor | None], rows: Tensor | None, is_by_head: bool) -> Any:
    def scale(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_scaled(args[0], slot, factors, rows, is_by_head, module), *args[1:]), kwargs
        name, x = next(iter(kwargs.items()))
        return args, {**kwargs, name: _scaled(x, slot, factors, rows, is_by_head, module)}

    return scale


def _scaled(
    x: Tensor,
    slot: BiasSlot,
    factors: Sequence[Tensor | None],
    rows: Tensor | None,
    is_by_head: bool,
    module: nn.Module,
) -> Tensor:
    """``x`` times each row's factor, computed in the factors' precision and returned in that of ``x``."""
    factor = _spread(_stacked(factors, 1.0), 1.0, slot, module, x)
    return (x * (factor[0] if rows is None else _per_row(factor, rows, x, is_by_head))).to(x.dtype)


def _stacked(parts: Sequence[Tensor | None], neutral: float) -> Tensor:
    """[R, width] each adapter's tensor, or ``neutral`` where it has none."""
    some = next(part for part in parts if part is not None)
    return torch.stack([torch.full_like(some, neutral) if part is None else part for part in parts])


def _spread(stacked: Tensor, neutral: float, slot: BiasSlot, module: nn.Module, x: Tensor) -> Tensor:
    """[R, N, ...] tensors of a slot [R, width] by all features of ``x``, in whose dimension they are."""
    if (index := slot.index_on(stacked.device)) is not None:
        stacked = stacked.new_full((len(stacked), x.shape[-1]), neutral).index_copy(1, index, stacked)
    if isinstance(module, CHANNELS_FIRST):
        stacked = stacked.view(*stacked.shape, *[1] * (x.dim() - 2))
    return stacked


def _per_row(added: Tensor, rows: Tensor, output: Tensor, is_by_head: bool) -> Tensor:
    """[B, 1, ..., N] each row's addition or factor [N]. B·T tokens in one dimension count as B rows of T, one row of B
    tokens as B rows."""
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
