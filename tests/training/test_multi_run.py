"""Adapters trained at once come out as each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, PAD, QUESTION_ANS, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, base_model, scramble, texts
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, set_seed

from softtune import (
    BitFitConfig,
    ConfigError,
    DataError,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningV2Config,
    TrainingError,
)
from softtune.data import Collator, Example
from softtune.distillation.loss import TeacherDivergence
from softtune.injection.frozen_layer_cache import FrozenLayerCache
from softtune.training import multi_run
from softtune.training.multi_run import train_together
from softtune.training.trainer import AdapterTrainer, training_arguments

CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "prefix": lambda **k: PrefixTuningConfig(num_virtual_tokens=3, **k),
    "longer prefix": lambda **k: PrefixTuningConfig(num_virtual_tokens=7, **k),
    "projected prefix": lambda **k: PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, **k),
    "suffix": lambda **k: PromptTuningConfig(num_virtual_tokens=2, placement="suffix", **k),
    "prompt": lambda **k: PromptTuningConfig(num_virtual_tokens=4, **k),
    "p-tuning": lambda **k: PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, **k),
    "v2": lambda **k: PTuningV2Config(num_virtual_tokens=3, **k),
    "bitfit": lambda **k: BitFitConfig(add_missing=True, **k),
}


def examples(family: str, task: str, seed: int, count: int = 7) -> list[Example]:
    """Rows of four to ten tokens, the last two of which a language model has to write."""
    torch.manual_seed(seed)
    lengths = torch.randint(4, 11, (count,)).tolist()
    rows = [row[torch.randperm(len(row))].tolist() for row in texts(family, task, tuple(lengths))]
    if task == CAUSAL_LM:
        return [Example(input_ids=row, labels=[-100] * (len(row) - 2) + row[-2:]) for row in rows]
    if task == TOKEN_CLS:
        return [Example(input_ids=row, labels=[token % 3 for token in row]) for row in rows]
    answers = [[row[0] % 3] if task == SEQ_CLS else row[: 1 + len(row) // 3] for row in rows]
    return [Example(input_ids=row, labels=labels, is_apart=True) for row, labels in zip(rows, answers, strict=True)]


class Case:
    """Runs over one base model, to be trained alone or together."""

    def __init__(self, folder: Path, family: str, task: str = CAUSAL_LM, **overrides: Any) -> None:
        self.folder, self.family, self.task = folder, family, task
        self.base: PreTrainedModel = base_model(family, task, **overrides)
        self.count = 0

    def trainer(self, method: str, seed: int, *, callbacks: Any = (), trunk_cache: float = 0, **changes: Any) -> Any:
        """A new trainer, whose adapter and rows depend on nothing but the seed."""
        self.count += 1
        options = {name: changes.pop(name) for name in ("layers", "prefix_dropout") if name in changes}
        model = scramble(PeftModel(self.base, CONFIGS[method](task_type=self.task, **options)), seed)
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.03, "save_steps": 2}
        settings |= {"adam_epsilon": 1e-3} | changes  # so that rounding is not taken for a gradient
        return AdapterTrainer(
            model,
            args=training_arguments(self.folder / str(self.count), seed=seed, **settings),
            train_dataset=examples(self.family, self.task, seed),
            eval_dataset=examples(self.family, self.task, 99),
            data_collator=Collator(PAD, padding_side="left" if seed % 2 else "right"),
            callbacks=list(callbacks),
            trunk_cache=trunk_cache,
        )


def numbers(trainer: Trainer) -> dict[str, Tensor]:
    assert isinstance(trainer.model, nn.Module)
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_alone(trainers: list[Any]) -> None:
    for trainer in trainers:
        set_seed(trainer.args.seed)  # as when it was made
        trainer.train()


def assert_same(found: Trainer, expected: Trainer) -> None:
    assert losses(found) == pytest.approx(losses(expected), abs=1e-4)
    ours, theirs = numbers(found), numbers(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-4)


def assert_alike(runs: Callable[[], list[Any]]) -> list[Any]:
    """Train the runs alone and together, and compare."""
    alone, joint = runs(), runs()
    starts = [numbers(trainer) for trainer in joint]
    train_alone(alone)
    assert train_together(joint) == [None] * len(joint)
    for found, expected, start in zip(joint, alone, starts, strict=True):
        assert_same(found, expected)
        assert any(not torch.equal(x, start[name]) for name, x in numbers(found).items())
    return joint


def test_every_method_at_once(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    assert_alike(lambda: [case.trainer(method, seed) for seed, method in enumerate(CONFIGS)])


@pytest.mark.parametrize(
    ("family", "task"),
    [("gpt2", CAUSAL_LM), ("t5", SEQ_2_SEQ_LM), ("bart", SEQ_2_SEQ_LM), ("bert", SEQ_CLS), ("bert", TOKEN_CLS)],
)
def test_every_kind_of_task(family: str, task: str, tmp_path: Path) -> None:
    case = Case(tmp_path, family, task)
    assert_alike(lambda: [case.trainer(method, seed) for seed, method in enumerate(["prefix", "prompt", "v2"])])


def test_a_decoder_with_a_head(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", SEQ_CLS)
    assert_alike(lambda: [case.trainer("prefix", seed) for seed in range(3)])


def test_settings_are_each_ones_own(tmp_path: Path) -> None:
    case = Case(tmp_path, "gpt2")
    settings: list[dict[str, Any]] = [
        {"learning_rate": 0.001, "max_steps": 7},
        {"lr_scheduler_type": "constant", "per_device_train_batch_size": 3, "max_grad_norm": 0.01},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.5, "max_steps": 2},
        {"warmup_steps": 2, "optim": "sgd", "learning_rate": 1.0},
    ]
    runs = assert_alike(lambda: [case.trainer("prefix", seed, **more) for seed, more in enumerate(settings)])
    assert [run.state.global_step for run in runs] == [7, 4, 2, 4]


@pytest.mark.parametrize(
    ("family", "task"), [("llama", CAUSAL_LM), ("t5", SEQ_2_SEQ_LM), ("bert", SEQ_CLS), ("bert", TOKEN_CLS)]
)
def test_labels_are_smoothed_for_each_run(family: str, task: str, tmp_path: Path) -> None:
    """As by transformers' own smoother, alone; a suffix stands before the answer all the same."""
    case = Case(tmp_path, family, task)
    methods = ["prefix", "suffix" if task == CAUSAL_LM else "prompt", "prefix"]
    settings: list[dict[str, Any]] = [{"label_smoothing_factor": 0.3}, {"label_smoothing_factor": 0.1}, {}]
    pairs = [*zip(methods, settings, strict=True)]
    runs = assert_alike(lambda: [case.trainer(method, 0, **more) for method, more in pairs])
    assert losses(runs[0])[0] != pytest.approx(losses(runs[2])[0], abs=1e-3)


def test_places_that_a_template_gives_to_virtual_tokens(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")

    def runs() -> list[Any]:
        made = [case.trainer(method, seed) for seed, method in enumerate(["prompt", "prompt", "p-tuning", "prefix"])]
        for trainer in made[:3]:
            count = trainer.model.active_peft_config.num_virtual_tokens
            object_places = [min(2 * i, 3) for i in range(count)]
            trainer.train_dataset = [
                Example(input_ids=e.input_ids, labels=e.labels, prompt_positions=object_places)
                for e in trainer.train_dataset
            ]
        return made

    assert_alike(runs)


def test_dropout_of_the_base_model_is_not_shared(tmp_path: Path) -> None:
    """It draws other numbers together than alone, and the runs still learn."""
    case = Case(tmp_path, "gpt2", attn_pdrop=0.2)
    runs = [case.trainer("prefix", seed, max_steps=8) for seed in range(2)]
    assert train_together(runs) == [None, None]
    assert all(losses(run)[-1] < losses(run)[0] for run in runs)


def test_checkpoints_and_going_on_from_them(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")

    def runs() -> list[Any]:
        made = [case.trainer("prefix", seed) for seed in range(3)]
        for trainer in made:
            trainer.args.save_total_limit = None
        return made

    whole = assert_alike(runs)
    starts = [str(Path(run.args.output_dir) / "checkpoint-2") for run in whole]
    resumed = [case.trainer("prefix", seed) for seed in range(3)]
    train_together(resumed, [starts[0], starts[1], None])
    for found, expected in zip(resumed, whole, strict=True):
        assert_same(found, expected)


def test_a_run_that_stops_early(tmp_path: Path) -> None:
    case = Case(tmp_path, "gpt2")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

    runs = assert_alike(lambda: [case.trainer("prefix", 0, callbacks=[Stop()]), case.trainer("prefix", 1)])
    assert [run.state.global_step for run in runs] == [2, 4]


def test_evaluation_between_steps(tmp_path: Path) -> None:
    case = Case(tmp_path, "gpt2")
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "loss", "learning_rate": 0.5, "max_steps": 6}

    def runs() -> list[Any]:
        stops = EarlyStoppingCallback(early_stopping_patience=1)
        return [case.trainer("prefix", 0, callbacks=[stops], **best), case.trainer("v2", 1)]

    found = assert_alike(runs)
    assert found[0].state.global_step < 6


@pytest.mark.parametrize("ready", [1e30, float("nan")])
def test_a_run_that_fails_leaves_the_others_alone(tmp_path: Path, ready: float) -> None:
    case = Case(tmp_path, "llama")
    alone = [case.trainer("prefix", seed) for seed in (0, 2)]
    train_alone(alone)
    runs = [case.trainer("prefix", seed) for seed in range(3)]
    for parameter in numbers(runs[1]):
        dict(runs[1].model.named_parameters())[parameter].data.fill_(ready)
    errors = train_together(runs)
    assert [type(error) for error in errors] == [type(None), TrainingError, type(None)]
    assert_same(runs[0], alone[0])
    assert_same(runs[2], alone[1])


def test_a_batch_without_labels_says_so(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    runs = [case.trainer("prefix", seed) for seed in range(2)]
    runs[1].train_dataset = [Example(input_ids=[5, 6], labels=[-100, -100])]
    runs[1].data_collator = lambda rows: (
        {k: torch.tensor([[5, 6]]) for k in ("input_ids",)} | {"labels": torch.full((1, 2), -100)}
    )
    with pytest.raises(DataError, match="no label in the batch of step 1: drop rows without an answer"):
        train_together(runs)


@pytest.mark.parametrize("step", [2, 3])
def test_an_error_ends_all_with_checkpoints_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    case = Case(tmp_path, "llama")

    def runs() -> list[Any]:
        return [case.trainer("prefix", seed, save_steps=50) for seed in range(2)]

    whole, broken, resumed = runs(), runs(), runs()
    train_together(whole)
    losses_of, calls = multi_run._losses, []

    def fail(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == step:
            raise DataError("this batch does not fit")
        return losses_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(multi_run, "_losses", fail)
        with pytest.raises(DataError, match="this batch does not fit"):
            train_together(broken)
    checkpoints = [Path(run.args.output_dir, f"checkpoint-{step - 1}") for run in broken]
    train_together(resumed, [str(checkpoint) for checkpoint in checkpoints])
    for found, expected in zip(resumed, whole, strict=True):
        assert found.state.global_step == 4
        assert_same(found, expected)


def test_an_error_of_one_run_saves_the_others(tmp_path: Path) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise OSError("no space left")

    case = Case(tmp_path, "llama")
    runs = [case.trainer("prefix", 0, save_steps=50), case.trainer("prefix", 1, callbacks=[Break()], save_steps=50)]
    with pytest.raises(OSError, match="no space left"):
        train_together(runs)
    assert [path.name for path in Path(runs[0].args.output_dir).iterdir()] == ["checkpoint-2"]
    assert not list(Path(runs[1].args.output_dir).glob("*"))


def test_the_trunk_cache_is_shared(tmp_path: Path, trunks: list[FrozenLayerCache]) -> None:
    case = Case(tmp_path, "llama")

    def runs(**more: Any) -> list[Any]:
        more["max_steps"] = 8  # two epochs of seven rows, in batches of two
        return [case.trainer("prefix", seed, layers=layers, **more) for seed, layers in enumerate(["last:1", [1]])]

    plain, cached = runs(), runs(trunk_cache=10)
    train_together(plain)
    train_together(cached)
    [trunk] = trunks
    assert (trunk.misses, trunk.hits) == (14, 14)
    for found, expected in zip(cached, plain, strict=True):
        assert_same(found, expected)


def test_one_forward_a_step(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    runs = [case.trainer("prefix", seed) for seed in range(3)]
    calls = []
    case.base.register_forward_hook(lambda *_: calls.append(1))
    train_together(runs)
    assert len(calls) == 4


def test_in_bf16(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    alone, joint = ([case.trainer("prefix", seed, bf16=True) for seed in range(2)] for _ in range(2))
    train_alone(alone)
    train_together(joint)
    for found, expected in zip(joint, alone, strict=True):
        assert losses(found) == pytest.approx(losses(expected), rel=2e-2)


def test_what_cannot_train_together_is_refused(tmp_path: Path) -> None:
    case, other = Case(tmp_path, "llama"), Case(tmp_path, "llama", SEQ_CLS)
    first = case.trainer("prefix", 0)
    with pytest.raises(ConfigError, match="need the same base model: load it once"):
        train_together([first, other.trainer("prefix", 0)])
    spans = Case(tmp_path, "bert", QUESTION_ANS)
    with pytest.raises(ConfigError, match=r"need one task of CAUSAL_LM, .*: train them apart"):
        train_together([spans.trainer("prefix", seed) for seed in range(2)])
    with pytest.raises(ConfigError, match="need the same precision"):
        train_together([first, case.trainer("prefix", 0, bf16=True)])
    other_loss = case.trainer("prefix", 0)
    other_loss.compute_loss_func = lambda *_, **__: torch.zeros(())
    with pytest.raises(ConfigError, match="need the task's own loss"):
        train_together([first, other_loss])
    objective = case.trainer("prefix", 0)
    objective.objective = TeacherDivergence()
    with pytest.raises(ConfigError, match="need the task's own loss"):
        train_together([first, objective])
