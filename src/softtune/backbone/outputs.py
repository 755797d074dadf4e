"""Observes the outputs and inputs of a model's modules in a forward of two rows. Letters: B rows, T tokens.

The embeddings of the second row are NaN, which spreads to everything that is computed from them. Where NaN comes out
shows whether a module keeps the rows apart, however it arranges them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Outputs = dict[str, list["Output"]]
"""Outputs, or inputs, by module name, one for each call; modules that were not called are missing."""


class Observed(NamedTuple):
    """What went out of a model's modules, and what went in."""

    outputs: Outputs
    inputs: Outputs
    """The first argument of each call."""


TOKENS = 7
"""The length of each of the two rows: so many tokens that no expert gets them all by chance."""


@dataclass(frozen=True)
class Output:
    """The layout of what one call of a module returned, or was given."""

    width: int | None
    """The number of features; None where the output is not a tensor of two or more dimensions."""
    has_rows: bool
    """Whether the rows of the batch are kept in order, as [B, ...] or [B·T, ...]."""
    is_by_head: bool = False
    """Whether it is [B, heads, T, ...]."""

    @classmethod
    def from_output(cls, output: Any) -> Output:
        """Describe the output of a call with two rows, the second of which is NaN."""
        if not isinstance(output, Tensor) or output.dim() < 2:
            return cls(None, has_rows=False)
        is_nan = output.isnan().flatten(1)
        is_second = torch.arange(len(is_nan), device=is_nan.device) * 2 >= len(is_nan)
        has_rows = len(is_nan) % 2 == 0 and bool((is_nan == is_second[:, None]).all())
        return cls(output.shape[-1], has_rows, is_by_head=output.dim() == 4 and output.shape[1] != TOKENS)


@contextmanager
def observing(model: nn.Module, embeddings: Iterable[nn.Module]) -> Iterator[Observed]:
    """Collect outputs and inputs of all modules in the block, where the embeddings of the second of two rows are NaN.

    Args:
        model: the model.
        embeddings: the modules that embed ids [B, T].
    """
    observed = Observed({}, {})

    def set_nan(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return embedded.index_fill(0, torch.tensor([1], device=embedded.device), float("nan"))

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        observed.outputs.setdefault(name, []).append(Output.from_output(output))
        observed.inputs.setdefault(name, []).append(Output.from_output(next(iter((*args, *kwargs.values())), None)))

    with ExitStack() as stack:
        for embedding in set(embeddings):
            stack.callback(embedding.register_forward_hook(set_nan).remove)
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(partial(note, name), with_kwargs=True).remove)
        yield observed


def with_rows(model: nn.Module, outputs: Outputs) -> frozenset[str]:
    """Names of the modules whose outputs, or inputs, keep the rows in order in every call, as do all of their kind.

    Modules are of one kind where their names differ only in numbers. By chance one expert may get the tokens of all
    rows, but not every expert does.
    """
    kinds = {name: re.sub(r"\d+", "*", name) for name, _ in model.named_modules()}
    found: dict[str, list[bool]] = defaultdict(list)
    for name, kind in kinds.items():
        calls = outputs.get(name, [])
        if calls or name.rpartition(".")[0] not in outputs:  # else the module around it reads its weights
            found[kind].append(bool(calls) and all(call.has_rows for call in calls))
    return frozenset(name for name, kind in kinds.items() if found[kind] and all(found[kind]))
