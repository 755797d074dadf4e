"""BEFT: Huang et al. 2025, "BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes", arXiv 2509.15974.

Of the biases of queries, keys and values, the values' alone are trained, which with little data serve best. As in
``bitfit.py`` each is a change that is added to the output of its module, whether the module has a bias or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from softtune.backbone import Backbone
from softtune.backbone.roles import VALUE
from softtune.methods.bitfit import BiasChanges
from softtune.methods.targets import KEY_PREFIX, TargetConfig, by_module, by_slot, random_start
from softtune.peft_types import PeftType


@dataclass(kw_only=True, eq=False)
class BeftConfig(TargetConfig):
    """Config of BEFT: bias changes at the modules that ``target_modules`` names, by default the value projections."""

    peft_type: PeftType = PeftType.BEFT
    init_weights: bool = True
    """Start from zero, where the outputs are the base model's; otherwise from N(0, 1)."""

    learning_rate: ClassVar[float] = 1e-3
    tensor_names: ClassVar[tuple[str, ...]] = ("beft_bias",)

    def build(self, backbone: Backbone) -> BiasChanges:
        """See ``PeftConfig.build``.

        Raises:
            UnsupportedModelError: the base model has no value projections, or a module's output cannot be changed.
            ConfigError: the base model has no module of such a name.
        """
        names = self.find_targets(backbone, backbone.role_slots([VALUE]), "values")
        slots = self.slots_in(backbone, names, [VALUE])
        self.settle_targets(backbone, slots)
        return BiasChanges(slots)

    def initialize(self, module: BiasChanges, backbone: Backbone) -> None:
        if not self.init_weights:
            random_start(module)

    def peft_takes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def to_saved(self, state: dict[str, Tensor], module: BiasChanges) -> dict[str, Tensor]:
        """Each module's change [1, width], with zeros for features that are not trained."""
        whole = by_module([(slot, change.detach()) for slot, change in module.additions()], 0.0)
        return {f"{KEY_PREFIX}{name}.{self.tensor_names[0]}": change[None] for name, (_, change) in whole.items()}

    def from_saved(self, state: dict[str, Tensor], module: BiasChanges) -> dict[str, Tensor]:
        found = by_slot(state, module.slots, self.tensor_names[0])
        names = {slot.name for slot in module.slots}
        return {f"{name}.bias" if name in names else name: change for name, change in found.items()}
