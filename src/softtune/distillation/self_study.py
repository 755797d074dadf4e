"""Self-study: Eyuboglu et al. 2025, "Cartridges: Lightweight and general-purpose long context representations via
self-study", arXiv 2506.06266.

A model asks questions about a chunk of a text that it has in its context, and answers them. Each question follows a
seed prompt, in turn, and a passage of the chunk that is shown again, so that all of the text is asked about.

Each batch of questions is drawn from its own seed and kept in a file of its own: what is done when an interrupt comes
is not done again, and the whole is the same as without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedModel, set_seed

from softtune import storage
from softtune.data import Example, load_records
from softtune.data.encoding import IGNORED, token_ids
from softtune.data.records import check_columns
from softtune.distillation.context import prefill_context
from softtune.distillation.corpus import Chunk
from softtune.distillation.dialogue import Dialogue
from softtune.errors import DataError
from softtune.evaluation.predict import write_texts

OPENING = "=>"
"""Separates what a seed prompt says and how the question then begins, if it is to begin so."""
SEED_PROMPTS = (
    "Write one short question about a fact that the passage states. => What",
    "Write one short question about a person or a name in the passage. => Who",
    "Write one short question about a number in the passage. => How many",
    "Write one short question about a place in the passage. => Where",
    "Write one short question about a time or a date in the passage. => When",
    "Write one question that someone who uses what is described would ask. => How",
    "Write one question about a reason that the passage gives. => Why",
    "Write one instruction to summarize or to list a part of the passage. => List the",
)
"""The paper's kinds of conversations: facts and details, use, understanding, structure and summary. Small models write
questions where these begin as such."""
PASSAGE = 96
"""Tokens of the passage that a question is about."""
QUESTION_TOKENS = 48
"""Tokens of a question at most."""
BATCH = 8
"""Questions of one batch, which are about one chunk."""
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
"""How questions are drawn; answers are the most likely ones."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A question about a chunk, and the answer of the model that had the chunk in its context."""

    chunk: int
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class SelfStudy:
    """The model that asks and answers, and what about.

    Args:
        base: the model.
        dialogue: the form of its questions.
        chunks: the text.
        prompts: instructions to write a question.
        max_answer_tokens: tokens of an answer at most.
        seed: seed of the questions.
    """

    base: PreTrainedModel
    dialogue: Dialogue
    chunks: Sequence[Chunk]
    prompts: Sequence[str] = SEED_PROMPTS
    max_answer_tokens: int
    seed: int

    def run(self, count: int, folder: Path, advance: Callable[[int], None]) -> list[Conversation]:
        """Ask and answer ``count`` questions, or go on with it; batches are kept in ``folder``.

        Returns:
            The conversations, without those whose question or answer is empty.

        Raises:
            DataError: the model has written no question that has an answer.
        """
        found, done = list[Conversation](), 0
        for number, (chunk, rows) in enumerate(self._batches(count)):
            file = folder / f"batch-{number:05}.jsonl"
            if not file.is_file():
                batch = self._batch(chunk, rows, number)
                with storage.staged(folder) as stage:
                    write_conversations(stage / file.name, batch)
            found += read_conversations(file, len(self.chunks))
            done += len(rows)
            advance(done)
        if not found:
            raise DataError("the model has written no question with an answer", "use an instruction-tuned model")
        return found

    def _batches(self, count: int) -> list[tuple[int, list[int]]]:
        """The chunk and the numbers of the questions of each batch; questions go round the chunks."""
        of_chunk = groupby(
            sorted(range(count), key=lambda n: (n % len(self.chunks), n)), lambda n: n % len(self.chunks)
        )
        every = [(chunk, list(numbers)) for chunk, numbers in of_chunk]
        return [(chunk, rows[i : i + BATCH]) for chunk, rows in every for i in range(0, len(rows), BATCH)]

    def _batch(self, chunk: int, rows: Sequence[int], number: int) -> list[Conversation]:
        text, tokenizer = self.chunks[chunk].text, self.dialogue.tokenizer
        model = prefill_context(self.base, self.dialogue.context_ids(text))
        set_seed(self.seed * 1_000_003 + number)
        openings = [self.prompt(row)[1] for row in rows]
        asking = [
            opened(self.dialogue.rest(text, self.instruction(text, row)), token_ids(opening, tokenizer))
            for row, opening in zip(rows, openings, strict=True)
        ]
        drawn = write_texts(model, tokenizer, asking, batch_size=BATCH, max_new_tokens=QUESTION_TOKENS, **SAMPLING)
        whole = [f"{opening} {one}" for opening, one in zip(openings, drawn, strict=True) if one]
        questions = [question for one in whole if (question := as_question(one))]
        answering = [self.dialogue.rest(text, question) for question in questions]
        answers = write_texts(
            model,
            tokenizer,
            answering,
            batch_size=BATCH,
            max_new_tokens=self.max_answer_tokens,
            do_sample=False,
        )
        pairs = zip(questions, answers, strict=True)
        return [Conversation(chunk=chunk, question=question, answer=answer) for question, answer in pairs if answer]

    def instruction(self, text: str, row: int) -> str:
        """What asks the model for the question of a row: a passage of the chunk, and a seed prompt."""
        tokenizer = self.dialogue.tokenizer
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        size = min(PASSAGE, len(offsets))
        start = Random(f"{self.seed}-{row}").randint(0, len(offsets) - size)
        passage = text[offsets[start][0] : offsets[start + size - 1][1]].strip()
        return f"Passage: {passage}\n\n{self.prompt(row)[0]}"

    def prompt(self, row: int) -> tuple[str, str]:
        """The seed prompt of a row, and how its question begins."""
        said, _, opening = self.prompts[row // len(self.chunks) % len(self.prompts)].partition(OPENING)
        return said.strip(), opening.strip()

    @staticmethod
    def room(dialogue: Dialogue, prompts: Sequence[str], max_answer_tokens: int) -> int:
        """Tokens beside a chunk that asking and answering take at most."""
        longest = max(len(token_ids(prompt, dialogue.tokenizer)) for prompt in prompts)
        around = len(dialogue.context_ids("a")) + len(dialogue.rest("a", "a").input_ids)
        asking = longest + PASSAGE + QUESTION_TOKENS
        return around + max(asking, QUESTION_TOKENS + max_answer_tokens) + 16  # texts that are cut have other tokens


def read_seed_prompts(source: str | None) -> tuple[str, ...]:
    """Read instructions to write a question from a file with one a line; without a file, the general ones.

    Raises:
        DataError: there is no such file, or no line in it.
    """
    if source is None:
        return SEED_PROMPTS
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}", "check the path of the seed prompts")
    lines = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    if not lines:
        raise DataError(f"{path} has no seed prompt", "write one instruction a line")
    return lines


def opened(asking: Example, opening: Sequence[int]) -> Example:
    """A prompt with the first token ids of what is to be written."""
    return replace(asking, input_ids=[*asking.input_ids, *opening], labels=asking.labels + [IGNORED] * len(opening))


def as_question(text: str) -> str:
    """The question in what a model wrote: its first line, without marks around it."""
    lines = [line.strip(" \"'*-") for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else ""
    return first.removeprefix("Question:").removeprefix("Q:").strip(" \"'")


def write_conversations(file: Path, conversations: Sequence[Conversation]) -> None:
    """Write conversations, one a line."""
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in conversations]
    file.write_text("".join(lines), encoding="utf-8")


def read_conversations(file: Path, num_chunks: int) -> list[Conversation]:
    """Read conversations, which may have been edited; a file may be empty.

    Raises:
        DataError: a line is malformed, or names no chunk of the text.
    """
    if not file.read_text(encoding="utf-8").strip():
        return []
    records = load_records(str(file))
    check_columns(["chunk", "question", "answer"], records.column_names)
    found = []
    for row, record in enumerate(records, start=1):
        texts = [record["question"], record["answer"]]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{file}: row {row} lacks a question or an answer", "fill it in or drop the row")
        if record["chunk"] not in range(num_chunks):
            raise DataError(f"{file}: row {row} names chunk {record['chunk']}, there are {num_chunks}", "from 0 on")
        found.append(Conversation(chunk=record["chunk"], question=texts[0], answer=texts[1]))
    return found
