"""The role of a bias in a transformer layer, by the names that model families give their modules.

A new family needs an alternative in a pattern. The roles are those of BitFit (Ben Zaken et al. 2022, table 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtune.backbone.quantization import is_quantized

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

_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head")
_KEY_HEADS = ("num_kv_heads", "num_key_value_heads")
"""Names of the number of query and of key/value heads, in an attention module or its config."""


def _one_after_another(width: int, heads: int, key_heads: int) -> list[Tensor]:
    size = width // (heads + 2 * key_heads)
    return list(torch.arange(width).split([heads * size, key_heads * size, key_heads * size]))


def _by_key_head(width: int, heads: int, key_heads: int) -> list[Tensor]:
    groups = torch.arange(width).view(key_heads, heads // key_heads + 2, -1)
    return [groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()]


_FUSED: dict[str, Callable[[int, int, int], list[Tensor]]] = {
    r"\.(c_attn|Wqkv|qkv_proj)$": _one_after_another,
    r"\.query_key_value$": _by_key_head,
}
"""Modules that compute query, key and value in one projection, and how their output features are split."""


CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
)
"""Modules whose features are the second dimension of their output, not the last: [B, N, ...]."""


@dataclass(frozen=True)
class BiasSlot:
    """A place where a bias acts: the output of one module, or the features of one role in it."""

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


def bias_slots(model: nn.Module, prefix: str) -> list[BiasSlot]:
    """Every module output below ``prefix`` that has a bias, or could be given one.

    Args:
        model: the base model.
        prefix: path of the part whose biases count, such as ``bert``; empty for the whole model.
    """
    slots = []
    for name, module in model.named_modules():
        if name.startswith(prefix) and (width := _output_width(module)):
            slots += _slots_of(name, module, width, model.get_submodule(name.rpartition(".")[0]))
    return slots


def _slots_of(name: str, module: nn.Module, width: int, parent: nn.Module) -> list[BiasSlot]:
    has_bias = getattr(module, "bias", None) is not None
    for pattern, split in _FUSED.items():
        if re.search(pattern, name):
            heads = _number(parent, _HEADS) or 1
            parts = split(width, heads, _number(parent, _KEY_HEADS) or heads)
            return [BiasSlot(name, r, len(i), has_bias, i) for r, i in zip((QUERY, KEY, VALUE), parts, strict=True)]
    role = LAYER_NORM if "norm" in type(module).__name__.lower() else None
    role = role or next((r for r, pattern in _PATTERNS.items() if re.search(pattern, name)), None)
    return [BiasSlot(name, role, width, has_bias)] if role or has_bias else []


def _number(attention: Any, names: tuple[str, ...]) -> int | None:
    owners = (attention, getattr(attention, "config", None))
    return next((int(v) for o in owners for n in names if (v := getattr(o, n, None)) is not None), None)


def _output_width(module: nn.Module) -> int | None:
    """The number of output features, for kinds of module that can have a bias; None for others."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding):
        return None
    if is_quantized(module):  # a packed weight has another shape
        return int(module.out_features)  # type: ignore[arg-type]
    if weight is None:
        return None
    if hasattr(module, "nf"):  # transformers' Conv1D keeps its weight transposed
        return int(weight.shape[1])
    return int(getattr(module, "out_channels", weight.shape[0]))
