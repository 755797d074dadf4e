"""What the modules of a model return, observed in a forward of two rows. Letters: B rows, T tokens.

The words of the second row are no numbers, which spread to all that is computed from them: where they come out shows
whether a module keeps the rows apart, however it arranges them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Outputs = dict[str, list["Output"]]
"""What each module returned, call by call, by name; nothing of those that were not called."""


TOKENS = 7
"""Of each of the two rows: so many that no expert gets all by chance."""


@dataclass(frozen=True)
class Output:
    """What one call of a module returned."""

    width: int | None
    """The number of features; None where it is no tensor."""
    has_rows: bool
    """Whether it has the rows one after another, as [B, ...] or [B·T, ...]."""
    is_by_head: bool = False
    """Whether it is [B, heads, T, ...]."""

    @classmethod
    def of(cls, output: Any) -> Output:
        """Read what a call with two rows returned, the second of which is no number."""
        if not isinstance(output, Tensor) or output.dim() < 2:
            return cls(None, has_rows=False)
        lost = output.isnan().flatten(1)
        is_second = torch.arange(len(lost), device=lost.device) * 2 >= len(lost)
        has_rows = len(lost) % 2 == 0 and bool((lost == is_second[:, None]).all())
        return cls(output.shape[-1], has_rows, is_by_head=output.dim() == 4 and output.shape[1] != TOKENS)


@contextmanager
def observing(model: nn.Module, embeddings: Iterable[nn.Module]) -> Iterator[Outputs]:
    """Collect what all modules return in the block, where the second of two rows is no number from the start.

    Args:
        model: the model.
        embeddings: the modules that turn ids [B, T] into words.
    """
    outputs: Outputs = {}

    def lose(module: nn.Module, args: Any, words: Tensor) -> Tensor:
        return words.index_fill(0, torch.tensor([1], device=words.device), float("nan"))

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs.setdefault(name, []).append(Output.of(output))

    with ExitStack() as stack:
        for embedding in set(embeddings):
            stack.callback(embedding.register_forward_hook(lose).remove)
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(partial(note, name)).remove)
        yield outputs


def with_rows(model: nn.Module, outputs: Outputs) -> frozenset[str]:
    """Names of the modules that have the rows one after another in every call, as have all modules of their kind.

    Modules are of one kind where their names differ in numbers alone: by chance an expert gets the tokens of all rows,
    but not each expert does.
    """
    kinds = {name: re.sub(r"\d+", "*", name) for name, _ in model.named_modules()}
    found: dict[str, list[bool]] = defaultdict(list)
    for name, kind in kinds.items():
        calls = outputs.get(name, [])
        if calls or name.rpartition(".")[0] not in outputs:  # else its weights are read
            found[kind].append(bool(calls) and all(call.has_rows for call in calls))
    return frozenset(name for name, kind in kinds.items() if found[kind] and all(found[kind]))
