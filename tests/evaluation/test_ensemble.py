"""Several adapters answer in turn, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tests.tiny import LABELS, TEMPLATE, save_models, tokenizer
from transformers import AutoModelForCausalLM

from softtune import AdapterError, PeftModel, PrefixTuningConfig
from softtune.data import Template, Verbalizer
from softtune.evaluation.answers import answer
from softtune.evaluation.ensemble import answer_each
from softtune.methods import TaskType
from softtune.tasks import LabelTask

RECORDS = Dataset.from_dict({"words": ["red the sky", "blue"]})


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    folder = save_models(tmp_path_factory.mktemp("models"))["llama"]
    made = PeftModel(AutoModelForCausalLM.from_pretrained(folder))
    for name in ("1", "2"):
        made.add_adapter(name, PrefixTuningConfig(num_virtual_tokens=3, init_weights="random", task_type="CAUSAL_LM"))
    return made


def test_each_adapter_and_the_base_model_answer_in_turn(model: PeftModel) -> None:
    words = tokenizer(ends=False)
    task = LabelTask(
        kind=TaskType.CAUSAL_LM,
        template=Template(TEMPLATE),
        label_column="label",
        verbalizer=Verbalizer.from_labels(list(LABELS)),
        max_length=24,
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    found = answer_each(model, words, task, RECORDS, names=["2", "__base__", "1"])
    assert model.active_adapters == ["1"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    expected = []
    for name in ("2", "1"):
        model.set_adapter(name)
        expected.append(answer(model, words, task, RECORDS).scores)
    with model.disable_adapter():
        expected.insert(1, answer(model, words, task, RECORDS).scores)
    for member, scores in zip(found, expected, strict=True):
        torch.testing.assert_close(member.scores, scores, rtol=0, atol=0)
    assert len({tuple(member.scores.flatten().tolist()) for member in found}) == 3
    with pytest.raises(AdapterError, match="nobody"):
        answer_each(model, words, task, RECORDS, names=["2", "nobody"])
    assert model.active_adapters == ["1"]
