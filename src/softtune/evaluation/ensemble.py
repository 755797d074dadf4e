"""Ensembles of adapters for one task, by mean probability or by majority vote. The vote is that of Lester et al., 2021,
The Power of Scale for Parameter-Efficient Prompt Tuning, section 6.

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

from softtune.evaluation.answers import Answers, answer
from softtune.evaluation.predict import Advance, unwatched
from softtune.injection.provenance import BASE
from softtune.model import PeftModel
from softtune.tasks import Task


def answer_each(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    records: Dataset,
    *,
    names: Sequence[str],
    advance: Advance = unwatched,
) -> list[Answers]:
    """Predict every record with each of several adapters.

    Args:
        model: the model; its active adapter is restored afterwards.
        tokenizer: its tokenizer.
        task: the task, which encodes the records.
        records: B rows with the task's columns.
        names: M adapters, or ``"__base__"`` for the base model alone.
        advance: called with how many of the M · B predictions are done.

    Raises:
        DataError: a column is missing, or a row does not fit.
        AdapterError: an adapter's outputs contain NaN.
    """
    found = []
    for number, name in enumerate(names):
        with _active_adapter(model, name):
            found.append(answer(model, tokenizer, task, records, advance=_after(number * len(records), advance)))
    return found


def by_mean(task: Task, members: Sequence[Answers]) -> Answers:
    """Each record's label with the highest mean probability over M members, which must have scores."""
    probabilities = _probabilities(members).mean(dim=0)
    return _labelled(task, probabilities, probabilities.log(), members)


def by_vote(task: Task, members: Sequence[Answers]) -> Answers:
    """Majority vote of M members: each record's most frequent label, text or tags. Scores are the log shares of votes.

    Ties between labels are broken by the mean probability, ties between texts by the earliest member. Likelihoods of
    references are those of the members' mean probability.
    """
    if members[0].scores is None:
        columns = zip(*(member.texts for member in members), strict=True)
        texts = [_majority(answers) for answers in columns]
        return Answers(texts, None, members[0].truncated, _mean_likelihoods(members))
    probabilities = _probabilities(members)
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).sum(dim=0)
    return _labelled(task, votes + probabilities.mean(dim=0) / 2, (votes / len(members)).log(), members)


@contextmanager
def _active_adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Activate an adapter, or the base model alone, within the block; which adapters are trainable does not change."""
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
    """The most frequent answer; ties go to the earliest member. Tags are voted on word by word."""
    if isinstance(answers[0], tuple):
        return tuple(_majority(tags) for tags in zip(*answers, strict=True))
    return Counter(answers).most_common(1)[0][0]


def _mean_likelihoods(members: Sequence[Answers]) -> Tensor | None:
    """[B, 2] see ``Answers``, with the members' mean probability of each reference."""
    each = [member.likelihoods for member in members if member.likelihoods is not None]
    if not each:
        return None
    scores = torch.stack([likelihoods[:, 0] for likelihoods in each]).logsumexp(0) - math.log(len(each))
    return torch.stack([scores, each[0][:, 1]], dim=1)


def _after(done: int, advance: Advance) -> Advance:
    return lambda more: advance(done + more)


def _probabilities(members: Sequence[Answers]) -> Tensor:
    """[M, B, N]."""
    return torch.stack([member.scores for member in members if member.scores is not None]).softmax(-1)


def _labelled(task: Task, ranks: Tensor, scores: Tensor, members: Sequence[Answers]) -> Answers:
    """Answers with each record's label of the highest rank; ranks and scores are [B, N]."""
    return Answers([task.label_set[i] for i in ranks.argmax(1)], scores, members[0].truncated)
