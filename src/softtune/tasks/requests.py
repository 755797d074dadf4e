"""What a task requests of a model for a record. Offline evaluation and the server's engines execute the same requests.

Letters: N continuations or classes, T tokens of an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from softtune.data.encoding import Example


@dataclass(frozen=True, eq=False)
class Loglikelihood:
    """The log-probabilities [N] of continuations of one text."""

    examples: Sequence[Example]
    """N times the text, each with a continuation as its labels."""

    @property
    def example(self) -> Example:
        """The first of them."""
        return self.examples[0]


@dataclass(frozen=True, eq=False)
class Generate:
    """A text that continues the example's, of ``max_new_tokens`` at most."""

    example: Example
    max_new_tokens: int


@dataclass(frozen=True, eq=False)
class Classify:
    """A classification head's scores [N] of the example: log-probabilities up to a constant."""

    example: Example


@dataclass(frozen=True, eq=False)
class ClassifyTokens:
    """A token classification head's logits [T, N] of the example."""

    example: Example


@dataclass(frozen=True, eq=False)
class LocateSpan:
    """A question answering head's start and end logits, [T] each, of the example."""

    example: Example


Request = Loglikelihood | Generate | Classify | ClassifyTokens | LocateSpan


def with_prefix_mask(request: Request, mask: list[int] | None) -> Request:
    """The request of a record that sees only some virtual tokens of a prefix; see ``Example.prefix_mask``."""
    if isinstance(request, Loglikelihood):
        return Loglikelihood([replace(example, prefix_mask=mask) for example in request.examples])
    return replace(request, example=replace(request.example, prefix_mask=mask))
