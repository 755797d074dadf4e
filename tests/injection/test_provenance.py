"""Tags of caches and states: what they are put on, what they say, and which of them agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from softtune.injection.provenance import BASE, AdapterNames, differ, joined_names, provenance_of, tag_provenance

WORKS: dict[str, Any] = {
    "cache": DynamicCache,
    "tensor": lambda: torch.zeros(2),
    "states": lambda: [torch.zeros(2), torch.ones(2)],
}


@pytest.mark.parametrize("kind", WORKS)
def test_a_tag_stays_with_its_work_until_the_next_one(kind: str) -> None:
    work, other = WORKS[kind](), WORKS[kind]()
    assert provenance_of(work) == (BASE,)
    tag_provenance(work, ("red", "blue"))
    assert provenance_of(work) == ("red", "blue")
    assert provenance_of(other) == (BASE,)
    tag_provenance(work, (BASE,))
    assert provenance_of(work) == (BASE,)


def test_a_list_is_known_by_its_first_state() -> None:
    """A model may return its states in a new list."""
    states = WORKS["states"]()
    tag_provenance(states, ("red",))
    assert provenance_of([*states]) == ("red",)
    assert provenance_of(states[1:]) == (BASE,)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (("red",), ("red",), False),
        (("red",), ("blue",), True),
        (("red",), (BASE,), True),
        ((BASE,), (BASE,), False),
        # One name is for all rows.
        (("red",), ("red", "red", "red"), False),
        (("red", "red"), ("red", "red", "red", "red"), False),
        (("red",), ("red", "blue"), True),
        (("blue", "blue"), ("red",), True),
        # Several are for one row each.
        (("red", "blue"), ("red", "blue"), False),
        (("red", "blue"), ("blue", "red"), True),
        (("red", BASE), ("red", "red"), True),
        (("red", "blue"), ("red", "blue", "red"), True),
    ],
)
def test_tags_differ_where_any_rows_adapter_does(one: AdapterNames, other: AdapterNames, expected: bool) -> None:
    assert differ(one, other) is expected
    assert differ(other, one) is expected


@pytest.mark.parametrize(
    ("owners", "expected"),
    [
        (("red",), "red"),
        ((BASE,), "the base model"),
        (("red", "blue", "red"), "red, blue"),
        (("blue", BASE, BASE, "red"), "blue, the base model, red"),
        ((), ""),
    ],
)
def test_names_in_a_message_come_once_and_in_order(owners: AdapterNames, expected: str) -> None:
    assert joined_names(owners) == expected
