"""Training that trains nothing is told after the first backward pass, and other training is not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from softtune import PeftModel, TrainingError
from softtune.compat import enable_checkpointing
from softtune.gradients import GradientWatch, NoGradientWarning, without_gradient
from softtune.training.trainer import AdapterTrainer, training_arguments
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    METHODS,
    QUESTION_ANS,
    SEQ_CLS,
    adapted,
    answers,
    batch,
    cases,
    labels_for,
    texts,
)

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
RECORDS = [{"input_ids": row, "labels": row} for row in IDS]


class Zeros(torch.autograd.Function):
    """As a quantised layer without a backward: zeros come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient)


class Nothing(Zeros):
    """None comes back."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return None


def cut(model: PeftModel, how: str) -> PeftModel:
    """Let no gradient through the last layer's attention and MLP, or none at all."""
    norm = model.get_base_model().model.norm

    def stop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        cuts = {"zeros": Zeros.apply, "nothing": Nothing.apply, "detached": lambda x: x.detach().requires_grad_()}
        return cuts[how](output)

    norm.register_forward_hook(stop)
    return model.train()


@pytest.mark.parametrize("how", ["zeros", "nothing", "detached"])
@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning_lstm"])
def test_a_bare_loop_is_warned_once(method: str, how: str) -> None:
    model = cut(adapted("llama", CAUSAL_LM, method), how)
    with pytest.warns(NoGradientWarning, match=r"default\..* got no gradient, or zeros only: .*softtune check") as told:
        model(IDS, labels=IDS).loss.backward()
    assert len(told) == 1
    model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize(("family", "task", "method"), cases(families=("llama", "bert", "t5", "bloom")))
def test_training_that_trains_is_not_warned(family: str, task: str, method: str) -> None:
    model, rows = adapted(family, task, method).train(), texts(family, task)
    inputs = batch(rows)
    model(**inputs, labels=labels_for(task, inputs)).loss.backward()
    assert model.gradient_watch.is_over
    trained = model.adapter("default").trained
    if METHODS[method](task_type=task).is_prompt_learning:
        assert not without_gradient({name: p.grad for name, p in trained.items()})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["prefix", "prompt_suffix", "bitfit_added"])
def test_checkpointed_layers_are_not_mistaken(method: str, reentrant: bool) -> None:
    model = adapted("llama", CAUSAL_LM, method).train()
    enable_checkpointing(model, use_reentrant=reentrant)
    model(IDS, labels=IDS).loss.backward()
    assert model.gradient_watch.is_over


def test_gradients_of_something_else_are_not_mistaken() -> None:
    model = adapted("llama", CAUSAL_LM, "prefix").train()
    words = model.get_input_embeddings()(IDS).requires_grad_()
    torch.autograd.grad(model(inputs_embeds=words, labels=IDS).loss, words)
    assert not model.gradient_watch.is_over


def test_adapters_that_a_batch_lacks_are_not_mistaken() -> None:
    model = adapted("llama", CAUSAL_LM, "prefix").train()
    model.add_adapter("other", METHODS["prompt"](task_type=CAUSAL_LM))
    model.set_requires_grad(["default", "other"])
    model(IDS, labels=IDS, adapter_names=["default", "__base__"]).loss.backward()
    assert model.gradient_watch.is_over


def test_a_stock_trainer_is_warned(tmp_path: Path) -> None:
    model = cut(adapted("llama", CAUSAL_LM, "prefix"), "zeros")
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    with pytest.warns(NoGradientWarning):
        Trainer(model, arguments, train_dataset=RECORDS).train()


def test_softtunes_own_trainer_stops(tmp_path: Path) -> None:
    model = cut(adapted("llama", CAUSAL_LM, "prefix"), "zeros")
    before = [p.clone() for p in model.adapter("default").trained.values()]
    trainer = AdapterTrainer(model, args=training_arguments(tmp_path, max_steps=3), train_dataset=RECORDS)
    with pytest.raises(TrainingError, match=r"embedding.weight of 1 trained tensors got no"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(*pair) for pair in zip(before, model.adapter("default").trained.values(), strict=True))


def test_a_forward_without_a_backward_leaves_nothing_behind() -> None:
    model = adapted("llama", CAUSAL_LM, "prefix").train()
    (parameter,) = model.adapter("default").trained.values()
    for _ in range(40):
        model(IDS, labels=IDS)
    assert len(parameter._backward_hooks or ()) == 1
    model.eval()
    for _ in range(40):
        model(IDS, labels=IDS)
    assert not parameter._backward_hooks
    cut(model, "zeros")
    with pytest.warns(NoGradientWarning):
        model(IDS, labels=IDS).loss.backward()


def test_a_model_that_is_watched_can_be_copied_and_pickled() -> None:
    model = adapted("llama", CAUSAL_LM, "prefix").train()
    model(IDS, labels=IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.gradient_watch.is_over
        other(IDS, labels=IDS).loss.backward()


def test_without_training_nothing_is_watched() -> None:
    model = adapted("bert", SEQ_CLS, "prefix")
    with torch.no_grad():
        model(IDS)
    assert model.gradient_watch._evaluations == 0


def test_one_of_several_tensors() -> None:
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    watch = GradientWatch()
    loss = (first * second.detach()).sum()
    watch.attach([loss], {"first": first, "second": second}, list, in_training=True)
    with pytest.warns(NoGradientWarning, match="second of 2 trained tensors"):
        loss.backward()
    watch = GradientWatch()
    loss = (first * second.detach()).sum()
    watch.attach([loss], {"first": first, "second": second}, lambda idle: [], in_training=True)
    loss.backward()
    assert watch.is_over


@pytest.mark.parametrize("task", [QUESTION_ANS, SEQ_CLS])
def test_a_heads_part_may_rest_and_a_head_may_not(task: str) -> None:
    """A softmax over tokens takes no notice of the bias that a head of spans adds to all of them."""
    adapter = adapted("bert", task, "prefix").adapter("default")
    heads = [name for name in adapter.trained if name != "embedding.weight"]
    assert len(heads) > 1
    assert adapter.cut_off(heads[:-1]) == []
    assert adapter.cut_off(heads) == heads
    assert adapter.cut_off(["embedding.weight", heads[0]]) == ["embedding.weight"]


def test_changes_of_biases_may_rest_if_not_all_of_them() -> None:
    adapter = adapted("bert", SEQ_CLS, "bitfit").adapter("default")
    own = [name for name in adapter.trained if name.startswith("changes.")]
    assert adapter.cut_off(own[1:]) == []
    assert adapter.cut_off(own) == own


def test_a_second_adapter_is_watched_too() -> None:
    model = adapted("llama", CAUSAL_LM, "prefix").train()
    model(IDS, labels=IDS).loss.backward()
    assert model.gradient_watch.is_over
    model.add_adapter("other", METHODS["prompt"](task_type=CAUSAL_LM))
    model.set_adapter("other")
    cut(model, "zeros")
    with pytest.warns(NoGradientWarning, match=r"other\."):
        model(IDS, labels=IDS).loss.backward()


def test_a_bare_loop_after_a_trainer_is_watched(tmp_path: Path) -> None:
    model = adapted("llama", CAUSAL_LM, "prefix")
    AdapterTrainer(model, args=training_arguments(tmp_path, max_steps=1), train_dataset=RECORDS).train()
    cut(model, "zeros")
    with pytest.warns(NoGradientWarning):
        model(IDS, labels=IDS).loss.backward()


def test_a_loss_over_hidden_states_is_watched() -> None:
    model = cut(adapted("llama", CAUSAL_LM, "prefix"), "zeros")
    with pytest.warns(NoGradientWarning):
        model(IDS, output_hidden_states=True).hidden_states[-1].sum().backward()


def test_encoder_decoders_with_answers() -> None:
    for family in (name for name, row in FAMILIES.items() if "SEQ_2_SEQ_LM" in row.tasks):
        model, rows = adapted(family, "SEQ_2_SEQ_LM", "prefix").train(), texts(family, "SEQ_2_SEQ_LM")
        labels = answers("SEQ_2_SEQ_LM", len(rows))["decoder_input_ids"]
        model(**batch(rows), labels=labels).loss.backward()
        assert model.gradient_watch.is_over
