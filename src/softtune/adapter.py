"""One task's trained state: a config, the method's module and trained heads. Knows nothing about files and calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
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
    def new(cls, config: PeftConfig, backbone: Backbone, *, is_saved: bool = False) -> Adapter:
        """An adapter for a base model, not yet at its start. The config is copied.

        Args:
            config: its config.
            backbone: the base model's.
            is_saved: whether its tensors come from a file, which has the modules that the config names.

        Raises:
            UnsupportedModelError: the base model cannot take the method.
            ConfigError: the config names modules that the base model lacks.
        """
        if isinstance(config, type):
            raise ConfigError(f"{config.__name__} is a class: give a config of it, such as {config.__name__}(...)")
        if not isinstance(config, PeftConfig):
            raise ConfigError(f"{type(config).__name__} is no config of softtune's: import it from softtune")
        model, config = backbone.model, copy.deepcopy(config)
        config.base_model_name_or_path = config.base_model_name_or_path or model.name_or_path or None
        names = _head_names(config, backbone)
        if not is_saved:
            _tell_untrained_head(config, backbone)
        names = names if is_saved else _closed_over_ties(names, model)
        copied: dict[int, Any] = {}  # what is tied stays so
        heads = {name: _copy_in_fp32(model.get_submodule(name), copied) for name in names}
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

    def untie(self) -> None:
        """Let no two heads have a parameter in common."""
        self.heads = {name: copy.deepcopy(head) for name, head in self.heads.items()}

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
    return names


def _tell_untrained_head(config: PeftConfig, backbone: Backbone) -> None:
    """Warn where the task is not the one that the model's head is for."""
    if (task := config.task_type) and not (task.has_head or config.modules_to_save) and backbone.has_task_head:
        head = f"{backbone.head_names[0]} of {type(backbone.model).__name__}"
        warnings.warn(f"{head} is not trained by an adapter for {task.value}: give its own task_type", stacklevel=4)


def _copy_in_fp32(module: nn.Module, copied: dict[int, Any]) -> nn.Module:
    """A module's copy, whose numbers stay where the base model computes, also where its own are offloaded."""
    hooks = [hook for part in module.modules() if (hook := getattr(part, "_hf_hook", None)) is not None]
    copied |= {id(hook): hook for hook in hooks}  # they hold what is offloaded of the whole model
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        own = copy.deepcopy(module, copied).float()
    return remove_hook_from_module(own, recurse=True) if hooks else own


def _embedding_and_head(model: Any) -> list[str]:
    """Names of the words' embedding and of the language head, where these are one matrix."""
    pair = [model.get_input_embeddings(), model.get_output_embeddings()]
    if pair[1] is None or pair[0].weight is not pair[1].weight:
        return []
    return [name for name, module in model.named_modules() if module in pair]


def _closed_over_ties(names: list[str], model: nn.Module) -> list[str]:
    """The names, and beside the words' embedding the language head that is tied to it, or the reverse.

    Says so in a warning, since PEFT would part them.
    """
    tied = _embedding_and_head(model)
    if not {*tied} & {*names}:
        return names
    warnings.warn(f"modules_to_save: {' and '.join(tied)} are tied, and are trained as one", stacklevel=2)
    return [*names, *(name for name in tied if name not in names)]
