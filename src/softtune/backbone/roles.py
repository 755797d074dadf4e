"""Which part a bias plays in a transformer layer, by the names that model families give their modules.

A new family is a new alternative in a pattern. The roles are those of BitFit (Ben Zaken et al. 2022, table 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

QUERY, KEY, VALUE = "query", "key", "value"
ATTENTION_OUTPUT, INTERMEDIATE, OUTPUT, LAYER_NORM = "attention_output", "intermediate", "output", "layer_norm"
ROLES = (QUERY, KEY, VALUE, ATTENTION_OUTPUT, INTERMEDIATE, OUTPUT, LAYER_NORM)

_PATTERNS = {
    QUERY: r"\.(query|q_proj|q_lin|q)$",
    KEY: r"\.(key|k_proj|k_lin|k)$",
    VALUE: r"\.(value|v_proj|v_lin|v)$",
    ATTENTION_OUTPUT: r"(attention\.output\.dense|self_attention\.dense|attn\.c_proj|Attention\.o"
    r"|\.o_proj|\.out_proj|\.out_lin|attention\.dense)$",
    INTERMEDIATE: r"(intermediate\.dense|\.up_proj|\.gate_proj|\.fc1|\.c_fc|\.lin1|\.dense_h_to_4h|\.wi(_\d)?)$",
    OUTPUT: r"(\.\d+\.output\.dense|\.down_proj|\.fc2|mlp\.c_proj|\.lin2|\.dense_4h_to_h|\.wo)$",
}

_FUSED: dict[str, Callable[[int, int], Tensor]] = {
    r"\.(c_attn|Wqkv)$": lambda width, _: torch.arange(width).view(3, -1),
    r"\.query_key_value$": lambda width, heads: torch.arange(width).view(heads, 3, -1).transpose(0, 1).reshape(3, -1),
}
"""Modules that compute query, key and value in one product, and which of their outputs are which: [3, width / 3]."""


@dataclass(frozen=True)
class BiasSlot:
    """A place where a bias acts: the output of one module, or the part of it that one role owns."""

    module: str
    """The module's path in the base model."""
    role: str | None
    """One of ROLES; None for biases outside the layers' roles, such as a pooler's."""
    width: int
    has_bias: bool
    index: Tensor | None = None
    """The role's output features [width] in a fused module; None where the module has one role."""

    @property
    def name(self) -> str:
        return self.module if self.index is None else f"{self.module}.{self.role}"


def bias_slots(model: nn.Module, prefix: str, heads: int) -> list[BiasSlot]:
    """Every place below ``prefix`` where a bias is, or could be added.

    Args:
        model: the base model.
        prefix: path of the part whose biases count, such as ``bert``; empty for the whole model.
        heads: attention heads, by which some families interleave query, key and value.
    """
    slots = []
    for name, module in model.named_modules():
        if name.startswith(prefix) and (width := _output_width(module)):
            slots += _slots_of(name, module, width, heads)
    return slots


def _slots_of(name: str, module: nn.Module, width: int, heads: int) -> list[BiasSlot]:
    has_bias = getattr(module, "bias", None) is not None
    for pattern, split in _FUSED.items():
        if re.search(pattern, name):
            parts = split(width, heads)
            return [BiasSlot(name, r, width // 3, has_bias, i) for r, i in zip((QUERY, KEY, VALUE), parts, strict=True)]
    role = LAYER_NORM if "norm" in type(module).__name__.lower() else None
    role = role or next((r for r, pattern in _PATTERNS.items() if re.search(pattern, name)), None)
    return [BiasSlot(name, role, width, has_bias)] if role or has_bias else []


def _output_width(module: nn.Module) -> int | None:
    """Features of the module's output, for the kinds of module that can have a bias; None for others."""
    weight: Any = getattr(module, "weight", None)
    if weight is None or isinstance(module, nn.Embedding):
        return None
    if hasattr(module, "nf"):  # transformers' Conv1D keeps its weight transposed
        return int(weight.shape[1])
    return int(weight.shape[0])
