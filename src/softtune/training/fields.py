"""Fields of recipes and sweeps: read from YAML, checked, and told of in one line where they are wrong."""

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
from softtune.wording import shortened

Model = TypeVar("Model", bound=BaseModel)

LONGEST = 200
"""Characters of a wrong value to show."""


FLOAT = "tag:yaml.org,2002:float"
NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
"""YAML 1.2's numbers with a fraction, 1e-3 among them, which PyYAML's YAML 1.1 takes for a text."""


Yaml = TypeVar("Yaml", bound=Resolver)


def _with_numbers(own: type[Yaml]) -> type[Yaml]:
    """A loader or dumper that knows ``NUMBER``."""
    own.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != FLOAT]
        for first, known in own.yaml_implicit_resolvers.items()
    }
    own.add_implicit_resolver(FLOAT, re.compile(rf"(?:{NUMBER})$"), list("-+.0123456789"))
    return own


@_with_numbers
class _Loader(yaml.SafeLoader):
    """YAML's, but for its numbers."""


@_with_numbers
class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that the loader would take for numbers."""


def from_yaml(text: str) -> Any:
    """What a text in YAML says. Raises yaml.YAMLError where it is none."""
    return yaml.load(text, _Loader)


def to_yaml(fields: Mapping[str, Any]) -> str:
    """Fields in their order as YAML, which ``from_yaml`` reads as they were."""
    return yaml.dump(dict(fields), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_fields(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The fields in a YAML file.

    Args:
        path: of the file.
        kind: what the file is called where there is none.

    Raises:
        ConfigError: there is no such file, or it is no YAML mapping.
    """
    try:
        fields = from_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no {kind} at {path}: check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {problem}" if mark and problem else " ".join(str(error).split())
        raise ConfigError(f"{path} is no YAML ({reason}): correct it") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no fields: write lines such as 'model: smollm2-135m'")
    return fields


def checked(model: type[Model], fields: Mapping[str, Any], kind: str, hints: Mapping[str, str]) -> Model:
    """A model of these fields.

    Args:
        model: pydantic's.
        fields: its fields.
        kind: what an error calls it.
        hints: what to write in fields of several types or parts, of which pydantic tells only its own names, and where
            to put what is none of them.

    Raises:
        ConfigError: a field is unknown, missing or out of range.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        found = error.errors()
        unknown = [own for own in found if own["type"] == "extra_forbidden" and len(own["loc"]) == 1]
        reason = _what_is_wrong([*unknown, *found][0], fields, [*model.model_fields], hints)
        raise ConfigError(f"{kind}: {reason}") from None


def _what_is_wrong(
    error: Mapping[str, Any], fields: Mapping[str, Any], known: list[str], hints: Mapping[str, str]
) -> str:
    """One of pydantic's findings in the file's words."""
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
    is_told = error["type"] == "value_error" and len(error["loc"]) > 1  # by a part that knows best
    return f"{name} is {shown}: {says if is_told else hints.get(name, says)}"
