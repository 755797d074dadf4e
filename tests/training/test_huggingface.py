"""Hugging Face's own Trainer, unchanged: checkpoints hold the adapter, and training goes on from them exactly."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tests.families import CAUSAL_LM, METHODS, QUESTION_ANS, SEQ_CLS, VOCABULARY, base_model, scramble
from tests.tiny import tokenizer
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

from softtune import PeftModel, get_peft_model

ROWS = 12
KINDS = ["prompt", "p_tuning_lstm", "prefix", "prefix_projection", "p_tuning_v2", "bitfit_added"]


def data(task: str, rows: int = ROWS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(3, VOCABULARY, (6,), generator=generator) for _ in range(rows)]
    return [{"input_ids": x, "labels": x if task == CAUSAL_LM else x[0] % 3} for x in ids]


def trainer(folder: Path, task: str, method: str, callbacks: list[Any] | None = None, **changes: Any) -> Trainer:
    set_seed(0)
    model = get_peft_model(
        base_model({CAUSAL_LM: "gpt2", SEQ_CLS: "bert"}[task], task), METHODS[method](task_type=task)
    )
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
    }
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False} | changes
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(
        model=model, args=arguments, train_dataset=data(task), eval_dataset=data(task, 5), callbacks=callbacks
    )


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("task", [CAUSAL_LM, SEQ_CLS])
@pytest.mark.parametrize("method", KINDS)
def test_a_run_that_goes_on_from_a_checkpoint_is_an_unbroken_one(task: str, method: str, tmp_path: Path) -> None:
    unbroken = trainer(tmp_path, task, method)
    unbroken.train()
    begun = tmp_path / "checkpoint-2"
    assert (begun / "adapter_model.safetensors").exists()
    assert not (begun / "model.safetensors").exists()
    base = base_model({CAUSAL_LM: "gpt2", SEQ_CLS: "bert"}[task], task)
    logits = PeftModel.from_pretrained(base, begun)(torch.tensor([[5, 6, 7]])).logits
    resumed = trainer(tmp_path, task, method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(trained(resumed.model), trained(unbroken.model), rtol=0, atol=0)
    assert not torch.equal(resumed.model.eval()(torch.tensor([[5, 6, 7]])).logits, logits)


@pytest.mark.parametrize("method", KINDS)
def test_without_peft_a_checkpoint_is_the_state_of_the_adapter(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "peft")  # the Trainer then sees a module like any other
    unbroken = trainer(tmp_path, CAUSAL_LM, method)
    unbroken.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == unbroken.model.state_dict().keys()
    assert not any(name.startswith("base_model.") for name in saved)
    resumed = trainer(tmp_path, CAUSAL_LM, method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(trained(resumed.model), trained(unbroken.model), rtol=0, atol=0)


@pytest.mark.parametrize("method", KINDS)
def test_the_best_model_is_loaded_at_the_end(method: str, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 3.0}
    run = trainer(tmp_path, SEQ_CLS, method, **settings)
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-6)


def test_training_stops_early(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    stopper = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e6)
    run = trainer(tmp_path, CAUSAL_LM, "prefix", [stopper], **settings)
    run.train()
    assert run.state.global_step == 2


@pytest.mark.parametrize(("task", "shape"), [(CAUSAL_LM, (5, 6, VOCABULARY)), (SEQ_CLS, (5, 3))])
@pytest.mark.parametrize("method", ["prompt", "prompt_suffix", "prefix"])
def test_predictions_have_the_shape_of_the_data(task: str, shape: tuple[int, ...], method: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, task, method)
    prediction = run.predict(data(task, 5))
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    assert logits.shape == shape
    assert prediction.label_ids.shape[0] == 5


def test_a_state_dict_holds_adapters_alone_and_says_what_is_missing() -> None:
    model = get_peft_model(base_model("gpt2", CAUSAL_LM), METHODS["prefix"]())
    state = model.state_dict()
    assert list(state) == ["prompt_encoder.default.embedding.weight"]
    other = PeftModel(base_model("gpt2", CAUSAL_LM))
    with pytest.raises(ValueError, match=r"prompt_encoder\.default"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"prompt_encoder\.default"):
        model.load_state_dict({})
    assert model.load_state_dict({}, strict=False).missing_keys == list(state)


def test_what_knows_adapters_by_pefts_class_knows_these() -> None:
    model = get_peft_model(base_model("gpt2", CAUSAL_LM), METHODS["bitfit"]()).eval()
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model, PeftModel)
    assert not isinstance(model, peft.PeftModelForCausalLM)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_loading_into_an_adapter_keeps_its_tensors(tmp_path: Path) -> None:
    model = get_peft_model(base_model("gpt2", CAUSAL_LM), METHODS["prefix_projection"]())
    model.save_pretrained(tmp_path)
    saved, before = trained(model), [id(p) for p in model.parameters()]
    scramble(model)
    model.load_adapter(tmp_path, "default")
    assert [id(p) for p in model.parameters()] == before
    torch.testing.assert_close(trained(model), saved, rtol=0, atol=0)


@pytest.mark.parametrize("task", [SEQ_CLS, QUESTION_ANS])
def test_without_peft_the_trainer_keeps_the_base_models_columns(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr("transformers.trainer_utils.is_peft_available", lambda: False)
    model = scramble(get_peft_model(base_model("bert", task), METHODS["prefix"](task_type=task))).eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (4, 8), generator=generator)
    columns = {"input_ids": ids, "token_type_ids": torch.tensor([[0] * 4 + [1] * 4] * 4)}
    spans = {"start_positions": torch.tensor([4, 5, 6, 4]), "end_positions": torch.tensor([5, 6, 7, 6])}
    columns |= {"labels": torch.tensor([0, 1, 1, 0])} if task == SEQ_CLS else spans
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=4)
    rows = Dataset.from_dict({name: x.tolist() for name, x in columns.items()})
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(float(model(**columns).loss), abs=1e-5)


@pytest.mark.filterwarnings("ignore")  # of TRL
@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning_lstm"])
def test_trl(method: str, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    words = tokenizer(ends=True)
    texts = Dataset.from_dict({"text": ["red is warm", "blue is cold", "the sky is blue and good"] * 8})
    losses = []
    for folder, again in ((tmp_path, None), (tmp_path, tmp_path / "checkpoint-2")):
        set_seed(0)
        model = get_peft_model(base_model("llama", CAUSAL_LM), METHODS[method](task_type=CAUSAL_LM))
        arguments = SFTConfig(
            output_dir=str(folder),
            max_steps=6,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            max_length=16,
            bf16=False,
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        run = SFTTrainer(model=model, args=arguments, train_dataset=texts, eval_dataset=texts, processing_class=words)
        run.train(resume_from_checkpoint=again and str(again))
        losses.append([entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry])
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == losses[1]
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-6" / "model.safetensors").exists()


def sft(model: Any, folder: Path, **options: Any) -> Any:
    """One step of TRL's Trainer."""
    from trl import SFTConfig, SFTTrainer

    trainer_options = {name: options.pop(name) for name in ("peft_config",) if name in options}
    settings = {"max_steps": 1, "per_device_train_batch_size": 3, "max_length": 16, "report_to": "none"}
    settings |= {"bf16": False, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    texts = Dataset.from_dict({"text": ["red is warm", "blue is cold", "the sky is blue and good"] * 4})
    run = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **settings, **options),
        train_dataset=texts,
        processing_class=tokenizer(ends=True),
        **trainer_options,
    )
    run.train()
    return run


@pytest.mark.filterwarnings("ignore")  # of TRL
@pytest.mark.parametrize("loss_type", ["nll", "dft", "chunked_nll"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning_mlp", "p_tuning_v2"])
def test_trls_losses(method: str, loss_type: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model("llama", CAUSAL_LM), METHODS[method](task_type=CAUSAL_LM))
    run = sft(model, tmp_path, loss_type=loss_type)
    assert run.state.log_history[0]["loss"] > 0
    assert 0 <= run.state.log_history[0]["mean_token_accuracy"] <= 1


@pytest.mark.filterwarnings("ignore")  # of TRL
@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning_v2", "bitfit_added"])
def test_trl_takes_a_config(method: str, tmp_path: Path) -> None:
    run = sft(base_model("llama", CAUSAL_LM), tmp_path, peft_config=METHODS[method](task_type=CAUSAL_LM))
    assert issubclass(type(run.model), PeftModel)
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").exists()
