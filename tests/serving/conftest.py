"""Adapters of many methods on a tiny Llama, in folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.families import CAUSAL_LM, KINDS, METHODS, scramble
from tests.tiny import save_models
from transformers import AutoModelForCausalLM

from softtune import PeftModel


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama's folder."""
    return save_models(tmp_path_factory.mktemp("models"), attention_dropout=0.0)["llama"]


def save_adapter(model: str, folder: Path, kind: str, seed: int) -> None:
    """Write an adapter of random numbers."""
    config = METHODS[kind](task_type=CAUSAL_LM)
    adapted = PeftModel(AutoModelForCausalLM.from_pretrained(model), config)
    scramble(adapted, seed=seed)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="session")
def adapters(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of each kind, named by it."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, kind in enumerate([*KINDS, "p_tuning_lstm"]):
        save_adapter(llama, folder / kind, kind, seed)
    return folder
