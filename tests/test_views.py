"""What other libraries look up on a model with adapters: its classes, its ``forward``'s parameters, the base model."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments, pipeline
from transformers.utils import find_labels  # type: ignore[attr-defined]

import softtune
from softtune import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, BitFitConfig, PeftModel, get_peft_model
from softtune.views import BaseView
from tests.families import CAUSAL_LM, FAMILIES, METHODS, QUESTION_ANS, SEQ_2_SEQ_LM, SEQ_CLS, adapted, base_model
from tests.tiny import tokenizer

IDS = torch.tensor([[5, 6, 7, 8]])
TASKS = {CAUSAL_LM: "llama", SEQ_2_SEQ_LM: "t5", SEQ_CLS: "bert", QUESTION_ANS: "bert"}


@pytest.mark.parametrize("task", TASKS)
def test_the_class_is_the_tasks_in_peft_and_without_it(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(TASKS[task], task, "prefix")
    name = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
    assert isinstance(model, getattr(peft, name))
    assert isinstance(model, getattr(softtune, name))
    assert isinstance(model, PeftModel)
    monkeypatch.delitem(sys.modules, "peft")
    assert model.__class__.__name__ == name
    assert issubclass(model.__class__, getattr(softtune, name))


def test_a_model_without_a_task_has_the_plain_class() -> None:
    model = get_peft_model(base_model("gpt2", CAUSAL_LM), BitFitConfig())
    assert model.__class__ is peft.PeftModel


@pytest.mark.parametrize("task", TASKS)
def test_forward_has_the_base_models_parameters(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers choose a data set's columns by them, and what the labels are called."""
    model, base = adapted(TASKS[task], task, "prompt"), base_model(TASKS[task], task)
    monkeypatch.delitem(sys.modules, "peft")
    found, own = inspect.signature(model.forward).parameters, inspect.signature(base.forward).parameters
    assert {*own} <= {*found}
    assert [*found][:2] == ["input_ids", "attention_mask"]
    takes_more = [inspect.Parameter.VAR_KEYWORD in {p.kind for p in some.values()} for some in (found, own)]
    assert takes_more[0] == takes_more[1]
    assert find_labels(model.__class__) == find_labels(type(base))


def test_the_base_model_by_pefts_two_ways() -> None:
    """PEFT's prompts have it as ``base_model``, PEFT's LoRA as ``base_model.model``."""
    base = base_model("llama", CAUSAL_LM)
    model = get_peft_model(base, METHODS["prefix"](task_type=CAUSAL_LM))
    view = model.base_model
    assert model.get_base_model() is base
    assert view == base
    assert base == view
    assert hash(view) == hash(base)
    assert view == model.base_model
    assert isinstance(view, PreTrainedModel)
    assert isinstance(view.model, type(base))
    assert view.model._get_name() == "LlamaForCausalLM"
    assert view.model.layers is base.model.layers
    assert view.lm_head is base.lm_head
    assert view.config is base.config
    assert torch.equal(view(IDS).logits, base(IDS).logits)
    assert torch.equal(view.model(IDS).logits, base(IDS).logits)
    assert "lm_head" in dir(view)
    assert repr(view) == repr(base)


def test_what_is_set_on_a_view_is_set_on_the_base_model() -> None:
    base = base_model("gpt2", CAUSAL_LM)
    view = BaseView(base)
    view.note = 3
    assert base.note == 3
    del view.note
    assert not hasattr(base, "note")
    with pytest.raises(AttributeError, match="nothing"):
        _ = view.model.nothing


def test_layers_are_set_where_they_are_found() -> None:
    model = adapted("llama", CAUSAL_LM, "prompt")
    inner = model.get_base_model().model
    model.base_model.model.layers = inner.layers[:1]
    assert len(inner.layers) == 1
    assert not hasattr(model.get_base_model(), "layers")


def test_a_class_makes_models_of_its_class() -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    other = type(model)(base_model("gpt2", CAUSAL_LM), METHODS["prefix"](task_type=CAUSAL_LM))
    assert type(other) is type(model)
    assert type(pickle.loads(pickle.dumps(other))) is type(model)


def test_a_view_is_copied_and_pickled_as_its_model() -> None:
    base = base_model("gpt2", CAUSAL_LM)
    again = copy.deepcopy(BaseView(base))
    assert type(again) is type(base)
    assert again != base
    assert isinstance(pickle.loads(pickle.dumps(BaseView(base))), PreTrainedModel)


@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_what_generate_goes_by_can_be_set_on_the_wrapper(name: str) -> None:
    model = adapted("llama", CAUSAL_LM, "prefix")
    other = copy.deepcopy(getattr(model, name))
    setattr(model, name, other)
    assert getattr(model.get_base_model(), name) is other
    if name == "generation_config":
        other.max_new_tokens = 2
        assert model.generate(IDS, do_sample=False).shape[1] == IDS.shape[1] + 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_of_the_same_class(duplicate: Any) -> None:
    model = adapted("gpt2", CAUSAL_LM, "prefix")
    again = duplicate(model)
    assert type(again) is type(model)
    assert again.get_base_model() is not model.get_base_model()
    assert again.backbone.model is again._modules["base_model"]
    assert torch.equal(again(IDS).logits, model(IDS).logits)


SMOOTH = 0.1


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "t5", "bart"])
def test_label_smoothing_is_that_of_the_next_token(family: str, method: str, tmp_path: Path) -> None:
    task = FAMILIES[family].tasks[0]
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    if task == SEQ_2_SEQ_LM:
        started = base_model(family, task).prepare_decoder_input_ids_from_labels(ids)
        rows = [{**row, "decoder_input_ids": own} for row, own in zip(rows, started, strict=True)]
    settings = {"label_smoothing_factor": SMOOTH, "per_device_eval_batch_size": 4, "report_to": "none"}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **settings)

    def share(model: Any) -> float:
        """The Trainer's loss, in losses by hand: it divides by the number of all labels, or of those that count."""
        loss: float = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
        return loss / smoothed(model, ids, task)

    expected = share(base_model(family, task))
    assert any(expected == pytest.approx(known, rel=1e-4) for known in (1, 8 / 9))
    assert share(adapted(family, task, method)) == pytest.approx(expected, rel=1e-4)


def smoothed(model: Any, ids: Tensor, task: str) -> float:
    """The smoothed loss of the next token."""
    with torch.no_grad():
        logits = model(input_ids=ids, labels=ids).logits
    pairs = (logits[:, :-1], ids[:, 1:]) if task == CAUSAL_LM else (logits, ids)
    log = torch.log_softmax(pairs[0], -1)
    own = log.gather(-1, pairs[1][..., None])[..., 0]
    return float(-((1 - SMOOTH) * own + SMOOTH * log.mean(-1)).mean())


def said_by_a_pipeline(model: PeftModel) -> list[str]:
    found = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())
    transformers.logging.add_handler(handler)
    try:
        pipeline("text-generation", model=model, tokenizer=tokenizer(ends=False))
    finally:
        transformers.logging.remove_handler(handler)
    return found


@pytest.mark.parametrize("with_peft", [True, False])
def test_a_pipeline_knows_the_class(with_peft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_peft:
        monkeypatch.delitem(sys.modules, "peft")
    assert said_by_a_pipeline(adapted("llama", CAUSAL_LM, "prefix")) == []
    without_task = get_peft_model(base_model("llama", CAUSAL_LM), METHODS["prefix"]())
    assert "'PeftModel' is not supported" in said_by_a_pipeline(without_task)[0]
