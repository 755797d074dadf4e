"""One base model for all tasks: what its heads share is in memory once, and what they do not is their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from softtune.errors import ConfigError
from softtune.methods import TaskType
from softtune.serving.bases import Bases

INPUT_IDS = torch.tensor([[3, 4, 5, 6]])


def tensors(bases: Bases, task: TaskType, num_labels: int | None = None) -> dict[str, Tensor]:
    return dict(bases.model(task, num_labels).backbone.model.named_parameters())


def test_heads_share_all_tensors_but_their_own(llama: str) -> None:
    bases = Bases(llama)
    writing = tensors(bases, TaskType.CAUSAL_LM)
    judging = tensors(bases, TaskType.SEQ_CLS, 3)
    assert writing.keys() - judging.keys() == {"lm_head.weight"}
    assert judging.keys() - writing.keys() == {"score.weight"}
    for name in writing.keys() & judging.keys():
        assert writing[name].data_ptr() == judging[name].data_ptr(), name


def test_heads_of_one_name_that_differ_stay_apart(base_models: dict[str, str]) -> None:
    bases = Bases(base_models["bert"])
    texts, tokens = tensors(bases, TaskType.SEQ_CLS, 3), tensors(bases, TaskType.TOKEN_CLS, 3)
    assert texts["classifier.weight"].shape == tokens["classifier.weight"].shape
    assert not torch.equal(texts["classifier.weight"], tokens["classifier.weight"])
    more = tensors(bases, TaskType.SEQ_CLS, 4)
    assert more["classifier.weight"].shape[0] == 4
    name = "bert.embeddings.word_embeddings.weight"
    assert len({own[name].data_ptr() for own in (texts, tokens, more)}) == 1


def test_sharing_changes_no_output(llama: str, base_models: dict[str, str]) -> None:
    bases = Bases(llama)
    bases.model(TaskType.SEQ_CLS, 3)
    found = bases.model(TaskType.CAUSAL_LM).backbone.model(INPUT_IDS).logits
    assert torch.equal(found, AutoModelForCausalLM.from_pretrained(llama).eval()(INPUT_IDS).logits)
    judging = Bases(base_models["bert"])
    judging.model(TaskType.TOKEN_CLS, 2)
    found = judging.model(TaskType.SEQ_CLS).backbone.model(INPUT_IDS).logits
    alone = AutoModelForSequenceClassification.from_pretrained(base_models["bert"]).eval()
    assert torch.equal(found, alone(INPUT_IDS).logits)


def test_a_model_is_loaded_once(llama: str) -> None:
    bases = Bases(llama)
    model = bases.model(TaskType.SEQ_CLS, 3)
    assert not model.training
    assert bases.model(TaskType.SEQ_CLS, 3) is model
    assert bases.model(TaskType.SEQ_CLS, 2) is not model
    assert bases.tokenizer("red")["input_ids"] == [3]


def test_what_is_not_there_is_said(llama: str, tmp_path: Path, base_models: dict[str, str]) -> None:
    assert Bases(llama).is_there
    missing = Bases(str(tmp_path / "nowhere"))
    assert not missing.is_there
    with pytest.raises(ConfigError):
        missing.model(TaskType.CAUSAL_LM)
    (tmp_path / "empty").mkdir()
    assert not Bases(str(tmp_path / "empty")).is_there
    encoder = Bases(base_models["bert"])  # which writes nothing, but is there
    assert encoder.is_there
    with pytest.raises(ConfigError):
        encoder.model(TaskType.CAUSAL_LM)
