"""Several methods in one adapter: a prefix, a memory, scaled and shifted outputs and virtual tokens, trained together.

What each of them can change differs: a prefix adds to what attention returns and leaves attention among the text's
tokens as it is (Petrov et al. 2024, "When Do Prompting and Prefix-Tuning Work?", arXiv 2310.19698), which biases and
factors of keys do change. He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv
2110.04366, combine methods in this way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from softtune.backbone import Backbone, evaluating, model_session
from softtune.errors import ConfigError
from softtune.methods.base import OURS, PeftConfig
from softtune.methods.prompt import Method, Prompt, load_state
from softtune.peft_types import PeftType, TaskType

_OF_THE_WHOLE = ("task_type", "inference_mode", "modules_to_save", "base_model_name_or_path", "revision")
"""Fields that the combined config has for all of its parts."""
_SAID_ONCE = ("task_type", "modules_to_save")
"""Those of which a part may have no other value than the whole's."""
_UNSET = {**dict.fromkeys(_OF_THE_WHOLE), "inference_mode": False}
"""A part's values of them, but for the time of ``CombinedConfig._as_whole``."""
_LEFT_OUT = (*_OF_THE_WHOLE, "peft_version", "auto_mapping")
"""Fields that are saved of the whole alone."""
DEFAULT_PARTS = (PeftType.PREFIX_TUNING, PeftType.IA3)


@dataclass(kw_only=True, eq=False)
class CombinedConfig(PeftConfig):
    """Config of an adapter that combines methods.

    A part is trained at its own method's share of the peak learning rate: ``learning_rate`` is that of the first part,
    and the others have the same ratio to it as the defaults of their methods.

    Raises:
        ConfigError: there are fewer than two parts, two of one method, a part with virtual tokens behind the text, or
            one with another task or other modules to save than the whole.
    """

    peft_type: PeftType = PeftType.COMBINED
    parts: list[Any] = field(default_factory=lambda: [{"peft_type": name} for name in DEFAULT_PARTS], metadata=OURS)
    """The parts: configs, or their fields as a mapping with ``peft_type``. Each method once. By default a prefix, and
    factors of keys, values and feed-forward layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts = [self._part(part) for part in self.parts]
        names = [part.peft_type.value for part in self.parts]
        if len(self.parts) < 2 or len({*names}) < len(names):
            raise ConfigError(f"parts = {names}", "name at least two methods, each once")
        if behind := [p for p in self.parts if getattr(p, "placement", "prefix") != "prefix"]:
            raise ConfigError(
                f"{behind[0].placement} of {behind[0].peft_type.value}: virtual tokens of a combined adapter stand in "
                "front of the text",
                "leave placement out",
            )

    def _part(self, given: Any) -> PeftConfig:
        """A part's config without the fields of the whole, which it gets for the time of ``_as_whole``."""
        if not isinstance(given, Mapping | PeftConfig) or isinstance(given, CombinedConfig):
            raise ConfigError(f"{given!r} is no part of a combined adapter", "give configs of single methods")
        part = copy.copy(given) if isinstance(given, PeftConfig) else PeftConfig.from_dict(self._whole() | {**given})
        if part.has_own_loss or getattr(part, "num_tasks", 1) > 1:
            raise ConfigError(f"{type(part).__name__} is no part of a combined adapter", "train it as one of its own")
        for name in _SAID_ONCE:
            if getattr(part, name) not in (None, getattr(self, name)):
                raise ConfigError(f"{type(part).__name__} has its own {name}", "say it once, of the whole")
        vars(part).update(_UNSET)
        return part

    def _whole(self) -> dict[str, Any]:
        """The fields of the whole, as a part has them."""
        return {name: getattr(self, name) for name in _OF_THE_WHOLE}

    @contextmanager
    def _as_whole(self) -> Iterator[None]:
        """Give the parts the fields of the whole for the length of the block."""
        for part in self.parts:
            vars(part).update(self._whole())
        try:
            yield
        finally:
            for part in self.parts:
                vars(part).update(_UNSET)

    @property
    def is_prompt_learning(self) -> bool:  # type: ignore[override]
        """Whether a part has virtual tokens."""
        return any(part.is_prompt_learning for part in self.parts)

    @property
    def num_virtual_tokens(self) -> int:
        """Number of virtual tokens of all parts."""
        return sum(getattr(part, "num_virtual_tokens", 0) for part in self.parts)

    @property
    def trains_head(self) -> bool:
        """Whether a head is trained with any of the parts."""
        return super().trains_head or any(part.trains_head for part in self.parts)

    @property
    def kind(self) -> str:
        return " ".join(["COMBINED", *(part.kind for part in self.parts)])

    def probing(self) -> CombinedConfig:
        """See ``PeftConfig.probing``."""
        return CombinedConfig(task_type=self.task_type, parts=[part.probing() for part in self.parts])

    def needs_gradient(self, name: str) -> bool:
        """See ``PeftConfig.needs_gradient``."""
        part, own = self._owner(name)
        return part.needs_gradient(own)

    def peak_learning_rate(self, task: TaskType) -> float:
        """See ``PeftConfig.peak_learning_rate``: that of the first part."""
        rate: float = self.parts[0].peak_learning_rate(task)
        return rate

    def learning_rate_ratio(self, name: str) -> float:
        """See ``PeftConfig.learning_rate_ratio``."""
        part, own = self._owner(name)
        task = self.task_type or TaskType.CAUSAL_LM
        return part.peak_learning_rate(task) / self.peak_learning_rate(task) * part.learning_rate_ratio(own)

    def _owner(self, name: str) -> tuple[PeftConfig, str]:
        """The part that has a parameter of the whole module, and the parameter's name there."""
        number, _, own = name.removeprefix("parts.").partition(".")
        return self.parts[int(number)], own

    def build(self, backbone: Backbone) -> CombinedModule:
        """See ``PeftConfig.build``, for each part.

        Raises:
            ConfigError: two parts contribute the same, such as a prefix, or one does not fit the base model.
            UnsupportedModelError: the base model cannot take a part.
        """
        names = [part.peft_type.value.lower() for part in self.parts]
        with self._as_whole():
            module = CombinedModule(names, [part.build(backbone) for part in self.parts]).to(backbone.device)
        with model_session(backbone.model), evaluating(module):
            module.prompt()
        return module

    def single(self, module: CombinedModule) -> list[nn.Module]:
        """See ``PeftConfig.single``."""
        return list(module.parts)

    def initialize(self, module: CombinedModule, backbone: Backbone) -> None:
        """See ``PeftConfig.initialize``, for each part."""
        with self._as_whole():
            for part, config in zip(module.parts, self.parts, strict=True):
                config.initialize(part, backbone)

    def to_dict(self) -> dict[str, Any]:
        """See ``PeftConfig.to_dict``; parts are mappings without the fields of the whole."""
        parts = [{k: v for k, v in part.to_dict().items() if k not in _LEFT_OUT} for part in self.parts]
        return {**super().to_dict(), "parts": parts}


class CombinedModule(nn.Module):
    """The trained modules of the parts.

    Args:
        names: the parts' names in saved files.
        parts: their modules.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.names = list(names)
        self.parts = nn.ModuleList(parts)

    def _methods(self) -> dict[str, Method]:
        return dict(zip(self.names, self.parts, strict=True))  # type: ignore[arg-type]

    def prompt(self) -> Prompt:
        """See ``Method.prompt``.

        Raises:
            ConfigError: two parts contribute the same.
        """
        return merge_prompts([part.prompt() for part in self._methods().values()])

    def inference_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, part in self._methods().items()
            for key, tensor in part.inference_state().items()
        }

    def load_inference_state(self, state: Mapping[str, Tensor]) -> None:
        for name, part in self._methods().items():
            start = f"{name}."
            load_state(part, {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)})


def merge_prompts(prompts: Sequence[Prompt]) -> Prompt:
    """One prompt with what each of them contributes.

    Raises:
        ConfigError: two of them contribute the same, such as a prefix.
    """
    own = [_contributions(prompt) for prompt in prompts]
    names = [name for each in own for name in each]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two parts have {min(twice).replace('_', ' ')}", "leave one of them out")
    return Prompt(
        **{name: value for each in own for name, value in each.items()},
        num_virtual_tokens=sum(prompt.num_virtual_tokens for prompt in prompts),
        shifts_positions=all(prompt.shifts_positions for prompt in prompts),
        token_dropout=max(prompt.token_dropout for prompt in prompts),
    )


def _contributions(prompt: Prompt) -> dict[str, Any]:
    """The fields of a prompt that add something."""
    fields = {name: value for name, value in vars(prompt).items() if not isinstance(value, int | float | None)}
    return {name: value for name, value in fields.items() if len(value)}
