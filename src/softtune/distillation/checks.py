"""Checks before a distillation begins: one vocabulary of teacher and student, and positions for what they read."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softtune.backbone import Backbone
from softtune.distillation.dialogue import Dialogue
from softtune.distillation.report import Question
from softtune.errors import ConfigError, DataError

SMALLEST_CHUNK = 16
"""Tokens of a chunk at least."""


def check_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that a teacher's tokens are the student's.

    Raises:
        ConfigError: they are not.
    """
    own, others = student.get_vocab(), teacher.get_vocab()
    if own != others:
        different = sum(others.get(token) != number for token, number in own.items())
        raise ConfigError(
            f"the teacher has another vocabulary: {different} of {len(own)} tokens have another id or none",
            "take a teacher of the same family",
        )


def check_positions(base: PreTrainedModel, tokens: int, room: int) -> None:
    """Check that a model has positions for the cartridge, or for a chunk instead, and what stands beside them.

    Args:
        base: the model.
        tokens: P, the virtual tokens of the cartridge.
        room: tokens beside a chunk, of a question and an answer.

    Raises:
        ConfigError: it has not.
    """
    positions = Backbone.shared(base).max_positions
    needed = max(tokens, SMALLEST_CHUNK) + room
    if positions is not None and positions < needed:
        raise ConfigError(
            f"{tokens} tokens with a question and an answer take {needed} positions, the model has {positions}",
            "lower tokens or max_answer_tokens",
        )


def check_questions(questions: Sequence[Question], dialogue: Dialogue, source: str | None) -> None:
    """Check that questions with known answers fit beside the cartridge.

    Args:
        questions: the questions.
        dialogue: their form.
        source: where they are from, to be named in an error.

    Raises:
        DataError: one does not fit.
    """
    for row, one in enumerate(questions, start=1):
        try:
            dialogue.request(one.question)
        except DataError as error:
            raise error.at(f"{source}: row {row}") from error


def chunk_tokens(base: PreTrainedModel, size: int, room: int) -> int:
    """Tokens of a chunk at most: ``size``, or as many as the model has positions for beside ``room`` others."""
    positions = Backbone.shared(base).max_positions
    return size if positions is None else min(size, positions - room)
