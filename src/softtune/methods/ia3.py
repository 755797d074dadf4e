"""IA3: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv 2205.05638.

Keys, values and the inner activations of the feed-forward layers are multiplied by trained factors, one for each
feature, which start at 1. Here a factor scales the output of the projection that computes keys or values, and the input
of the feed-forward layer's last projection; the base model's tensors stay as they are. Letters: N features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from softtune.backbone import Backbone
from softtune.backbone.roles import KEY, OUTPUT, VALUE, BiasSlot
from softtune.errors import ConfigError
from softtune.methods.prompt import Prompt
from softtune.methods.targets import (
    KEY_PREFIX,
    Names,
    TargetConfig,
    by_module,
    by_slot,
    changeable,
    ends_with,
    is_all_linear,
    is_named,
    random_start,
)
from softtune.peft_types import PeftType


@dataclass(kw_only=True, eq=False)
class IA3Config(TargetConfig):
    """Config of IA3: factors at the modules that ``target_modules`` names, by default those of keys, values and
    feed-forward layers."""

    peft_type: PeftType = PeftType.IA3
    exclude_modules: Names | None = None
    """Modules to leave out, named as by ``target_modules``."""
    feedforward_modules: Names | None = None
    """Those of the target modules whose input is scaled instead of their output: the ends of their names, or a regular
    expression. By default the last projections of feed-forward layers."""
    fan_in_fan_out: bool = False
    """Whether the modules keep their weights transposed, as GPT-2's; set by the base model."""
    init_ia3_weights: bool = True
    """Start from one, where the outputs are the base model's; otherwise from N(0, 1)."""

    learning_rate: ClassVar[float] = 3e-3
    ways: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules", "feedforward_modules", "fused_roles")
    tensor_names: ClassVar[tuple[str, ...]] = ("ia3_l",)

    def __post_init__(self) -> None:
        super().__post_init__()
        targets, inner = self.target_modules, self.feedforward_modules
        if isinstance(targets, list) and isinstance(inner, list) and not {*inner} <= {*targets}:
            raise ConfigError(
                "IA3Config.feedforward_modules: `feedforward_modules` should be a subset of `target_modules`",
                f"add {', '.join(sorted({*inner} - {*targets}))} to target_modules",
            )

    def build(self, backbone: Backbone) -> Factors:
        """See ``PeftConfig.build``.

        Raises:
            UnsupportedModelError: the base model has no keys, values or feed-forward layers, or a module cannot be
                changed.
            ConfigError: the base model has no module of such a name.
        """
        outputs, inputs = backbone.role_slots([KEY, VALUE]), backbone.role_slots([OUTPUT], is_input=True)
        names = self.find_targets(backbone, [*outputs, *inputs], "keys, values and feed-forward layers")
        inner = [name for name in names if self._is_inner(name, inputs)]
        slots = self.slots_in(backbone, [name for name in names if name not in inner], [KEY, VALUE])
        slots += [slot for name in inner for slot in changeable(backbone, name, is_input=True)]
        self._settle(backbone, names, inner)
        self._settle_roles(slots)
        return Factors(slots)

    def _is_inner(self, name: str, inputs: Sequence[BiasSlot]) -> bool:
        """Whether a target module's input is scaled."""
        if self.feedforward_modules is None:
            return name in {slot.module for slot in inputs}
        return ends_with(name, self.feedforward_modules)

    def _settle(self, backbone: Backbone, names: list[str], inner: list[str]) -> None:
        """Fill in what the config left open, so that PEFT and a later load find the same modules."""
        if self.target_modules is None or is_all_linear(self.target_modules) or self.feedforward_modules is None:
            self.target_modules, self.feedforward_modules = self._shortest(backbone, names, inner)
        self.fan_in_fan_out = any(hasattr(backbone.model.get_submodule(name), "nf") for name in names)

    def _is_excluded(self, name: str, backbone: Backbone) -> bool:
        is_excluded = self.exclude_modules is not None and is_named(name, self.exclude_modules)
        return is_excluded or super()._is_excluded(name, backbone)

    def initialize(self, module: Factors, backbone: Backbone) -> None:
        if not self.init_ia3_weights:
            random_start(module)

    def to_saved(self, state: dict[str, Tensor], module: Factors) -> dict[str, Tensor]:
        """Each module's factors, [N, 1] of outputs or [1, N] of inputs, with ones for features that are not trained."""
        whole = by_module([(slot, factor.detach()) for slot, factor in module.scalings()], 1.0)
        return {
            f"{KEY_PREFIX}{name}.{self.tensor_names[0]}": factor[None] if slot.is_input else factor[:, None]
            for name, (slot, factor) in whole.items()
        }

    def from_saved(self, state: dict[str, Tensor], module: Factors) -> dict[str, Tensor]:
        found = by_slot(state, module.slots, self.tensor_names[0])
        names = {slot.name for slot in module.slots}
        return {f"{name}.factor" if name in names else name: factor for name, factor in found.items()}


class Factors(nn.Module):
    """The trained factors, initialized to one.

    Args:
        slots: the outputs and inputs of modules that the factors scale.
    """

    def __init__(self, slots: Sequence[BiasSlot]) -> None:
        super().__init__()
        self.slots = list(slots)
        self.factors = nn.ParameterDict({_key(slot): nn.Parameter(torch.ones(slot.width)) for slot in slots})

    def scalings(self) -> list[tuple[BiasSlot, nn.Parameter]]:
        """Each slot and the factor [width] there."""
        return [(slot, self.factors[_key(slot)]) for slot in self.slots]

    def prompt(self) -> Prompt:
        return Prompt(scalings=self.scalings())

    def inference_state(self) -> dict[str, Tensor]:
        return {f"{slot.name}.factor": factor.detach() for slot, factor in self.scalings()}


def _key(slot: BiasSlot) -> str:
    """The slot's key in ``factors``: ParameterDict allows no dots in its keys."""
    return slot.name.replace(".", "/")
