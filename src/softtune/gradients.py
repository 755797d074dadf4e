"""Warns after the first backward pass about trained tensors whose gradient is missing or all zeros.

A quantised layer without a backward, a detached input or a renamed argument disconnects an adapter without an error,
and its training then changes nothing. Knows nothing about methods.

Internal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, register_multi_grad_hook
from torch.utils.hooks import unserializable_hook

CAUSES = (
    "a quantised layer that has no backward, tensors that were detached, or a base model that the adapter does not "
    "reach: run softtune check"
)


MOST_EVALUATIONS = 32
"""Forwards in evaluation mode that are watched; after so many, the model is not expected to be trained in it."""


class NoGradientWarning(UserWarning):
    """A trained tensor got no gradient, or only zeros."""


def without_gradient(gradients: Mapping[str, Tensor | None]) -> list[str]:
    """Names of the tensors whose gradient is missing or all zeros."""
    given = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    is_fed = _true({name: gradient.any() for name, gradient in given.items()})
    return [name for name in gradients if name not in is_fed]


def _true(conditions: Mapping[str, Tensor]) -> set[str]:
    """Names of the conditions [] that hold; a device is waited for once, rather than for each."""
    by_device: dict[torch.device, list[str]] = {}
    for name, condition in conditions.items():
        by_device.setdefault(condition.device, []).append(name)
    holding: set[str] = set()
    for names in by_device.values():
        holds = torch.stack([conditions[name] for name in names]).tolist()
        holding.update(name for name, is_true in zip(names, holds, strict=True) if is_true)
    return holding


def describe(names: Sequence[str], count: int) -> str:
    """Say in one line that these trained tensors, out of ``count``, have no gradient."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{names[0]}{others} of {count} trained tensors got no gradient, or zeros only: the usual causes are {CAUSES}"
    )


class GradientWatch:
    """Warns at the end of the first backward pass if trained tensors got no gradient."""

    def __init__(self) -> None:
        self.is_over = False
        """Whether a backward pass has been observed, or warnings are suspended."""
        self._evaluations = 0
        self._hooks: list[Any] = []
        self._is_fed: dict[str, Tensor] = {}
        """Whether a tensor's gradient has a nonzero value, []; tensors without a gradient are missing."""

    def attach(
        self,
        outputs: Iterable[Tensor],
        trained: Mapping[str, Tensor],
        judge: Callable[[Sequence[str]], list[str]],
        *,
        in_training: bool,
    ) -> None:
        """Watch the next backward pass through any of a forward's outputs, instead of that of an earlier forward.

        Args:
            outputs: the forward's outputs.
            trained: trained leaf tensors by name.
            judge: selects the tensors without a gradient that are worth a warning.
            in_training: whether the model is in training mode. In evaluation mode, where forwards rarely have a
                backward pass, only the first ``MOST_EVALUATIONS`` are watched.
        """
        self._detach()
        roots = [output for output in outputs if output.requires_grad]
        self._evaluations += not in_training
        if self.is_over or not roots or (not in_training and self._evaluations > MOST_EVALUATIONS):
            return
        # A reachable tensor may lack a gradient because autograd.grad was called for other tensors only.
        reached = leaves_of(roots)
        unreached = [name for name, leaf in trained.items() if id(leaf) not in reached]
        for name, leaf in trained.items():
            self._hooks.append(leaf.register_hook(lambda gradient, name=name: self._note(name, gradient)))

        def end() -> None:
            fed = _true(self._is_fed)
            unknown = {name for name in trained if name not in self._is_fed and name not in unreached}
            idle = [name for name in trained if name not in fed and name not in unknown]
            self.is_over = bool(idle or self._is_fed)
            self._detach()
            if idle := judge(idle):
                warnings.warn(describe(idle, len(trained)), NoGradientWarning, stacklevel=2)

        def begin(gradient: Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(end)

        # Pickling an output drops the hook without a warning.
        self._hooks.append(register_multi_grad_hook(roots, unserializable_hook(begin), mode="any"))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Give no warnings for the length of the block."""
        before, self.is_over = self.is_over, True
        try:
            yield
        finally:
            self.is_over = before

    def __reduce__(self) -> tuple[Any, ...]:
        return GradientWatch, ()

    def _note(self, name: str, gradient: Tensor | None) -> None:
        """Record a gradient; it is None after a function without a backward."""
        is_fed = torch.tensor(False) if gradient is None else gradient.any()
        before = self._is_fed.get(name)
        self._is_fed[name] = is_fed if before is None else before | is_fed

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._is_fed = [], {}


def leaves_of(roots: Sequence[Tensor]) -> set[int]:
    """The ``id`` of the leaves from which tensors are computed, except those within reentrant checkpoints."""
    leaves: set[int] = set()
    seen: set[Node] = set()
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            waiting += [following for following, _ in node.next_functions if following is not None]
    return leaves
