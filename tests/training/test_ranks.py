"""Without other processes nothing is shared; tests/distributed has what two of them do."""

from __future__ import annotations

import pytest
import torch

from softtune.errors import ConfigError, TrainingError
from softtune.training import ranks


def test_one_process_has_everything() -> None:
    assert (ranks.world_size(), ranks.rank(), ranks.is_main_process()) == (1, 0, True)
    assert [*ranks.part(5)] == [0, 1, 2, 3, 4]
    assert ranks.all_gather("own") == ["own"]
    assert ranks.any_of(True) is True
    assert ranks.all_reduce(torch.tensor(3.0)) == 3


def test_parts_are_neighbours_that_make_up_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    found = []
    for index in range(3):
        monkeypatch.setattr(ranks, "rank", lambda index=index: index)
        found.append([*ranks.part(8)])
    assert found == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_an_error_is_raised_or_returned_as_the_work_did() -> None:
    with pytest.raises(ConfigError, match="nothing is there: look again"):
        ranks.on_main_process(_failing)
    error = TrainingError("it failed", "try again")
    assert ranks.on_main_process(lambda: error) is error


def _failing() -> None:
    raise ConfigError("nothing is there", "look again")
