"""Errors say what is wrong and what to do, in one line and apart."""

from __future__ import annotations

import pickle
import re

import pytest

from softtune import errors
from softtune.errors import SofttuneError

CLASSES = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("error_class", CLASSES)
def test_what_and_remedy_are_kept_apart(error_class: type[SofttuneError]) -> None:
    error = error_class("the batch has 3 rows: too many", "lower batch_size")
    assert str(error) == "the batch has 3 rows: too many: lower batch_size"
    assert (error.what, error.remedy) == ("the batch has 3 rows: too many", "lower batch_size")
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("error_class", CLASSES)
def test_a_place_stands_in_front(error_class: type[SofttuneError]) -> None:
    placed = error_class("column 'text' is empty", "drop the row").at("row 3").at("sms.csv")
    assert type(placed) is error_class
    assert str(placed) == "sms.csv: row 3: column 'text' is empty: drop the row"
    assert placed.remedy == "drop the row"
    assert str(error_class("nothing to do").at("here")) == "here: nothing to do"


@pytest.mark.parametrize("error_class", CLASSES)
def test_errors_come_whole_from_another_process(error_class: type[SofttuneError]) -> None:
    error = pickle.loads(pickle.dumps(error_class("no such file", "check the path")))
    assert type(error) is error_class
    assert (str(error), error.what, error.remedy) == ("no such file: check the path", "no such file", "check the path")


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn = re.findall(r"^([ │├└─]+)(\w+Error)", errors.__doc__ or "", re.MULTILINE)
    assert sorted(name for _, name in drawn) == sorted(errors.__all__)
    above: dict[int, str] = {}
    for lines, name in drawn:
        parent = max((depth for depth in above if depth < len(lines)), default=None)
        if parent is not None:
            assert getattr(errors, above[parent]) in getattr(errors, name).__mro__
        above = {depth: other for depth, other in above.items() if depth < len(lines)} | {len(lines): name}
