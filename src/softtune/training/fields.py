"""Fields of recipes and sweeps: reads them from YAML, validates them, and reports an invalid one in one line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.resolver import Resolver

from softtune.errors import ConfigError
from softtune.formatting import shortened

Model = TypeVar("Model", bound=BaseModel)

LONGEST = 200
"""Characters of an invalid value to show."""


FLOAT = "tag:yaml.org,2002:float"
NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
"""YAML 1.2's floats, among them 1e-3, which PyYAML, with YAML 1.1, reads as a string."""


Yaml = TypeVar("Yaml", bound=Resolver)


def _with_numbers(resolver: type[Yaml]) -> type[Yaml]:
    """Make a loader or dumper resolve ``NUMBER`` as a float."""
    resolver.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != FLOAT]
        for first, known in resolver.yaml_implicit_resolvers.items()
    }
    resolver.add_implicit_resolver(FLOAT, re.compile(rf"(?:{NUMBER})$"), list("-+.0123456789"))
    return resolver


@_with_numbers
class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats."""


@_with_numbers
class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, with quotes around strings that the loader would read as numbers."""


def from_yaml(text: str) -> Any:
    """Parse a text as YAML.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, _Loader)


def to_yaml(fields: Mapping[str, Any]) -> str:
    """Format fields as YAML, in their order, so that ``from_yaml`` restores them."""
    return yaml.dump(dict(fields), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_fields(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read the fields in a YAML file.

    Args:
        path: of the file.
        kind: name of this kind of file for the error message, such as "recipe".

    Raises:
        ConfigError: there is no such file, or it is no YAML mapping.
    """
    try:
        fields = from_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no {kind} at {path}", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {problem}" if mark and problem else " ".join(str(error).split())
        raise ConfigError(f"{path} is no YAML ({reason})", "correct it") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no fields", "write lines such as 'model: smollm2-135m'")
    return fields


def checked(model: type[Model], fields: Mapping[str, Any], kind: str, hints: Mapping[str, str]) -> Model:
    """Validate fields and build a pydantic model of them.

    Args:
        model: the pydantic model's class.
        fields: its fields.
        kind: name of the model for the error message, such as "recipe".
        hints: by name of a field, what to write in it, for union and nested types where pydantic's message names only
            internal types; by name of an unknown field, what to do instead.

    Raises:
        ConfigError: a field is unknown, missing or out of range.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        errors = error.errors()
        unknown = [entry for entry in errors if entry["type"] == "extra_forbidden" and len(entry["loc"]) == 1]
        reason = _what_is_wrong([*unknown, *errors][0], fields, [*model.model_fields], hints)
        raise ConfigError(f"{kind}: {reason}") from None


def _what_is_wrong(
    error: Mapping[str, Any], fields: Mapping[str, Any], known: list[str], hints: Mapping[str, str]
) -> str:
    """Format one of pydantic's errors in terms of the file's fields."""
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        close = difflib.get_close_matches(name, known, n=1)
        remedy = hints.get(name) or f"use {close[0] if close else 'one of ' + ', '.join(known)}"
        return f"{name}: no such field: {remedy}"
    if name not in fields:
        return f"{name} is missing: {hints.get(name, 'add it')}"
    shown = shortened(repr(fields[name]), LONGEST)
    says = str(error["msg"]).removeprefix("Value error, ").replace("Input should", "it should", 1)
    is_told = error["type"] == "value_error" and len(error["loc"]) > 1  # by a nested, more specific validator
    return f"{name} is {shown}: {says if is_told else hints.get(name, says)}"
