"""The divergence of a student from a teacher of whose distribution the most likely tokens are known.

Letters: N tokens, k tokens kept of each distribution, V vocabulary. Knows nothing about texts and adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softtune.data import Collator, Example
from softtune.distillation.teacher import TeacherCache

TEACHER = ("teacher_ids", "teacher_log_probabilities")
"""What a batch has of the teacher: [N, k] each, for its N labelled tokens, one row after the other."""


def top_k_divergence(logits: Tensor, ids: Tensor, log_probabilities: Tensor) -> Tensor:
    """[N] the Kullback-Leibler divergence of the student from the teacher, in nats.

    All tokens beyond the teacher's k are one: the sum over the k is completed by ``r·(log r - log s)``, where r and s
    are the probabilities that teacher and student leave for all others. So it is 0 where the k agree, never negative,
    at most the divergence of the whole distributions, and that exactly where k is V. A student that moves probability
    to tokens the teacher never names pays for it, as it would not if the sum were left as it is.

    Args:
        logits: [N, V] of the student.
        ids: [N, k] the teacher's most likely tokens.
        log_probabilities: [N, k] theirs.
    """
    student = logits.float().log_softmax(-1)
    probabilities = log_probabilities.exp()
    found = (probabilities * (log_probabilities - student.gather(-1, ids))).sum(-1)
    if ids.shape[-1] == logits.shape[-1]:
        return found
    rest = (1 - probabilities.sum(-1)).clamp(min=0)
    others = student.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return found + torch.xlogy(rest, rest) - rest * others


class TeacherDivergence:
    """``top_k_divergence`` as a Trainer's objective: its mean over the labelled tokens of a batch."""

    inputs = TEACHER

    def __call__(self, logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return top_k_divergence(logits, *(inputs[name] for name in TEACHER)).mean()


@dataclass(frozen=True)
class TeacherCollator:
    """Pads students' examples, and adds what the teacher says about their answers."""

    collate: Collator
    examples: Sequence[Example]
    cache: TeacherCache

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the examples of these numbers."""
        batch = self.collate([self.examples[number] for number in numbers])
        parts = zip(*(self.cache.read(number) for number in numbers), strict=True)
        return {**batch, **{name: torch.cat(part) for name, part in zip(TEACHER, parts, strict=True)}}
