"""What recipes, sweeps and flags read and write as YAML."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from softtune.cli.flags import read
from softtune.training.fields import from_yaml, to_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-1E+3", -1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("2.5e4", 2.5e4),
        (".inf", float("inf")),
        ("3", 3),
        ("'1e-3'", "1e-3"),
        ("1e", "1e"),
        ("1:30.5", "1:30.5"),
        ("first:10", "first:10"),
        ("[1e-3, 3e-3]", [1e-3, 3e-3]),
        ("{low: 1e-4, high: 1e-2, log: true}", {"low": 1e-4, "high": 1e-2, "log": True}),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    for found in (from_yaml(text), read("over", text)):
        assert found == value
        assert type(found) is type(value)


def test_what_is_written_is_read_as_it_was() -> None:
    fields = {"b": ["1e-3", 1e-05, "0.5", 3, True, "yes", None, "1.5e3"], "a": {"ä": "1E5", "x": [1e30, "-.5"]}}
    assert from_yaml(to_yaml(fields)) == fields
    assert [*from_yaml(to_yaml(fields))] == ["b", "a"]


def test_other_readers_of_yaml_stay_as_they_are() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
