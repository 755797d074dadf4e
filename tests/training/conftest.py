"""A recipe for whole runs on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import LABELS, TEMPLATE, save_models, write_rows

from softtune.injection.frozen_layer_cache import FrozenLayerCache


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def fields(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A recipe of 9 steps over 18 rows, with 6 rows held out."""
    return {
        "model": models["llama"],
        "train": write_rows(tmp_path / "rows.csv", 24),
        "test_size": 6,
        "template": TEMPLATE,
        "label_column": "label",
        "labels": list(LABELS),
        "max_length": 24,
        "batch_size": 4,
        "epochs": 2,
        "save_steps": 4,
        "learning_rate": 0.02,
        "output": str(tmp_path / "adapter"),
        "options": {"num_virtual_tokens": 3},
    }


@pytest.fixture
def trunks(monkeypatch: pytest.MonkeyPatch) -> list[FrozenLayerCache]:
    """All trunks that the test makes."""
    made: list[FrozenLayerCache] = []
    begin = FrozenLayerCache.__init__

    def note(self: FrozenLayerCache, *arguments: Any) -> None:
        made.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(FrozenLayerCache, "__init__", note)
    return made
