"""One answer from several adapters for one task: Lester et al., 2021, The Power of Scale for Parameter-Efficient Prompt
Tuning, section 6, which takes a majority vote.

Letters: B records, N labels, M members.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softtune.data import LabelTask, Task
from softtune.evaluation.answers import Answers, answer
from softtune.evaluation.predict import Advance, unwatched
from softtune.injection.owners import BASE
from softtune.model import PeftModel


def answer_each(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    records: Dataset,
    *,
    names: Sequence[str],
    advance: Advance = unwatched,
) -> list[Answers]:
    """What each of several adapters answers to every record.

    Args:
        model: the model; the adapter that is active stays so.
        tokenizer: its tokenizer.
        task: how the records read.
        records: B rows with the template's columns.
        names: M adapters, or ``"__base__"`` for the base model alone.
        advance: told how many of the M · B answers there are.

    Raises:
        DataError: a column is missing, or a row does not fit.
    """
    found = []
    for number, name in enumerate(names):
        with _acting(model, name):
            found.append(answer(model, tokenizer, task, records, advance=_after(number * len(records), advance)))
    return found


def by_mean(task: Task, members: Sequence[Answers]) -> Answers:
    """Each record's label of the highest mean probability, by M answers with scores."""
    probabilities = _probabilities(members).mean(dim=0)
    return _labelled(task, probabilities, probabilities.log(), members)


def by_vote(task: Task, members: Sequence[Answers]) -> Answers:
    """Each record's label, text or tags that most of M members answer; scores are logarithms of the shares of votes.

    Between labels with as many votes the mean probability decides, between texts the earliest member. Likelihoods of
    references are of the members' mean probability.
    """
    if members[0].scores is None:
        columns = zip(*(member.texts for member in members), strict=True)
        texts = [_majority(answers) for answers in columns]
        return Answers(texts, None, members[0].truncated, _mean_likelihoods(members))
    probabilities = _probabilities(members)
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).sum(dim=0)
    return _labelled(task, votes + probabilities.mean(dim=0) / 2, (votes / len(members)).log(), members)


@contextmanager
def _acting(model: PeftModel, name: str) -> Iterator[None]:
    """Let an adapter act, or the base model alone, for the length of the block; which one is trained stays as it is."""
    if name == BASE:
        with model.disable_adapter():
            yield
        return
    before, model.active_adapter = model.active_adapter, name
    try:
        yield
    finally:
        model.active_adapter = before


def _majority(answers: Sequence[Any]) -> Any:
    """What most members answer, the earliest of what as many do; of tags, word by word."""
    if isinstance(answers[0], tuple):
        return tuple(_majority(tags) for tags in zip(*answers, strict=True))
    return Counter(answers).most_common(1)[0][0]


def _mean_likelihoods(members: Sequence[Answers]) -> Tensor | None:
    """[B, 2] of the members' mean probability of each reference."""
    each = [member.likelihoods for member in members if member.likelihoods is not None]
    if not each:
        return None
    scores = torch.stack([own[:, 0] for own in each]).logsumexp(0) - math.log(len(each))
    return torch.stack([scores, each[0][:, 1]], dim=1)


def _after(done: int, advance: Advance) -> Advance:
    return lambda more: advance(done + more)


def _probabilities(members: Sequence[Answers]) -> Tensor:
    """[M, B, N]."""
    return torch.stack([member.scores for member in members if member.scores is not None]).softmax(-1)


def _labelled(task: Task, ranks: Tensor, scores: Tensor, members: Sequence[Answers]) -> Answers:
    """The labels with the highest ranks [B, N]."""
    assert isinstance(task, LabelTask)
    return Answers([task.verbalizer.labels[i] for i in ranks.argmax(1)], scores, members[0].truncated)
