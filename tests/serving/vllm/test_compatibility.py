"""Which adapters vLLM takes, and what is written for it. None of it needs vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from softtune.backbone import Backbone
from softtune.errors import CheckpointError, UnsupportedModelError
from softtune.serving.vllm.compatibility import bake_folder
from softtune.serving.vllm.prompts import Prompts
from tests.families import P

REFUSED = {
    "infix": "vLLM takes no adapter with a prefix behind the text: serve it by the engine transformers",
    "prefix_last": "vLLM takes no adapter with a prefix in some layers alone: serve it by the engine transformers",
    "bitfit_added": "vLLM takes no adapter with trained biases: serve it by the engine transformers",
    "ia3": "vLLM takes no adapter with trained factors: serve it by the engine transformers",
    "prompt_suffix": "prompt_suffix has vectors among the words: serve it by softtune serve",
}


@pytest.fixture
def backbone(llama: str) -> Backbone:
    return Backbone(AutoModelForCausalLM.from_pretrained(llama).eval())


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p_tuning_lstm"])
def test_prefixes_are_written_layer_by_layer(backbone: Backbone, adapters: Path, kind: str, tmp_path: Path) -> None:
    assert bake_folder(backbone, adapters / kind, tmp_path / kind) == P
    prompts = Prompts(tmp_path, layers=2, heads=2, size=6)
    assert prompts.length(kind) == P
    assert prompts.read(kind).shape == (P, 2, 2, 2, 6)
    with pytest.raises(CheckpointError, match="is no prefix in every layer of this model: bake it for this model"):
        Prompts(tmp_path, layers=3, heads=2, size=6).length(kind)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_vllm_cannot_take_is_refused(backbone: Backbone, adapters: Path, kind: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        bake_folder(backbone, adapters / kind, tmp_path / kind)
    assert str(refusal.value) in (REFUSED[kind], f"{adapters}/{REFUSED[kind]}")
    assert not (tmp_path / kind).exists()


def test_windows_are_refused(backbone: Backbone, adapters: Path, tmp_path: Path) -> None:
    backbone.text_config.sliding_window = 8
    with pytest.raises(UnsupportedModelError, match="a prefix in layers that see a part of the text"):
        bake_folder(backbone, adapters / "prefix", tmp_path / "prefix")
