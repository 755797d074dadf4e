"""Adapters of many methods on a tiny Llama, in folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import CAUSAL_LM, KINDS, METHODS, save_adapter
from tests.tiny import save_models


@pytest.fixture(scope="session")
def base_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of a tiny Llama, BERT and T5."""
    return save_models(tmp_path_factory.mktemp("models"), attention_dropout=0.0)


@pytest.fixture(scope="session")
def llama(base_models: dict[str, str]) -> str:
    """A tiny Llama's folder."""
    return base_models["llama"]


@pytest.fixture(scope="session")
def adapters(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of each kind, named by it."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, kind in enumerate([*KINDS, "p_tuning_lstm"]):
        save_adapter(llama, folder / kind, METHODS[kind](task_type=CAUSAL_LM), seed)
    return folder
