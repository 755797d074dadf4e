"""One task's trained state: a config, the method's module and trained heads. Knows nothing about files and calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from softtune.backbone import Backbone
from softtune.errors import AdapterMismatchError, ConfigError
from softtune.methods import PeftConfig

PEFT_HEAD_NAMES = ("classifier", "score")
"""Names that PEFT lists for every classifier, whether the model has them or not."""
MAY_DIFFER = (
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "modules_to_save",
    "task_type",
)
"""Fields of a config that say where an adapter came from and what it is for, but not what it computes."""


@dataclass
class Adapter:
    """One task's trained state."""

    config: PeftConfig
    module: Any
    """The method's module, a ``Method``."""
    heads: dict[str, nn.Module]
    """Trained copies of the base model's heads in fp32, by their names."""

    @classmethod
    def new(cls, config: PeftConfig, backbone: Backbone) -> Adapter:
        """An adapter for a base model, not yet at its start. The config is copied.

        Raises:
            UnsupportedModelError: the base model cannot take the method.
            ConfigError: the config names modules that the base model lacks.
        """
        model, config = backbone.model, copy.deepcopy(config)
        config.base_model_name_or_path = config.base_model_name_or_path or model.name_or_path or None
        copied: dict[int, Any] = {}  # what is tied stays so
        heads = {
            name: copy.deepcopy(model.get_submodule(name), copied).float() for name in _head_names(config, backbone)
        }
        return cls(config, config.build(backbone).to(backbone.device), heads)

    def check_config(self, config: PeftConfig) -> None:
        """Refuse the numbers of an adapter that was configured otherwise.

        Raises:
            AdapterMismatchError: the configs differ in more than where they came from and what they are for.
        """
        own, other = self.config.to_dict(), config.to_dict()
        for name in own:
            settled = own[name] is not None and other.get(name) is not None
            if name not in MAY_DIFFER and settled and own[name] != other[name]:
                raise AdapterMismatchError(
                    f"the saved adapter has {name} = {other[name]!r}, the loaded one {own[name]!r}: "
                    "load it under a name of its own"
                )

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        parts = {"": self.module, **{f"{name}.": head for name, head in self.heads.items()}}
        pairs = [(prefix + name, p) for prefix, part in parts.items() for name, p in part.named_parameters()]
        return {name: parameter for name, parameter in pairs if parameter.requires_grad}

    def cut_off(self, idle: Collection[str]) -> list[str]:
        """Which trained tensors should have had a gradient, of those that have none or zeros only.

        Each tensor of a prompt has one in every step. Others may rest, if not all of them together: an expert that no
        token reached, a bias that a softmax takes no notice of, a head's part that the loss does not use.
        """
        own = [name for name, _ in self.module.named_parameters() if name in self.trained]
        heads = [name for name in self.trained if name not in own]
        lost = [name for name in own if name in idle]
        if not self.config.is_prompt_learning and len(lost) < len(own):
            lost = []
        return lost + (heads if all(name in idle for name in heads) else [])

    @property
    def is_reparameterised(self) -> bool:
        """Whether the module trains more than inference needs of it."""
        return len(self.module.state_dict()) > len(self.baked_state())

    def baked_state(self) -> dict[str, Tensor]:
        """The module's tensors that inference needs, without the dropout of training."""
        training = self.module.training
        self.module.eval()
        try:
            state: dict[str, Tensor] = self.module.baked_state()
        finally:
            self.module.train(training)
        return state

    def head_state(self) -> dict[str, Tensor]:
        """The heads' tensors, by PEFT's names."""
        return {
            f"base_model.{name}.{key}": tensor
            for name, head in self.heads.items()
            for key, tensor in head.state_dict().items()
        }


def _head_names(config: PeftConfig, backbone: Backbone) -> list[str]:
    names = list(backbone.head_names) if config.trains_head else []
    modules = [n for n, _ in backbone.model.named_modules()]
    for wanted in config.modules_to_save or ():
        found = [n for n in modules if n == wanted or n.endswith(f".{wanted}")]
        if not found and wanted not in PEFT_HEAD_NAMES:
            raise ConfigError(f"modules_to_save: the base model has no module {wanted!r}: see named_modules()")
        names += [n for n in found if n not in names]
    return names + _tied_to(names, config, backbone.model)


def _tied_to(names: Sequence[str], config: PeftConfig, model: nn.Module) -> list[str]:
    """Names of the other modules that have a parameter of the named ones: a language head of its words' embedding.

    Says so in a warning, since what is tied is trained as one, and PEFT would part it.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    inside = {f"{name}.{inner}".rstrip(".") for name in names for inner, _ in model.get_submodule(name).named_modules()}
    tied = [own for own in owners.values() if len(own) > 1 and inside.intersection(own)]
    if tied and not config.inference_mode:
        warnings.warn(f"modules_to_save: {' and '.join(tied[0])} are tied, and are trained as one", stacklevel=2)
    return [name for own in tied for name in own if name not in inside]
