"""What configs share whose methods change the modules that ``target_modules`` names, as PEFT names and saves them.

Knows nothing about what is done at the modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from softtune.backbone import Backbone
from softtune.backbone.roles import BiasSlot, is_linear
from softtune.errors import ConfigError, UnsupportedModelError
from softtune.methods.base import OURS, PeftConfig

ALL_LINEAR = "all-linear"
KEY_PREFIX = "base_model.model."
"""What PEFT puts in front of a module's name in the files of these methods."""

Names = list[str] | str
"""Suffixes of modules' names, or a regular expression for whole names."""
FusedRole = Literal["query", "key", "value"]


@dataclass(kw_only=True, eq=False)
class TargetConfig(PeftConfig):
    """Base of the configs that name modules."""

    target_modules: Names | None = None
    """Modules to change: suffixes of their names, a regular expression, or ``"all-linear"`` for every linear layer
    below the head. By default those of the method's roles, which an adapter's config names then."""
    fused_roles: list[FusedRole] | None = field(default=None, metadata=OURS)
    """Roles whose features are changed in modules that compute query, key and value in one projection. By default those
    of the method if ``target_modules`` is left out too, and else the whole output."""

    is_prompt_learning: ClassVar[bool] = False
    ways: ClassVar[tuple[str, ...]] = ("target_modules", "fused_roles")

    def find_targets(self, backbone: Backbone, default: Sequence[BiasSlot], kinds: str) -> list[str]:
        """Names of the modules to change.

        Args:
            backbone: the base model.
            default: slots in the modules to change where the config names none.
            kinds: what these slots are, for the error.

        Raises:
            UnsupportedModelError: the config names no module, and the base model has none of the method's roles.
            ConfigError: the base model has no module of such a name, or all are left out.
        """
        if self.target_modules is None and not default:
            raise UnsupportedModelError(
                f"{type(backbone.model).__name__} has no modules for {kinds}", "name some by target_modules"
            )
        if self.target_modules is None:
            places = dict.fromkeys(slot.module for slot in default)
            names = [name for name in places if not self._is_excluded(name, backbone)]
        else:
            names = self.named(backbone, self.target_modules)
        if not names:
            wanted = f"for {kinds}" if self.target_modules is None else repr(self.target_modules)
            raise ConfigError(
                f"target_modules: the base model has no module {wanted} that is not excluded or trained as a whole",
                "see named_modules()",
            )
        return names

    def named(self, backbone: Backbone, targets: Names) -> list[str]:
        """Names of the modules that PEFT would take for such ``target_modules``."""
        if is_all_linear(targets):
            names = [n for n, m in backbone.model.named_modules() if is_linear(m)]
            output, heads = backbone.model.get_output_embeddings(), set(backbone.head_names)
            names = [n for n in names if n.split(".")[0] not in heads and backbone.model.get_submodule(n) != output]
        else:
            names = [n for n, _ in backbone.model.named_modules() if is_named(n, targets)]
        return [n for n in names if not self._is_excluded(n, backbone)]

    def _is_excluded(self, name: str, backbone: Backbone) -> bool:
        """Whether a module is left out although it is named: it is trained as a whole, or part of such a module."""
        heads = backbone.head_names if self.trains_head else ()
        return any(re.match(rf"(^|.*\.){n}($|\..*)", name) for n in (*(self.modules_to_save or ()), *heads))

    def slots_in(self, backbone: Backbone, names: Iterable[str], roles: Collection[str]) -> list[BiasSlot]:
        """The outputs to change in modules of these names.

        Args:
            backbone: the base model.
            names: the modules' names.
            roles: the method's own roles, which count in fused modules where the config leaves all open.

        Raises:
            UnsupportedModelError: a module's output cannot be changed.
        """
        wanted = self.fused_roles or (roles if self.target_modules is None else None)
        return [slot for name in names for slot in changeable(backbone, name, wanted)]

    def settle_targets(self, backbone: Backbone, slots: Sequence[BiasSlot]) -> None:
        """Fill in what the config left open, so that PEFT and a later load find the same slots."""
        self.target_modules, _ = self._shortest(backbone, [slot.module for slot in slots], ())
        self._settle_roles(slots)

    def _settle_roles(self, slots: Sequence[BiasSlot]) -> None:
        roles: Any = [slot.role for slot in slots if slot.index is not None]
        self.fused_roles = sorted(set(roles)) or None

    def _shortest(
        self, backbone: Backbone, names: Sequence[str], inner: Collection[str]
    ) -> tuple[list[str], list[str]]:
        """The shortest suffixes by which PEFT finds just the modules ``names``, and ``inner`` among them."""
        for depth in (1, 2, 3):
            targets, some = (sorted({_suffix(n, depth) for n in each}) for each in (names, inner))
            found = self.named(backbone, targets)
            if {*found} == {*names} and {n for n in found if ends_with(n, some)} == {*inner}:
                return targets, some
        return sorted(set(names)), sorted(inner)

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        """Whether all modules are of kinds that PEFT takes; it stops at others."""
        names = self.named(backbone, self.target_modules or [])
        return all(self.peft_takes(backbone.model.get_submodule(name)) for name in names)

    def peft_takes(self, module: nn.Module) -> bool:
        """Whether PEFT's layers of this method can be put around a module."""
        return is_linear(module)


def changeable(
    backbone: Backbone, name: str, roles: Collection[str] | None = None, *, is_input: bool = False
) -> list[BiasSlot]:
    """The slots of a module; see ``Backbone.module_slots``.

    Raises:
        UnsupportedModelError: it has none.
    """
    slots = backbone.module_slots(name, roles, is_input=is_input)
    if not slots:
        end = "takes" if is_input else "returns"
        raise UnsupportedModelError(
            f"target_modules: {name} is not called, or {end} no features of a fixed number for each token",
            "name others",
        )
    return slots


def is_named(name: str, targets: Names) -> bool:
    """Whether a module's name is one of PEFT's ``target_modules`` or ``exclude_modules``."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)


def ends_with(name: str, targets: Names) -> bool:
    """Whether a module's name is one of PEFT's ``feedforward_modules``."""
    return is_named(name, targets) if isinstance(targets, str) else name.endswith(tuple(targets))


def is_all_linear(targets: Names | None) -> bool:
    """Whether ``target_modules`` are every linear layer."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _suffix(name: str, depth: int) -> str:
    return ".".join(name.split(".")[-depth:])


def by_module(parts: Iterable[tuple[BiasSlot, Tensor]], neutral: float) -> dict[str, tuple[BiasSlot, Tensor]]:
    """Each module's tensor [width] for all of its features, and one of its slots.

    Args:
        parts: slots and their tensors.
        neutral: the value of features that are not changed.
    """
    whole: dict[str, tuple[BiasSlot, Tensor]] = {}
    for slot, part in parts:
        if slot.index is None:
            whole[slot.module] = slot, part
            continue
        if slot.module not in whole:
            whole[slot.module] = slot, part.new_full((slot.fused_width or 0,), neutral)
        whole[slot.module][1].index_copy_(0, slot.index.to(part.device), part)
    return whole


def by_slot(state: dict[str, Tensor], slots: Iterable[BiasSlot], name: str) -> dict[str, Tensor]:
    """Each slot's tensor [width] by the slot's name, from PEFT's tensors by key. Others keep their keys.

    Args:
        state: the tensors.
        slots: the slots.
        name: what PEFT names them.
    """
    parts, rest = dict[str, Tensor](), dict(state)
    for slot in slots:
        if (whole := state.get(key := f"{KEY_PREFIX}{slot.module}.{name}")) is not None:
            rest.pop(key, None)
            is_fused = whole.numel() == slot.fused_width
            index = slot.index_on(whole.device) if is_fused else None
            parts[slot.name] = whole.flatten() if index is None else whole.flatten()[index]
    return parts | rest


def random_start(module: nn.Module) -> None:
    """Draw a module's parameters from N(0, 1), as PEFT does where a config turns its initialization off."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
