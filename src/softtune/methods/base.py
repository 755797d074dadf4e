"""Base classes of the methods' configs.

A method is a config whose ``build`` returns a module with two functions: ``prompt()`` returns what the adapter adds to
a batch, ``inference_state()`` the tensors that inference needs (``methods.prompt``). Field names and defaults are
PEFT's; a field that PEFT lacks is marked ``OURS``.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from softtune import storage
from softtune.backbone import Backbone
from softtune.compat import PushToHubMixin
from softtune.errors import AdapterMismatchError, CheckpointError, ConfigError, MissingPeftTypeError
from softtune.peft_types import PeftType, TaskType
from softtune.views import patch_peft, pefts_version, shared_config_class

CONFIG_NAME = "adapter_config.json"
OWN_CONFIG_NAME = "softtune_config.json"

OURS = {"ours": True}
"""Metadata of a field that PEFT does not know."""

PositiveInt = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Placement = Literal["prefix", "suffix"]


@dataclass(kw_only=True, eq=False)
class PeftConfig(PushToHubMixin):
    """Base of all configs.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """

    task_type: TaskType | None = None
    """The task; decides whether a head is trained."""
    peft_type: PeftType | None = None
    """The method; set by each config class."""
    auto_mapping: dict[str, Any] | None = None
    """The base model's class, recorded where there is no task type."""
    peft_version: str | None = None
    """Version of PEFT if it was loaded when the config was created, else None."""
    base_model_name_or_path: str | None = None
    """The base model's folder or hub name."""
    revision: str | None = None
    """The base model's revision on the hub."""
    inference_mode: bool = False
    """Whether the adapter is for inference only: frozen, and without the MLP or LSTM behind its prompt."""
    modules_to_save: list[str] | None = None
    """Further modules of the base model to train and save; the head of a classification task is always included."""

    learning_rate: ClassVar[float]
    """Default peak learning rate of a recipe."""
    learning_rate_beside_head: ClassVar[float | None] = None
    """The same where a head is trained too; None where it is the same."""
    general_options: ClassVar[dict[str, Any]] = {}
    """Fields with which the method works on every base model that it can work on."""
    is_for_any_rows: ClassVar[bool] = True
    """Whether a comparison has the method where none is named: it needs nothing beside the rows of any task."""
    takes_placed_tokens: ClassVar[bool] = False
    """Whether a template may say where its virtual tokens stand."""
    has_own_loss: ClassVar[bool] = False
    """Whether calls with labels have the loss of the module's ``supervision`` instead of the base model's."""
    is_prompt_learning: ClassVar[bool] = True
    is_adaption_prompt: ClassVar[bool] = False
    ways: ClassVar[tuple[str, ...]] = ()
    """Fields that decide how the prompt enters the base model."""
    tensor_names: ClassVar[tuple[str, ...]] = ()
    """What PEFT names the method's tensors in files, behind the module that each changes; empty for other methods."""

    def __post_init__(self) -> None:
        own_type = type(self).__dataclass_fields__["peft_type"].default
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = f"Must be one of the following task types: {', '.join(TaskType)}."
            raise ConfigError(f"task_type: Invalid task type: {self.task_type!r}. {known}")
        self.peft_version = self.peft_version or pefts_version()
        patch_peft()
        hints = get_type_hints(type(self), include_extras=True)
        for name in (f.name for f in dataclasses.fields(self)):
            try:
                setattr(self, name, TypeAdapter(hints[name]).validate_python(getattr(self, name)))
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ConfigError(f"{type(self).__name__}.{name} = {getattr(self, name)!r}", reason) from None
        if own_type is not None and self.peft_type is not own_type:
            raise ConfigError(f"{type(self).__name__} is for {own_type.value}, not {self.peft_type}", "drop peft_type")

    def _leave_out(self, reason: str, **defaults: Any) -> None:
        """Warn about fields that have no effect and reset them to their defaults; PEFT accepts and ignores them."""
        if idle := [name for name, default in defaults.items() if getattr(self, name) != default]:
            # Points at the call that makes the config, three functions above.
            warnings.warn(f"{' and '.join(idle)} of {type(self).__name__}: {reason}", stacklevel=4)
            vars(self).update({name: defaults[name] for name in idle})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """A subclass of PEFT's class of the same name where PEFT is loaded, since TRL accepts no other configs."""
        patch_peft()
        return shared_config_class(type(self))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        return vars(self) | {"peft_version": None} == vars(other) | {"peft_version": None}

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self),), vars(self)  # object.__reduce__ would restore an instance of __class__

    def build(self, backbone: Backbone) -> nn.Module:
        """Build the module for this base model, not yet initialized; see ``Method``."""
        raise ConfigError(f"{type(self).__name__} names no method", "use one of its subclasses")

    def initialize(self, module: Any, backbone: Backbone) -> None:
        """Initialize a new module's parameters as the config specifies."""

    @property
    def trains_head(self) -> bool:
        """Whether the head that the task's model class adds is trained with the adapter."""
        return self.task_type is not None and self.task_type.has_head

    def needs_gradient(self, name: str) -> bool:
        """Whether a parameter of the module, by its name, gets a gradient in every step.

        Every tensor of a prompt does. Other ones may be without: an expert's that no token reached, a bias that the
        softmax cancels.
        """
        return self.is_prompt_learning

    def learning_rate_ratio(self, name: str) -> float:
        """The factor of the learning rate with which a parameter of the module is trained, by its name."""
        return 1.0

    @property
    def kind(self) -> str:
        """The method's name, followed by the values of the fields in ``ways``."""
        values = [getattr(self, name) for name in ("peft_type", *self.ways)]
        return " ".join(str(v.value if isinstance(v, Enum) else v) for v in values)

    @property
    def num_prompt_tasks(self) -> int | None:
        """The number of tasks that share the adapter's prompt, of which ``task_ids`` names one a row; None where the
        method knows no tasks."""
        return None

    def probing(self) -> PeftConfig:
        """A small config of the same kind, for the self-check of a base model."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.ways}
        if self.is_prompt_learning:
            fields["num_virtual_tokens"] = 2
        return type(self)(task_type=self.task_type, **fields)

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        """Whether PEFT computes the same outputs from the saved adapter."""
        return False

    def from_peft(self, prompt: Tensor, module: Any) -> Tensor:
        """Convert a prompt [P, W] or [P, D] from the layout of PEFT's files to softtune's.

        Args:
            prompt: the prompt.
            module: the adapter's module, which takes the shape of the prompt where PEFT gives layers none.
        """
        return prompt

    def to_saved(self, state: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
        """Convert the module's inference state to the tensors of a saved adapter."""
        return state

    def from_saved(self, state: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
        """Convert the tensors of a saved adapter, without heads, to the module's inference state."""
        return state

    def others_from_peft(self, others: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the tensors beside the prompt, as ``from_peft`` does the prompt."""
        return others

    def single(self, module: Any) -> list[nn.Module]:
        """The modules of single methods in the adapter's module: itself, where it combines none."""
        return [module]

    def recovered(self, module: Any, inference_state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """A module's own tensors, from those that inference needs; None where they do not follow."""
        return None

    @classmethod
    def implied_by_peft(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values of further fields with which softtune does what PEFT does with this config.

        They are for fields that PEFT lacks, or ignores in such a config.
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """All fields, with enum members replaced by their values."""
        return {k: v.value if isinstance(v, Enum) else v for k, v in dataclasses.asdict(self).items()}

    def peak_learning_rate(self, task: TaskType) -> float:
        """Default peak learning rate for a task."""
        beside_head = self.learning_rate_beside_head if task.has_head else None
        return beside_head or self.learning_rate

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeftConfig:
        """Create a config of the class that ``values["peft_type"]`` names.

        Raises:
            ConfigError: ``peft_type`` is missing or unknown, a key is unknown, or a value is out of range.
        """
        config_class = cls._class_for(values)
        for key in config_class.unknown_of(values):
            known = [f.name for f in dataclasses.fields(config_class)]
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"its keys are {', '.join(known)}"
            raise ConfigError(f"{config_class.__name__} has no key {key!r}", hint)
        return config_class(**values)

    @classmethod
    def from_peft_type(cls, **values: Any) -> PeftConfig:
        """Create a config as ``from_dict`` does, but drop unknown keys with a warning.

        A saved config may come from a newer PEFT or from another tool.

        Raises:
            ConfigError: ``peft_type`` is missing or unknown, or a value is out of range.
        """
        config_class = cls._class_for(values)
        return config_class.from_dict(config_class._known(values))

    @classmethod
    def _class_for(cls, values: Mapping[str, Any]) -> type[PeftConfig]:
        own_type: Any = cls.__dataclass_fields__["peft_type"].default
        return config_class_of(values.get("peft_type") or own_type)

    @classmethod
    def _known(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Drop the values whose keys are not fields, with PEFT's warning."""
        if unknown := cls.unknown_of(values):
            what = f"Unexpected keyword arguments {sorted(unknown)} for class {cls.__name__}"
            warnings.warn(f"{what}, these are ignored.", stacklevel=3)
        return {key: value for key, value in values.items() if key not in unknown}

    @classmethod
    def unknown_of(cls, values: Mapping[str, Any]) -> list[str]:
        """The keys that are not fields of the config."""
        known = {f.name for f in dataclasses.fields(cls)}
        return [key for key in values if key not in known]

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Read the JSON file of a saved config.

        Raises:
            CheckpointError: the file holds no JSON object.
        """
        content = storage.read_json(Path(path_json_file))
        if "runtime_config" in content:
            warnings.warn("the saved config has a runtime_config, which is ignored", stacklevel=2)
            del content["runtime_config"]
        return content

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
    ) -> PeftConfig:
        """Read the config of a saved adapter from a folder or a hub repository.

        Args:
            pretrained_model_name_or_path: the folder or the repository's name.
            subfolder: the folder within it.
            hub: where on the hub to look (``revision``, ``cache_dir``, ``token``).

        Raises:
            CheckpointError: there is no config, or it cannot be read.
            ConfigError: its ``peft_type`` is unknown, or a value is out of range.
            MissingPeftTypeError: it has no ``peft_type``.
        """
        hub["subfolder"] = subfolder
        path = storage.locate(pretrained_model_name_or_path, CONFIG_NAME, **hub)
        if path is None:
            raise CheckpointError(f"{pretrained_model_name_or_path} has no {CONFIG_NAME}", "is it an adapter's folder?")
        own_path = storage.locate(pretrained_model_name_or_path, OWN_CONFIG_NAME, is_optional=True, **hub)
        values = cls.from_json_file(path)
        if "peft_type" not in values:
            raise MissingPeftTypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}. "
                f"Is {path} an adapter's?"
            )
        config_class = cls._class_for(values)
        extra = storage.read_json(own_path).get("config", {}) if own_path else config_class.implied_by_peft(values)
        return config_class.from_dict({**config_class._known(values), **extra})

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the config into a folder, readable by ``from_pretrained`` and by PEFT.

        Args:
            save_directory: the folder; created if missing.
            options: those of ``push_to_hub``, which have no effect here.
        """
        with storage.staged(save_directory) as stage:
            self.write(stage, {})

    def write(self, folder: Any, notes: Mapping[str, Any]) -> None:
        """Write PEFT's fields to ``CONFIG_NAME``, and softtune's own fields with ``notes`` to ``OWN_CONFIG_NAME``."""
        values = self.to_dict()
        ours = {f.name: f.default for f in dataclasses.fields(self) if f.metadata.get("ours")}
        storage.write_json(folder / CONFIG_NAME, {k: v for k, v in values.items() if k not in ours})
        changed = {k: values[k] for k, default in ours.items() if values[k] != default}
        storage.write_json(folder / OWN_CONFIG_NAME, {**notes, "config": changed})


@dataclass(kw_only=True, eq=False)
class PromptLearningConfig(PeftConfig):
    """Base of the configs of methods with virtual tokens. The last four fields default to the base model's sizes."""

    num_virtual_tokens: PositiveInt = 20
    """P, the number of virtual tokens. PEFT has no default."""
    token_dim: PositiveInt | None = None
    """Size of a virtual token; for prefixes, of one layer's keys over all heads."""
    num_transformer_submodules: PositiveInt | None = None
    """Number of stacks that get virtual tokens, as PEFT counts them."""
    num_attention_heads: PositiveInt | None = None
    """Number of attention heads; for prefixes, of key/value heads."""
    num_layers: PositiveInt | None = None
    """Number of layers of one stack."""

    def settle(self, **sizes: int | None) -> None:
        """Fill in the sizes that the base model determines.

        Raises:
            AdapterMismatchError: the config has other sizes, from another base model.
        """
        for name, size in sizes.items():
            if getattr(self, name) not in (None, size):
                raise AdapterMismatchError(
                    f"the adapter has {name} = {getattr(self, name)}, the base model {size}",
                    f"load it on the model that it was trained on ({self.base_model_name_or_path or 'unnamed'})",
                )
            setattr(self, name, size)

    def from_peft(self, prompt: Tensor, module: Any) -> Tensor:
        """See ``PeftConfig.from_peft``: for an encoder-decoder, PEFT saves 2·P rows, of which it reads the first P."""
        return prompt[: self.num_virtual_tokens] if self.num_transformer_submodules == 2 else prompt


def _blank(config_class: type[PeftConfig]) -> PeftConfig:
    return config_class.__new__(config_class)


PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {}
"""The registry, filled by ``softtune.methods``: every method's config class, which knows all else that depends on the
method."""


def config_class_of(peft_type: PeftType | str | None) -> type[PeftConfig]:
    """Look up a method's config class.

    Raises:
        ConfigError: there is no such method.
    """
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(known_type.value for known_type in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ConfigError(f"peft_type {peft_type!r} is no method of softtune", f"use one of {known}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
