"""Batches of an update have the loss and gradients of one batch with all their rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import CAUSAL_LM, QUESTION_ANS, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, texts
from tests.training import test_multi_run
from tests.training.test_multi_run import Case, assert_same, losses, numbers, train_alone
from torch.nn import functional as F

from softtune import CPTConfig, PeftModel
from softtune.data import Collator, Example
from softtune.training import ranks
from softtune.training.loss_weight import loss_divisors, num_labels, without_rows
from softtune.training.multi_run import train_together
from softtune.training.trainer import AdapterTrainer

TASKS = [
    ("llama", CAUSAL_LM),
    ("t5", SEQ_2_SEQ_LM),
    ("bart", SEQ_2_SEQ_LM),
    ("bert", SEQ_CLS),
    ("llama", SEQ_CLS),
    ("bert", TOKEN_CLS),
    ("bert", QUESTION_ANS),
]


def rows(family: str, task: str) -> list[Example]:
    """Nine rows with one to nine labels, or with one each for whole texts. Rows with spans have one length, since the
    softmax over a text's tokens is one over its padding too."""
    lengths = (6,) * 9 if task == QUESTION_ANS else tuple(range(3, 12))
    found = []
    for count, row in enumerate(texts(family, task, lengths), start=1):
        ids = row.tolist()
        if task == QUESTION_ANS:
            found.append(Example(input_ids=ids, labels=[-100] * len(ids), span=(0, count % 3)))
        elif task in (CAUSAL_LM, TOKEN_CLS):
            kept = ids[-count:] if task == CAUSAL_LM else [token % 3 for token in ids[-count:]]
            found.append(Example(input_ids=ids, labels=[-100] * (len(ids) - len(kept)) + kept))
        else:
            found.append(Example(input_ids=ids, labels=[ids[0] % 3] if task == SEQ_CLS else ids[:count], is_apart=True))
    return found


def trainer(case: Case, method: str = "prefix", **changes: Any) -> AdapterTrainer:
    """By SGD, whose steps are the gradients themselves."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "max_steps": 3} | changes
    names = {"label_names": ["start_positions", "end_positions"]} if case.task == QUESTION_ANS else {}
    made: AdapterTrainer = case.trainer(method, 1, **settings, **names)
    made.train_dataset = rows(case.family, case.task)
    return made


LARGE = {"per_device_train_batch_size": 6}
SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize(("family", "task"), TASKS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_small_batches_come_to_a_large_one(family: str, task: str, smoothing: float, tmp_path: Path) -> None:
    """Nine rows are an update of three batches and one of two, the last of them with a single row."""
    case = Case(tmp_path, family, task)
    large, small = (trainer(case, **sizes, label_smoothing_factor=smoothing) for sizes in (LARGE, SMALL))
    start = numbers(small)
    train_alone([large, small])
    assert_same(small, large)
    assert small.state.global_step == 3
    assert any(not torch.equal(now, start[name]) for name, now in numbers(small).items())


def test_batches_of_equal_weight_would_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, "llama")
    large, small = (trainer(case, **sizes) for sizes in (LARGE, SMALL))
    monkeypatch.setattr(
        "softtune.training.trainer.loss_divisors", lambda batches, **_: [torch.tensor(len(batches))] * len(batches)
    )
    train_alone([large, small])
    assert losses(small)[0] != pytest.approx(losses(large)[0], abs=1e-3)


DEMONSTRATIONS = {
    "without labels": {"cpt_token_ids": [30, 41, 7], "cpt_tokens_type_mask": [1, 2, 3]},
    "with labels": {"cpt_token_ids": [30, 41, 7, 50, 31, 43, 51], "cpt_tokens_type_mask": [1, 2, 4, 4, 5, 6, 8]},
    "decay": {
        "cpt_token_ids": [30, 41, 7, 50, 31, 43, 51],
        "cpt_tokens_type_mask": [4, 2, 4, 4, 5, 6, 8],
        "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": 0.5,
    },
}
"""Options of CPT, whose loss is over the prompt's labels too."""


@pytest.fixture(params=DEMONSTRATIONS)
def cpt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**DEMONSTRATIONS[request.param], "opt_projection_epsilon": 60.0, "opt_projection_format_epsilon": 60.0}
    monkeypatch.setitem(test_multi_run.CONFIGS, "cpt", partial(CPTConfig, **options))


def cpt_trainer(folder: Path, **sizes: Any) -> AdapterTrainer:
    """The last row has nothing but labels, the first of which the prompt predicts."""
    made = trainer(Case(folder, "llama"), "cpt", **sizes)
    rows = made.train_dataset
    assert isinstance(rows, list)
    rows[-1] = Example(input_ids=rows[-1].input_ids, labels=rows[-1].input_ids)
    return made


@pytest.mark.usefixtures("cpt")
def test_small_batches_with_labels_in_the_prompt_come_to_a_large_one(tmp_path: Path) -> None:
    large, small = (cpt_trainer(tmp_path / str(number), **sizes) for number, sizes in enumerate((LARGE, SMALL)))
    start = numbers(small)
    train_alone([large, small])
    assert_same(small, large)
    assert any(not torch.equal(now, start[name]) for name, now in numbers(small).items())


@pytest.mark.usefixtures("cpt")
def test_processes_share_the_labels_in_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of five and four rows, of which the second has been filled up with another."""
    made = cpt_trainer(tmp_path)
    assert isinstance(made.train_dataset, list)
    rows, model = made.train_dataset, made.model
    assert isinstance(model, PeftModel)
    adapter = model.eval().adapter("default")
    own = adapter.module.supervision
    whole = model(**Collator(0)(rows)).loss
    parts = [Collator(0)(rows[:5]), without_rows(Collator(0)([*rows[5:], rows[0]]), 1)]
    counts = [num_labels(part, shifts_labels=True, own=own) for part in parts]
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "all_reduce", lambda _: sum(counts))
    shares = []
    for part in parts:
        [divisor] = loss_divisors([part], shifts_labels=True, own=own)
        shares.append(model(**part).loss / divisor)
    torch.testing.assert_close(sum(shares) / 2, whole)


def test_rows_beyond_the_last_leave_a_batch() -> None:
    batch = {"input_ids": torch.arange(6).view(3, 2), "labels": torch.arange(6).view(3, 2)}
    assert without_rows(batch, 2)["labels"].tolist() == [[0, 1]]
    assert without_rows(batch, 0) is batch
    assert without_rows(batch, 3) is batch


@pytest.mark.parametrize(("family", "task"), [pair for pair in TASKS if pair[1] != QUESTION_ANS])
def test_runs_at_once_weigh_their_batches_too(family: str, task: str, tmp_path: Path) -> None:
    case = Case(tmp_path, family, task)
    large = [trainer(case, method, **LARGE) for method in ("prefix", "bitfit")]
    small = [trainer(case, method, **SMALL) for method in ("prefix", "bitfit")]
    train_alone(large)
    assert train_together(small) == [None, None]
    for found, expected in zip(small, large, strict=True):
        assert_same(found, expected)


def test_the_loss_is_the_mean_over_the_updates_labels(tmp_path: Path) -> None:
    """By hand, from the logits of each row alone."""
    case = Case(tmp_path, "llama")
    small = trainer(case, per_device_train_batch_size=2, gradient_accumulation_steps=5, max_steps=1)
    sums, count = 0.0, 0
    for row in rows("llama", CAUSAL_LM):
        assert small.model is not None
        with torch.no_grad():
            logits = small.model.eval()(input_ids=torch.tensor([row.input_ids])).logits[0]
        answers = [(place, label) for place, label in enumerate(row.labels) if place and label != -100]
        sums += sum(float(F.cross_entropy(logits[place - 1], torch.tensor(label))) for place, label in answers)
        count += len(answers)
    train_alone([small])
    assert losses(small) == [pytest.approx(sums / count, abs=1e-5)]


def test_a_batch_by_itself_keeps_its_loss_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, "llama")
    weighed, plain = trainer(case, **LARGE), trainer(case, **LARGE)
    train_alone([weighed])
    monkeypatch.setattr("softtune.training.trainer.loss_divisors", lambda *_, **__: [1])
    train_alone([plain])
    assert losses(weighed) == losses(plain)
    ours, theirs = numbers(weighed), numbers(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_counts_as_a_label() -> None:
    labels = torch.tensor([[5, -100, 7], [-100, -100, 8]])
    assert num_labels({"labels": labels}, shifts_labels=False) == 3
    assert num_labels({"labels": labels}, shifts_labels=True) == 2
    assert num_labels({"input_ids": labels, "start_positions": labels[:, 1]}, shifts_labels=False) == 2
    batches = [{"labels": torch.tensor([[1, 1, 1]])}, {"labels": torch.tensor([[-100, -100, 1]])}]
    assert loss_divisors(batches, shifts_labels=False) == [pytest.approx(4 / 3), pytest.approx(4)]
    assert loss_divisors([], shifts_labels=False) == []
    assert loss_divisors(batches[1:], shifts_labels=True) == [1.0]
    assert Collator(0)([Example(input_ids=[3], labels=[-100], span=(0, 0))]).keys().isdisjoint({"labels"})
