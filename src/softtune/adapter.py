"""One task's trained state: a config, the method's module and trained heads. Knows nothing about files and calls.

Internal.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from torch import Tensor, nn

from softtune.backbone import Backbone, evaluating
from softtune.errors import AdapterError, AdapterMismatchError, ConfigError
from softtune.methods import PeftConfig
from softtune.methods.prompt import InParts, Prompt, load_state

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
"""Config fields that describe an adapter's origin and task, but not what it computes."""


@dataclass
class Adapter:
    """One task's trained state."""

    config: PeftConfig
    module: Any
    """The method's module, a ``Method``."""
    heads: dict[str, nn.Module]
    """Trained fp32 copies of the base model's heads, by module name."""
    chat_template: str | None = None
    """The chat template that it was trained with; None where it was not, or where a folder does not say."""
    task: int | None = None
    """The task whose prompt it contributes, of a method with several; None where there is one."""

    @classmethod
    def new(cls, config: PeftConfig, backbone: Backbone, *, is_saved: bool = False) -> Adapter:
        """Create an adapter for a base model, not yet initialized. The config is copied.

        Args:
            config: the adapter's config.
            backbone: the base model.
            is_saved: whether the adapter's tensors come from a file. Its heads are then the modules that the config
                names, without modules tied to them.

        Raises:
            UnsupportedModelError: the base model does not support the method.
            ConfigError: the config is no ``PeftConfig``, or names modules that the base model lacks.
        """
        if isinstance(config, type):
            raise ConfigError(f"{config.__name__} is a class", f"give a config of it, such as {config.__name__}(...)")
        if not isinstance(config, PeftConfig):
            raise ConfigError(f"{type(config).__name__} is no config of softtune's", "import it from softtune")
        model, config = backbone.model, copy.deepcopy(config)
        config.base_model_name_or_path = config.base_model_name_or_path or model.name_or_path or None
        names = _head_names(config, backbone)
        module = config.build(backbone).to(backbone.device)
        if not is_saved:
            _warn_untrained_head(config, backbone)
        names = names if is_saved else _closed_over_ties(names, model)
        copied: dict[int, Any] = {}  # one memo for all heads, so that tied parameters stay tied
        heads = {name: _copy_in_fp32(model.get_submodule(name), copied) for name in names}
        return cls(config, module, heads)

    def of_task(self, task: int) -> Adapter:
        """The adapter for rows of one of its tasks; as it is where its method knows no tasks.

        Raises:
            AdapterError: it has no such task.
        """
        tasks = self.config.num_prompt_tasks
        if tasks is not None and not 0 <= task < tasks:
            raise AdapterError(f"there is no task {task}, the adapter has {tasks}", "count its tasks from 0")
        return self if tasks in (None, 1) else replace(self, task=task)

    def prompt(self) -> Prompt:
        """What it contributes to a batch; see ``Method``.

        Raises:
            AdapterError: its method has several tasks, and ``task`` names none.
        """
        prompt: Prompt = self.module.prompt() if self.task is None else self.module.prompt(self.task)
        return prompt

    def check_config(self, config: PeftConfig) -> None:
        """Check that an adapter saved with this config can be loaded into this one.

        Raises:
            AdapterMismatchError: the configs differ in other fields than ``MAY_DIFFER``.
        """
        own, other = self.config.to_dict(), config.to_dict()
        for name in own:
            settled = own[name] is not None and other.get(name) is not None
            if name not in MAY_DIFFER and settled and own[name] != other[name]:
                raise AdapterMismatchError(
                    f"the saved adapter has {name} = {other[name]!r}, the loaded one {own[name]!r}",
                    "load it under a name of its own",
                )

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the module and the heads, by name."""
        parts = {"": self.module, **{f"{name}.": head for name, head in self.heads.items()}}
        pairs = [(prefix + name, p) for prefix, part in parts.items() for name, p in part.named_parameters()]
        return {name: parameter for name, parameter in pairs if parameter.requires_grad}

    @property
    def num_trained(self) -> int | None:
        """The number of values that a method without virtual tokens trains, without heads; None for the others."""
        if self.config.is_prompt_learning:
            return None
        return sum(tensor.numel() for tensor in self.inference_state().values())

    def cut_off(self, idle: Collection[str]) -> list[str]:
        """Names of the tensors that should have got a gradient, among trained ones whose gradient is missing or zero.

        Those for which ``PeftConfig.needs_gradient`` does not hold, and heads, are named only if none of them got one,
        since single ones may be without, such as a part of a head that the loss does not use.
        """
        in_module = [name for name, _ in self.module.named_parameters() if name in self.trained]
        heads = [name for name in self.trained if name not in in_module]
        lost = [name for name in in_module if name in idle]
        if len(lost) < len(in_module):
            lost = [name for name in lost if self.config.needs_gradient(name)]
        return lost + (heads if all(name in idle for name in heads) else [])

    def untie(self) -> None:
        """Copy the heads so that no two of them share a parameter."""
        self.heads = {name: copy.deepcopy(head) for name, head in self.heads.items()}

    @property
    def is_reparameterised(self) -> bool:
        """Whether the module, or one that it combines, has more than inference needs, such as an MLP behind the
        prompt."""
        with evaluating(self.module):
            return any(_has_more(module) for module in self.config.single(self.module))

    def training_state(self) -> dict[str, Tensor]:
        """The module's own tensors."""
        return tensors_of(self.module)

    def inference_state(self) -> dict[str, Tensor]:
        """The module's tensors that inference needs, computed without dropout.

        By the kernels of training: an LSTM's for inference round otherwise.
        """
        training = self.module.training
        self.module.eval()
        try:
            state: dict[str, Tensor] = self.module.inference_state()
        finally:
            self.module.train(training)
        return state

    def split(self, saved: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of a saved adapter: those of the module, and those of the heads."""
        own = self.config.tensor_names
        is_head = {k: k.startswith("base_model.") and k.rpartition(".")[2] not in own for k in saved}
        return {k: x for k, x in saved.items() if not is_head[k]}, {k: x for k, x in saved.items() if is_head[k]}

    @property
    def _head_prefix(self) -> str:
        """What PEFT puts in front of a head's name."""
        return "base_model.model." if self.config.tensor_names else "base_model."

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy what ``inference_state`` returned into the module, which must not be reparameterised."""
        with evaluating(self.module):
            load_state(self.module, state)

    def head_state(self) -> dict[str, Tensor]:
        """The heads' tensors, under PEFT's names."""
        return {
            f"{self._head_prefix}{name}.{key}": tensor
            for name, head in self.heads.items()
            for key, tensor in tensors_of(head).items()
        }


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's ``state_dict()``, without its hooks, by which FSDP2 would shard what is gathered."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor.detach()
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        if name not in part._non_persistent_buffers_set
    }


def _has_more(module: Any) -> bool:
    """Whether a single method's module has more than inference needs."""
    return not isinstance(module, InParts) and len(tensors_of(module)) > len(module.inference_state())


def _head_names(config: PeftConfig, backbone: Backbone) -> list[str]:
    names = list(backbone.head_names) if config.trains_head else []
    modules = [n for n, _ in backbone.model.named_modules()]
    for wanted in config.modules_to_save or ():
        found = [n for n in modules if n == wanted or n.endswith(f".{wanted}")]
        if not found and wanted not in PEFT_HEAD_NAMES:
            raise ConfigError(f"modules_to_save: the base model has no module {wanted!r}", "see named_modules()")
        names += [n for n in found if n not in names]
    return names


def _warn_untrained_head(config: PeftConfig, backbone: Backbone) -> None:
    """Warn if the config's task is not the one that the model's head is for."""
    if (task := config.task_type) and not (task.has_head or config.modules_to_save) and backbone.has_task_head:
        head = f"{backbone.head_names[0]} of {type(backbone.model).__name__}"
        warnings.warn(f"{head} is not trained by an adapter for {task.value}: give its own task_type", stacklevel=4)


def _copy_in_fp32(module: nn.Module, copied: dict[int, Any]) -> nn.Module:
    """Copy a module in fp32 on the device where it computes, even if its parameters are offloaded."""
    hooks = [hook for part in module.modules() if (hook := getattr(part, "_hf_hook", None)) is not None]
    copied |= {id(hook): hook for hook in hooks}  # hooks hold the whole model's offloaded weights: do not copy them
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        head = copy.deepcopy(module, copied).float()
    return remove_hook_from_module(head, recurse=True) if hooks else head


def _embedding_and_head(model: Any) -> list[str]:
    """Names of the input embedding and the language model head, if their weights are tied."""
    pair = [model.get_input_embeddings(), model.get_output_embeddings()]
    if pair[1] is None or pair[0].weight is not pair[1].weight:
        return []
    return [name for name, module in model.named_modules() if module in pair]


def _closed_over_ties(names: list[str], model: nn.Module) -> list[str]:
    """The names, with both the input embedding and the language model head if one of them is named and they are tied.

    Warns about the addition, since PEFT would untie them.
    """
    tied = _embedding_and_head(model)
    if not {*tied} & {*names}:
        return names
    warnings.warn(f"modules_to_save: {' and '.join(tied)} are tied, and are trained as one", stacklevel=2)
    return [*names, *(name for name in tied if name not in names)]
