"""Tables of experiments in narrow consoles."""

from __future__ import annotations

from typing import Any

import pytest

from softtune.cli.console import console
from softtune.cli.entries import show_entries
from softtune.experiments.outcomes import Entry, Outcome

NUMBERS: dict[str, Any] = {
    "metrics": {"bleu": 0.25, "rouge_l": 0.5, "chrf": 0.5, "exact_match": 0.125},
    "trained": 124_439_808,
    "total": 124_439_808,
    "stored": 10**9,
    "seconds": 1234.5,
    "memory": 10**9,
    "steps": 3,
    "training_rows": 8,
    "evaluation_rows": 4,
}
HEADS = ["bleu", "rouge l", "chrf", "exact match", "trained", "share", "seconds", "stored", "peak memory"]


@pytest.mark.parametrize("at", [{}, {"epochs": 1}])
@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_word_breaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, at: dict[str, Any]
) -> None:
    monkeypatch.setattr(console, "width", width)
    name = "through an MLP, rate 0.003, prefix-tuning"
    show_entries([Entry(name=name, at=at, outcomes=[Outcome(**NUMBERS)] * 2)])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    for text in [*(HEADS[:6] if at else HEADS), "0.250 ± 0.000", "124,439,808", "prefix-tuning"]:
        assert text in shown
    assert shown.count("┏") <= {40: 9, 60: 5, 80: 4, 200: 2}[width]
