"""What an adapter contributes to a batch, and the interface of the trained module that makes it.

All that ``softtune.injection`` knows of a method. Letters: P virtual tokens, D embedding size, H key/value heads, Q
query heads, K and V sizes of a key and a value, B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from softtune.backbone import Site
from softtune.backbone.roles import BiasSlot

IGNORED = -100
"""The label of a token that the loss leaves out."""


class KeyValue(NamedTuple):
    """The prefix of one attention layer."""

    key: Tensor
    """[H, P, K], as stored in a KV cache: after any rotary position embedding."""
    value: Tensor
    """[H, P, V]"""


class GatedKeyValue(NamedTuple):
    """Keys and values of one attention layer with a softmax of their own, whose result a gate scales."""

    key: Tensor
    """[H, P, K]"""
    value: Tensor
    """[H, P, V]"""
    gate: Tensor
    """[1], or one for each query head [Q]."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What an adapter contributes to a batch, without the batch dimension."""

    num_virtual_tokens: int = 0
    """Number of virtual tokens: of ``vectors`` and of ``prefixes`` together; 0 where the method has none."""
    vectors: Tensor | None = None
    """[P, D] virtual tokens among the input embeddings."""
    prefixes: Mapping[tuple[Site, int], KeyValue] = field(default_factory=dict)
    """Keys and values that precede a layer's own, by site and layer."""
    additions: Sequence[tuple[BiasSlot, Tensor]] = ()
    """Bias changes [width], added to the output of a module that has a bias or could have one."""
    memories: Mapping[tuple[Site, int], Tensor] = field(default_factory=dict)
    """Matrices [Q or H, K, V] that map a layer's queries to what is added to its attention's output."""
    gated: Mapping[tuple[Site, int], GatedKeyValue] = field(default_factory=dict)
    """Keys and values that a layer's queries attend to apart from the text."""
    scalings: Sequence[tuple[BiasSlot, Tensor]] = ()
    """Factors [width] of a module's output or input. A module's own output is scaled first, then a bias is added."""
    after_text: bool = False
    """Whether the virtual tokens follow the text (suffix, infix) instead of preceding it."""
    token_dropout: float = 0
    """Probability with which a row does not see a virtual token of the prefix, drawn for each row of a call."""
    shifts_positions: bool = True
    """Whether a prefix takes the positions 0 .. P-1, so that the text starts at position P."""

    @property
    def prefix_length(self) -> int:
        """P, the number of virtual tokens of a prefix; 0 where there is none."""
        return next((pair.key.shape[1] for pair in self.prefixes.values()), 0)

    @property
    def terms(self) -> set[tuple[Site, int]]:
        """The attention layers to whose outputs something is added, by site and layer."""
        return {*self.memories, *self.gated}


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The labels of a method's own loss: the weighted mean over those of the rows and, once a row, of the prompt."""

    labels: Tensor
    """[B, T] token ids, or ``IGNORED``."""
    weights: Tensor
    """[B, T]"""
    prompt_labels: Tensor
    """[P] token ids of the prompt's own labels, or ``IGNORED``; the first is not predicted."""
    prompt_weights: Tensor
    """[B, P]"""

    @property
    def num_labels(self) -> Tensor:
        """The number of labels that the loss is the mean over."""
        return self.labels.ne(IGNORED).sum() + len(self.labels) * self.prompt_labels[1:].ne(IGNORED).sum()


class Method(Protocol):
    """Interface of an adapter's trained module."""

    def prompt(self) -> Prompt:
        """The adapter's contribution to a batch. Called once per step.

        Of a config with ``num_prompt_tasks`` it takes the number of the rows' task.
        """
        ...

    def inference_state(self) -> dict[str, Tensor]:
        """The tensors that inference needs.

        Where the module trains no others, they are its own parameters, so that writing to them changes the module. A
        module that keeps them in parts is ``InParts`` instead.
        """
        ...


@runtime_checkable
class InParts(Protocol):
    """A ``Method`` that keeps what inference needs in parts, such as frozen rows apart from trained ones, or those of
    several methods."""

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy what ``inference_state`` returned into the parts."""
        ...


def load_state(module: Method, state: Mapping[str, Tensor]) -> None:
    """Copy what ``inference_state`` returned into a module, which must not be reparameterised."""
    if isinstance(module, InParts):
        module.load_inference_state(state)
        return
    own = module.inference_state()
    for name, tensor in state.items():
        own[name].data.copy_(tensor)
