"""The roles of modules in a transformer layer, by the names that model families give them, and slots: the outputs and
inputs of modules that an adapter can change.

A new family needs an alternative in a pattern. The roles are those of BitFit (Ben Zaken et al. 2022, table 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
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

_FURTHER_PATTERNS = {
    QUERY: r"attention\.self\.query_proj$",
    KEY: r"attention\.self\.key_proj$",
    VALUE: r"attention\.self\.value_proj$",
    OUTPUT: r"(\.mlp\.fc_out|\.ffn_output|\.mlp\.Wo|\.feed_forward\.w2|\.shared_mlp\.output_linear)$",
}
"""Roles of modules whose biases BitFit trains without a role, or not at all: saved adapters name the biases of these
models as they stand."""

_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head")
_KEY_HEADS = ("num_kv_heads", "num_key_value_heads")
"""Names of the number of query and of key/value heads, in an attention module or its config."""


Parts = dict[str, Tensor]
"""The output features [width] of each role in a fused module."""


def _one_after_another(width: int, attention: nn.Module) -> Parts:
    heads, key_heads = _numbers_of_heads(attention)
    size = width // (heads + 2 * key_heads)
    parts = torch.arange(width).split([heads * size, key_heads * size, key_heads * size])
    return dict(zip((QUERY, KEY, VALUE), parts, strict=True))


def _by_key_head(width: int, attention: nn.Module) -> Parts:
    heads, key_heads = _numbers_of_heads(attention)
    groups = torch.arange(width).view(key_heads, heads // key_heads + 2, -1)
    return {QUERY: groups[:, :-2].flatten(), KEY: groups[:, -2].flatten(), VALUE: groups[:, -1].flatten()}


def _from_latent(width: int, attention: nn.Module) -> Parts:
    """Keys without their rotated part, and values, head by head."""
    heads, _ = _numbers_of_heads(attention)
    size = _number(attention, ("v_head_dim",)) or 0
    by_head = torch.arange(width).view(heads, -1)
    return {KEY: by_head[:, :-size].flatten(), VALUE: by_head[:, -size:].flatten()}


_FUSED: dict[str, Callable[[int, nn.Module], Parts]] = {
    r"\.(c_attn|Wqkv|qkv_proj)$": _one_after_another,
    r"\.query_key_value$": _by_key_head,
}
"""Modules that compute query, key and value in one projection, and how their output features are split."""

_FURTHER_FUSED: dict[str, Callable[[int, nn.Module], Parts]] = {
    r"attention\.self\.in_proj$": _by_key_head,
    r"\.kv_b_proj$": _from_latent,
}
"""The same for modules that BitFit leaves out; see ``_FURTHER_PATTERNS``."""


CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
)
"""Modules whose features are the second dimension of their output, not the last: [B, N, ...]."""


@dataclass(frozen=True)
class BiasSlot:
    """A place where a bias or a factor acts: the output of one module, the features of one role in it, or its input."""

    module: str
    """The module's path in the base model."""
    role: str | None
    """One of ROLES; None for biases outside the layers' roles, such as a pooler's."""
    width: int
    has_bias: bool
    index: Tensor | None = None
    """The role's output features [width] in a fused module; None where the module has one role."""
    is_input: bool = False
    """Whether the place is the module's input."""
    fused_width: int | None = None
    """The number of all output features of a fused module; None where the module has one role."""
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.module if self.index is None else f"{self.module}.{self.role}"

    def index_on(self, device: torch.device) -> Tensor | None:
        """The index on a device, to which it is copied once."""
        if self.index is None or self.index.device == device:
            return self.index
        if device not in self._copies:
            self._copies[device] = self.index.to(device)
        return self._copies[device]


def bias_slots(model: nn.Module, prefix: str) -> list[BiasSlot]:
    """Every module output below ``prefix`` that has a bias, or could be given one.

    Args:
        model: the base model.
        prefix: path of the part whose biases count, such as ``bert``; empty for the whole model.
    """
    slots = []
    for name, module in model.named_modules():
        if name.startswith(prefix) and (width := output_width(module)):
            slots += _slots_of(name, module, width, model)
    return slots


def role_slots(model: nn.Module, prefix: str, roles: Collection[str], *, is_input: bool = False) -> list[BiasSlot]:
    """The outputs, or inputs, of the modules of some roles below ``prefix``, whether they have biases or not.

    Args:
        model: the base model.
        prefix: as for ``bias_slots``.
        roles: the roles.
        is_input: whether to return the places of inputs.
    """
    names = [name for name, _ in model.named_modules() if name.startswith(prefix)]
    slots = [slot for name in names for slot in module_slots(model, name, roles, is_input=is_input)]
    return [slot for slot in slots if slot.role in roles]


def module_slots(
    model: nn.Module, name: str, roles: Collection[str] | None = None, *, is_input: bool = False
) -> list[BiasSlot]:
    """The slots of one module: its whole output or input, or in a fused module the outputs of some roles.

    Args:
        model: the base model.
        name: the module's name.
        roles: roles of the outputs of a fused module; by default its whole output.
        is_input: whether to return the place of the input.

    Returns:
        The slots; none for a module that has no fixed number of features.
    """
    module = model.get_submodule(name)
    if (width := _width(module, is_input=is_input)) is None:
        return []
    has_bias = _has_bias(module)
    parts = None if is_input or roles is None else _parts_of(name, width, model, {**_FUSED, **_FURTHER_FUSED})
    if parts is not None and roles is not None:
        kept = {r: index for r, index in parts.items() if r in roles}
        return [BiasSlot(name, r, len(index), has_bias, index, fused_width=width) for r, index in kept.items()]
    role = _role_of(name, module, _FURTHER_PATTERNS) or _role_of(name, module, _PATTERNS)
    return [BiasSlot(name, role, width, has_bias, is_input=is_input)]


def _slots_of(name: str, module: nn.Module, width: int, model: nn.Module) -> list[BiasSlot]:
    parts, has_bias = _parts_of(name, width, model, _FUSED), _has_bias(module)
    if parts is not None:
        return [BiasSlot(name, r, len(index), has_bias, index, fused_width=width) for r, index in parts.items()]
    role = _role_of(name, module, _PATTERNS)
    return [BiasSlot(name, role, width, has_bias)] if role or has_bias else []


def _parts_of(
    name: str, width: int, model: nn.Module, fused: Mapping[str, Callable[[int, nn.Module], Parts]]
) -> Parts | None:
    """The features of each role in a fused module; None for other modules."""
    for pattern, split in fused.items():
        if re.search(pattern, name):
            return split(width, model.get_submodule(name.rpartition(".")[0]))
    return None


def _role_of(name: str, module: nn.Module, patterns: Mapping[str, str]) -> str | None:
    if "norm" in type(module).__name__.lower():
        return LAYER_NORM
    return next((role for role, pattern in patterns.items() if re.search(pattern, name)), None)


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _numbers_of_heads(attention: nn.Module) -> tuple[int, int]:
    """The numbers of query and of key/value heads."""
    heads = _number(attention, _HEADS) or 1
    return heads, _number(attention, _KEY_HEADS) or heads


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, which may keep its weight transposed as transformers' Conv1D."""
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


def _number(attention: Any, names: tuple[str, ...]) -> int | None:
    owners = (attention, getattr(attention, "config", None))
    return next((int(v) for o in owners for n in names if (v := getattr(o, n, None)) is not None), None)


def output_width(module: nn.Module) -> int | None:
    """The number of output features, for kinds of module that can have a bias; None for others."""
    return _width(module, is_input=False)


def _width(module: nn.Module, *, is_input: bool) -> int | None:
    """The number of output or of input features, for kinds of module that can have a bias; None for others."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding):
        return None
    if is_quantized(module):  # a packed weight has another shape
        return int(module.in_features if is_input else module.out_features)  # type: ignore[arg-type]
    if weight is None:
        return None
    shape = getattr(weight, "ds_shape", weight.shape)  # of a weight that ZeRO-3 shards
    if hasattr(module, "nf"):  # transformers' Conv1D keeps its weight transposed
        return int(shape[0 if is_input else 1])
    if is_input:
        return int(getattr(module, "in_channels", shape[-1]))
    return int(getattr(module, "out_channels", shape[0]))
