"""BitFit: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", arXiv 2106.10199.

Only bias terms and the task's head are trained. Each bias is trained as a *change* that is added to the output of the
module that owns it: the base model's tensors stay as they are, models without biases need no surgery, and half
precision models get fp32 changes. The gradients are those of the biases themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from softtune.backbone import Backbone
from softtune.backbone.roles import ROLES, BiasSlot
from softtune.errors import UnsupportedModelError
from softtune.methods.base import OURS, PeftConfig
from softtune.methods.prompt import Prompt
from softtune.peft_types import PeftType

Role = Literal["query", "key", "value", "attention_output", "intermediate", "output", "layer_norm"]


@dataclass(kw_only=True, eq=False)
class BitFitConfig(PeftConfig):
    """Config of BitFit. Training starts from the base model's own biases."""

    peft_type: PeftType = PeftType.BITFIT
    learning_rate: ClassVar[float] = 3e-4
    learning_rate_beside_head: ClassVar[float | None] = 1e-3
    general_options: ClassVar[dict[str, Any]] = {"add_missing": True}
    roles: Annotated[list[Role], Field(min_length=1)] | None = field(default=None, metadata=OURS)
    """Roles of the modules whose biases are trained; by default every bias below the head."""
    add_missing: bool = field(default=False, metadata=OURS)
    """Add biases, at zero, to modules of the chosen roles that have none."""

    is_prompt_learning: ClassVar[bool] = False
    ways: ClassVar[tuple[str, ...]] = ("add_missing",)

    @property
    def trains_head(self) -> bool:
        """Always true: a head is trained wherever the model has one."""
        return True

    def build(self, backbone: Backbone) -> BiasChanges:
        """See ``PeftConfig.build``.

        Raises:
            UnsupportedModelError: the base model has no bias of these roles.
        """
        roles = self.roles or (*ROLES, None)
        slots = [s for s in backbone.bias_slots() if s.role in roles and (s.has_bias or self.add_missing)]
        if not slots:
            kinds = f"{', '.join(self.roles)} biases" if self.roles else "biases"
            raise UnsupportedModelError(
                f"{type(backbone.model).__name__} has no {kinds}", "set add_missing=True to add them at zero"
            )
        return BiasChanges(slots)


class BiasChanges(nn.Module):
    """The trained bias changes, initialized to zero.

    Args:
        slots: the modules to whose outputs the changes are added.
    """

    def __init__(self, slots: Sequence[BiasSlot]) -> None:
        super().__init__()
        self.slots = list(slots)
        self.changes = nn.ParameterDict({_key(slot): nn.Parameter(torch.zeros(slot.width)) for slot in slots})

    def additions(self) -> list[tuple[BiasSlot, nn.Parameter]]:
        """Each slot and the change [width] that is added there."""
        return [(slot, self.changes[_key(slot)]) for slot in self.slots]

    def prompt(self) -> Prompt:
        return Prompt(additions=self.additions())

    def inference_state(self) -> dict[str, Tensor]:
        return {f"{slot.name}.bias": change.detach() for slot, change in self.additions()}


def _key(slot: BiasSlot) -> str:
    """The slot's key in ``changes``: ParameterDict allows no dots in its keys."""
    return slot.name.replace(".", "/")
