"""The fields of a recipe as flags of a command."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from pydantic.fields import FieldInfo
from rich.markup import escape

from softtune.errors import ConfigError
from softtune.load_fields import LoadFields
from softtune.peft_types import TRAINED_TASKS, TaskType
from softtune.training.fields import from_yaml
from softtune.training.recipe_fields import RecipeFields

FIELDS: dict[str, FieldInfo] = {**RecipeFields.model_fields, **LoadFields.model_fields}
"""Those of a recipe."""


def with_flags(command: Callable[..., None], own: Sequence[Parameter], left_out: Collection[str] = ()) -> None:
    """Give a command its own parameters and, as ``**flags``, an option for every other field of the recipe, but for
    those that are left out."""
    names = {*left_out, *(parameter.name for parameter in own)}
    parameters = [*own, *(_parameter(name) for name in FIELDS if name not in names)]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


LOAD_FLAGS = [name for name in LoadFields.model_fields if name != "fsdp"]
"""The fields of ``LoadOptions`` that are for one process."""


def with_load_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command of one process an option for every field of ``LoadOptions``; it takes those given as ``load``."""

    @wraps(command)
    def with_load(*args: Any, **options: Any) -> None:
        flags = {name: options.pop(name) for name in LOAD_FLAGS}
        command(*args, load=overrides(flags), **options)

    own = [parameter for parameter in signature(command, eval_str=True).parameters.values() if parameter.name != "load"]
    parameters = [*own, *(_parameter(name) for name in LOAD_FLAGS)]
    with_load.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    with_load.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_load


def argument(name: str, annotation: Any, **options: Any) -> Parameter:
    """A positional argument of a command."""
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[annotation, typer.Argument(**options)])


def option(name: str, annotation: Any, default: Any = Parameter.empty, **options: Any) -> Parameter:
    """An option of a command; required if it has no default."""
    annotation = Annotated[annotation, typer.Option(flag(name), **options)]
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def overrides(flags: Mapping[str, str | None]) -> dict[str, Any]:
    """The fields of a recipe that are set by flags, with their values.

    Raises:
        ConfigError: a flag's text is not valid YAML.
    """
    return {name: _value(name, text) for name, text in flags.items() if text is not None}


def words(flags: Mapping[str, str | None]) -> list[str]:
    """The given flags as arguments of a command line."""
    return [part for name, text in flags.items() if text is not None for part in (flag(name), text)]


def flag(name: str) -> str:
    """The flag of a field, such as ``--learning-rate``."""
    return f"--{name.replace('_', '-')}"


def _parameter(name: str) -> Parameter:
    field = FIELDS[name]
    choices = _choices(field.annotation)
    listed = f" One of {', '.join(choices)}." if choices else ""
    shown = field.default.value if isinstance(field.default, Enum) else field.default
    default = "" if field.is_required() or shown in (None, "") else f" [default: {shown}]"
    panel = {"rich_help_panel": "The base model"} if name in LoadFields.model_fields else {}
    return option(name, str | None, None, help=escape(f"{field.description}{listed}{default}"), **panel)


def _value(name: str, text: str) -> Any:
    """Convert a flag's text to its field's type: strings are taken unchanged, except null; all else is YAML."""
    annotation = FIELDS[name].annotation
    if annotation in (str, str | None):
        return None if annotation is not str and text == "null" else text
    return read(name, text)


def read(name: str, text: str) -> Any:
    """Parse a flag's text as YAML.

    Raises:
        ConfigError: it is not valid YAML.
    """
    try:
        return from_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag(name)} {text!r} cannot be read", "write it as in a YAML file") from error


def read_mapping(name: str, text: str) -> dict[str, Any]:
    """Parse a flag's text as a YAML mapping.

    Raises:
        ConfigError: it is not valid YAML, or not a mapping.
    """
    value = read(name, text)
    if not isinstance(value, dict):
        raise ConfigError(f"{flag(name)} {text!r} names no values", "write it as in '{name: value}'")
    return value


def _choices(annotation: Any) -> list[str]:
    """The values that a field allows; empty if they cannot be listed."""
    if annotation is TaskType:
        return [task.value for task in TRAINED_TASKS]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.value for member in annotation]
    choices = next((part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal), None)
    return list(get_args(choices)) if get_origin(annotation) is not list else []
