"""Several recipes, and ensembles, from one command: each adapter as if alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_models
from tests.training.test_run import STOPPING, interrupt_at, no_work, tensors

from softtune import CheckpointError, ConfigError, TaskType, TrainingError
from softtune.data import Template, Verbalizer
from softtune.evaluation.answers import Answers
from softtune.evaluation.ensemble import by_mean, by_vote
from softtune.injection.tensor_store import TensorStore
from softtune.tasks import LabelTask
from softtune.training.progress import TRAINING, Phase
from softtune.training.recipe import Recipe
from softtune.training.run import Report, train, train_all
from softtune.training.trainer import AdapterTrainer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without dropout, which draws other numbers in company."""
    folder = tmp_path_factory.mktemp("models")
    for config in [Path(path, "config.json") for path in save_models(folder).values()]:
        fields = json.loads(config.read_text())
        none = {name: 0.0 for name in fields if "dropout" in name}
        config.write_text(json.dumps(fields | none | {"classifier_dropout": 0.0}))
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "epochs": 1}


def recipes(fields: dict[str, Any], folder: Path, *changes: dict[str, Any]) -> list[Recipe]:
    return [Recipe.from_fields({**fields, "output": str(folder / str(i)), **more}) for i, more in enumerate(changes)]


def assert_same_adapter(found: str | Path, expected: str | Path) -> None:
    ours, theirs = tensors(str(found)), tensors(str(expected))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=2e-3)


DIFFERENT: list[dict[str, Any]] = [
    {"method": "PROMPT_TUNING", "epochs": 2},
    {"seed": 3, "learning_rate": 0.01, "batch_size": 3},
    {"options": {"num_virtual_tokens": 5}, "examples": 8, "schedule": "constant"},
]


def test_recipes_at_once_come_out_as_each_alone(fields: dict[str, Any], tmp_path: Path) -> None:
    found = train_all(recipes(fields, tmp_path / "at once", *DIFFERENT))
    for i, recipe in enumerate(recipes(fields, tmp_path / "alone", *DIFFERENT)):
        expected, result = train(recipe), found[i]
        assert isinstance(result, Report)
        assert (result.before, result.after, result.steps) == (expected.before, expected.after, expected.steps)
        assert_same_adapter(tmp_path / "at once" / str(i), expected.folder)


NO_KEYS = {"method": "BITFIT", "options": {"roles": ["query", "value", "intermediate", "output", "layer_norm"]}}
"""A key's bias changes no attention: its gradients are what rounding leaves, which the optimiser scales up."""


@pytest.mark.parametrize("own", [{}, NO_KEYS], ids=["prefix", "BitFit"])
def test_heads_are_drawn_by_each_ones_seed(
    fields: dict[str, Any], models: dict[str, str], tmp_path: Path, own: dict[str, Any]
) -> None:
    classifier = fields | {"task": "SEQ_CLS", "model": models["bert"], **own}
    train_all(recipes(classifier, tmp_path / "at once", {"seed": 1}, {"seed": 2}))
    for i, recipe in enumerate(recipes(classifier, tmp_path / "alone", {"seed": 1}, {"seed": 2})):
        assert_same_adapter(tmp_path / "at once" / str(i), train(recipe).folder)
    first, second = (tensors(str(tmp_path / "alone" / name)) for name in "01")
    head = next(name for name in first if "classifier.weight" in name)
    assert not torch.equal(first[head], second[head])


def test_an_encoder_decoder(fields: dict[str, Any], models: dict[str, str], tmp_path: Path) -> None:
    writer = fields | {"task": "SEQ_2_SEQ_LM", "model": models["t5"]}
    changes: list[dict[str, Any]] = [{}, {"method": "P_TUNING_V2"}]
    train_all(recipes(writer, tmp_path / "at once", *changes))
    for i, recipe in enumerate(recipes(writer, tmp_path / "alone", *changes)):
        assert_same_adapter(tmp_path / "at once" / str(i), train(recipe).folder)


def test_an_interrupt_keeps_all_and_none_is_lost(fields: dict[str, Any], tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"epochs": 2}, {"seed": 1, "epochs": 0.4}]
    whole, broken = (recipes(fields, tmp_path / name, *changes) for name in ("whole", "broken"))
    train_all(whole)

    def progress(phase: Phase, *step: Any) -> None:
        interrupt_at(5)(replace(phase, run=None) if phase.run == "0" else phase, *step)

    first = train_all(broken, progress=progress)
    assert [report.finished for report in first if isinstance(report, Report)] == [False, False]
    with pytest.raises(ConfigError, match="has an unfinished run: add --resume"):
        train_all(broken, progress=no_work)
    second = train_all(broken, resume=True)
    assert all(report.finished for report in second if isinstance(report, Report))
    for own, other in zip(broken, whole, strict=True):
        assert_same_adapter(own.output, other.output)


def test_a_run_that_fails_leaves_the_others_alone(fields: dict[str, Any], tmp_path: Path) -> None:
    wild = {"learning_rate": 1e38, "max_grad_norm": 1e9}
    found = train_all(recipes(fields, tmp_path, {}, wild))
    assert isinstance(found[0], Report)
    assert isinstance(found[1], TrainingError)
    assert Recipe.from_adapter(tmp_path / "1").learning_rate == 1e38


def test_a_run_that_has_stopped_by_itself_stays_so_when_another_is_interrupted(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    changes = [{**STOPPING, "learning_rate": 3.0, "warmup_steps": 0}, {"epochs": 10}]
    whole, broken = (recipes(fields, tmp_path / name, *changes) for name in ("whole", "broken"))
    [expected, _] = train_all(whole)
    assert isinstance(expected, Report)

    def progress(phase: Phase, *step: Any) -> None:
        interrupt_at(expected.steps + 3)(replace(phase, run=None) if phase.run == "1" else phase, *step)

    train_all(broken, progress=progress)
    [found, _] = train_all(broken, resume=True)
    assert isinstance(found, Report)
    assert found.steps == expected.steps
    for own, other in zip(broken, whole, strict=True):
        assert_same_adapter(own.output, other.output)


def test_dropout_goes_on_as_it_would_have(fields: dict[str, Any], tmp_path: Path) -> None:
    own = {
        "ensemble": 2,
        "epochs": 2,
        "method": "P_TUNING_V2",
        "options": {"num_virtual_tokens": 3, "prefix_dropout": 0.5},
    }
    whole, broken = recipes(fields, tmp_path, own, own)
    train(whole)

    def progress(phase: Phase, *step: Any) -> None:
        interrupt_at(6)(TRAINING if phase == replace(TRAINING, member="1") else phase, *step)

    train(broken, progress=progress)
    train(broken, resume=True)
    for name in "12":
        ours, theirs = tensors(str(tmp_path / "0" / name)), tensors(str(tmp_path / "1" / name))
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-5)


def test_members_share_the_trunk_caches_memory(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[float] = []
    monkeypatch.setattr("softtune.model.TensorStore", lambda *own: sizes.append(own[0]) or TensorStore(*own))
    deep = {"num_virtual_tokens": 3, "layers": "last:1"}
    train(recipes(fields, tmp_path, {"ensemble": 3, "trunk_cache": 1, "options": deep})[0])
    assert sizes[-1] == pytest.approx(1.0)


def test_an_interrupt_keeps_an_ensemble_beside_its_failed_member(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = AdapterTrainer._check_numbers

    def blow_up(self: AdapterTrainer) -> None:
        if self.args.seed == 1 and self.state.global_step >= 4:
            raise TrainingError("no number")
        check(self)

    monkeypatch.setattr(AdapterTrainer, "_check_numbers", blow_up)
    [recipe] = recipes(fields, tmp_path, {"ensemble": 2, "epochs": 2})

    def progress(phase: Phase, *step: Any) -> None:
        interrupt_at(6)(TRAINING if phase == replace(TRAINING, member="1") else phase, *step)

    assert not train(recipe, progress=progress).finished
    assert Path(recipe.output, "checkpoints", "1", "checkpoint-6").is_dir()
    with pytest.raises(TrainingError, match="no number"):
        train(recipe, resume=True)
    assert Recipe.from_adapter(recipe.output) == recipe


@pytest.mark.parametrize("changes", [[{}, {}], [{"ensemble": 2}]])
def test_parts_of_texts_are_learnt_by_one_adapter_at_a_time(
    fields: dict[str, Any], tmp_path: Path, changes: list[dict[str, Any]]
) -> None:
    reader = {"task": "QUESTION_ANS", "labels": None, "template": "{label} {text}"}
    with pytest.raises(ConfigError, match="QUESTION_ANS trains one adapter at a time: run one recipe"):
        train_all(recipes(fields | reader, tmp_path, *changes), progress=no_work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16": True}, "bf16 is False for .*0 and True for .*1: recipes that run at once share it"),
        ({"compile": True}, "compile is False for"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is False for"),
        ({"trunk_cache": 5}, "the use of a trunk cache is False for .*0 and True for .*1"),
        ({"trunk_cache_disk": 5}, "the use of a trunk cache is False for"),
        ({"report_to": ["tensorboard", "wandb"]}, "wandb takes one run of a process: report several to tensorboard"),
    ],
)
def test_what_recipes_share_is_checked_before_any_work(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("softtune.training.compatibility.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=message):
        train_all(recipes(fields, tmp_path / "out", {}, changes), progress=no_work)
    assert not (tmp_path / "out").exists()


def test_wandb_takes_no_ensemble(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softtune.training.compatibility.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="wandb takes one run of a process"):
        train(Recipe.from_fields({**fields, "report_to": ["wandb"], "ensemble": 2}), progress=no_work)


def test_recipes_of_other_models_or_one_output(fields: dict[str, Any], models: dict[str, str], tmp_path: Path) -> None:
    one, other = recipes(fields, tmp_path, {}, {"model": models["t5"], "task": "SEQ_2_SEQ_LM"})
    with pytest.raises(ConfigError, match=r"model is '.*llama' for .*0 and '.*t5' for .*1: recipes that run at once"):
        train_all([one, other], progress=no_work)
    with pytest.raises(ConfigError, match="is the output of 2 recipes: give each one its own"):
        train_all([one, one], progress=no_work)


def test_a_members_recipe_makes_it_again(fields: dict[str, Any], tmp_path: Path) -> None:
    for name, changes in (("one", {"seed": 5}), ("validated", {"data_seed": 7, "patience": 9, "examples": 12})):
        ensemble = Recipe.from_fields({**fields, **changes, "ensemble": 2, "output": str(tmp_path / name)})
        train(ensemble)
        member = Recipe.from_adapter(tmp_path / name / "2")
        again = train(member.model_copy(update={"output": str(tmp_path / f"{name} again")}))
        assert_same_adapter(tmp_path / name / "2", again.folder)


def test_an_ensemble(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.from_fields({**fields, "ensemble": 3, "epochs": 2})
    report = train(recipe)
    assert len(report.evaluation.members) == 3
    assert report.after.keys() == report.evaluation.vote.keys() == report.before.keys()
    assert Recipe.from_adapter(recipe.output) == recipe
    [single] = recipes(fields, tmp_path / "alone", {"epochs": 2})
    alone = train(single)
    assert_same_adapter(tmp_path / "adapter" / "1", alone.folder)
    assert report.evaluation.members[0] == alone.after
    assert report.trained == 3 * alone.trained
    first, second = (tensors(str(tmp_path / "adapter" / name)) for name in "12")
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_an_ensemble_goes_on_after_an_interrupt(fields: dict[str, Any], tmp_path: Path) -> None:
    whole, broken = recipes(fields, tmp_path, {"ensemble": 2, "epochs": 2}, {"ensemble": 2, "epochs": 2})
    train(whole)

    def progress(phase: Phase, *step: Any) -> None:
        interrupt_at(6)(TRAINING if phase == replace(TRAINING, member="1") else phase, *step)

    assert not train(broken, progress=progress).finished
    with pytest.raises(CheckpointError, match="is unfinished: go on with softtune train --resume"):
        Recipe.from_adapter(broken.output)
    assert train(broken, resume=True).finished
    for name in "12":
        assert_same_adapter(Path(broken.output, name), Path(whole.output, name))


TASK = LabelTask(
    kind=TaskType.CAUSAL_LM,
    template=Template("{text}"),
    label_column="label",
    verbalizer=Verbalizer.from_labels(["a", "b", "c"]),
    max_length=9,
)


def answers(*probabilities: list[float]) -> Answers:
    scores = torch.tensor(probabilities).log() + 3.0  # words' probabilities need not add up to one
    return Answers(["abc"[i] for i in scores.argmax(1)], scores, truncated=1)


def test_the_mean_of_probabilities_and_the_vote_differ() -> None:
    members = [answers([0.4, 0.6, 0.0]), answers([0.4, 0.6, 0.0]), answers([0.9, 0.05, 0.05])]
    mean, vote = by_mean(TASK, members), by_vote(TASK, members)
    assert (mean.texts, vote.texts) == (["a"], ["b"])
    assert mean.scores is not None
    assert vote.scores is not None
    torch.testing.assert_close(mean.scores.softmax(1), torch.tensor([[1.7, 1.25, 0.05]]) / 3)
    torch.testing.assert_close(vote.scores.softmax(1), torch.tensor([[1 / 3, 2 / 3, 0.0]]))


def test_the_mean_decides_between_labels_with_as_many_votes() -> None:
    assert by_vote(TASK, [answers([0.5, 0.1, 0.4]), answers([0.1, 0.8, 0.1])]).texts == ["b"]
    assert by_vote(TASK, [answers([0.9, 0.1, 0.0]), answers([0.1, 0.8, 0.1])]).texts == ["a"]


def test_texts_are_voted_on_whole() -> None:
    members = [Answers(list(texts), None, 0) for texts in ("xy", "zy", "zw")]
    assert by_vote(TASK, members).texts == ["z", "y"]


def test_members_give_a_reference_their_mean_probability() -> None:
    members = [Answers(["x"], None, 0, torch.tensor([[math.log(p), 3.0]])) for p in (0.5, 0.1)]
    found = by_vote(TASK, members).likelihoods
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([[math.log(0.3), 3.0]]))
