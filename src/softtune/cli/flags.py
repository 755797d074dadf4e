"""Every field of a recipe as a flag of a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from inspect import Parameter, Signature
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from rich.markup import escape

from softtune.errors import ConfigError
from softtune.methods import TaskType
from softtune.pretrained import MODEL_CLASSES
from softtune.training.fields import from_yaml
from softtune.training.recipe import Recipe


def with_flags(command: Callable[..., None], own: Sequence[Parameter]) -> None:
    """Give a command parameters of its own and, as ``**flags``, one for every field of the recipe that it has not."""
    names = {parameter.name for parameter in own}
    parameters = [*own, *(_parameter(name) for name in Recipe.model_fields if name not in names)]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def argument(name: str, annotation: Any, **options: Any) -> Parameter:
    """A command's own argument."""
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[annotation, typer.Argument(**options)])


def option(name: str, annotation: Any, default: Any = Parameter.empty, **options: Any) -> Parameter:
    """A command's own option; required without a default."""
    annotation = Annotated[annotation, typer.Option(flag(name), **options)]
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def overrides(flags: Mapping[str, str | None]) -> dict[str, Any]:
    """Fields of the recipe by the flags that were given.

    Raises:
        ConfigError: a flag's text is no YAML.
    """
    return {name: _value(name, text) for name, text in flags.items() if text is not None}


def words(flags: Mapping[str, str | None]) -> list[str]:
    """The flags that were given, as on the command line."""
    return [part for name, text in flags.items() if text is not None for part in (flag(name), text)]


def flag(name: str) -> str:
    """A field's flag."""
    return f"--{name.replace('_', '-')}"


def _parameter(name: str) -> Parameter:
    field = Recipe.model_fields[name]
    choices = _choices(field.annotation)
    listed = f" One of {', '.join(choices)}." if choices else ""
    shown = field.default.value if isinstance(field.default, Enum) else field.default
    default = "" if field.is_required() or shown is None else f" [default: {shown}]"
    return option(name, str | None, None, help=escape(f"{field.description}{listed}{default}"))


def _value(name: str, text: str) -> Any:
    """A flag's text as the field's type wants it: texts as they are, but for a null, and all else read as YAML."""
    annotation = Recipe.model_fields[name].annotation
    if annotation in (str, str | None):
        return None if annotation is not str and text == "null" else text
    return read(name, text)


def read(name: str, text: str) -> Any:
    """A flag's text as YAML. Raises ConfigError where it is none."""
    try:
        return from_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag(name)} {text!r} cannot be read: write it as in a YAML file") from error


def read_mapping(name: str, text: str) -> dict[str, Any]:
    """A flag's text as a mapping. Raises ConfigError where it is none."""
    value = read(name, text)
    if not isinstance(value, dict):
        raise ConfigError(f"{flag(name)} {text!r} names no values: write it as in '{{name: value}}'")
    return value


def _choices(annotation: Any) -> list[str]:
    """The values that a field can have, where they can be listed."""
    if annotation is TaskType:
        return [task.value for task in MODEL_CLASSES]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.value for member in annotation]
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []
