"""A cartridge compared with other methods to give a model a text: all of it in the context, the passages that BM25
finds, the model's own summary, and nothing.

Passages and summary have as many tokens as the cartridge at most. Letters: P virtual tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from softtune import storage
from softtune.data import Example, load_records
from softtune.data.records import check_columns, text_of
from softtune.distillation.context import kv_bytes, prefill_context
from softtune.distillation.corpus import SEPARATOR, chunks_of
from softtune.distillation.dialogue import Dialogue
from softtune.distillation.retrieval import bm25_scores
from softtune.errors import DataError
from softtune.evaluation.predict import write_texts
from softtune.model import PeftModel
from softtune.tasks.metrics import contains, span_quality

REPORT_NAME = "distillation.json"
"""File with the report; a folder that has it is complete."""
PASSAGE, SHORTEST_PASSAGE = 64, 8
"""Tokens of a passage that BM25 finds, and of one where P is small: a quarter of P, down to this."""
SUMMARIZE = "Summarize the text above. Keep every name, number and fact."
FULL, CARTRIDGE, RETRIEVED, SUMMARY, NOTHING = "full text", "cartridge", "BM25", "summary", "no text"


@dataclass(frozen=True)
class Question:
    """A question, and what is the right answer to it."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class ContextResult:
    """Quality and cost of one method to give a model the text."""

    name: str
    note: str = ""
    """Why nothing was measured, where it was not."""
    tokens: float = 0
    """Tokens in front of a question, the mean over questions."""
    kv_bytes: float = 0
    """Bytes of their keys and values."""
    reading: float = 0
    """Seconds to compute these, for a request that finds them in no cache."""
    seconds: float = 0
    """Seconds of a request in all, one at a time."""
    accuracy: float = 0
    """Share of the answers that contain the right one, see ``contains``."""
    f1: float = 0
    """F1 of an answer's words and the right one's."""
    answers: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class DistillationReport:
    """The results of a distillation."""

    results: list[ContextResult]
    """Of the cartridge, and of the other methods."""
    is_known: bool
    """Whether the right answers were given; else they are the model's own, with the text's chunk in its context."""
    questions: int
    conversations: int
    """Conversations that were trained on."""
    chunks: int
    steps: int
    first_loss: float
    """Divergence from the teacher at the first update, in nats a token."""
    last_loss: float
    """Its mean over the last tenth of the updates."""
    seconds: float
    """Duration of the training alone. After a resume, the time since then."""
    folder: str

    def save(self, folder: Path) -> None:
        """Write the report, after which the folder is complete."""
        with storage.staged(folder) as stage:
            storage.write_json(stage / REPORT_NAME, asdict(self))


def read_questions(source: str) -> list[Question]:
    """Read questions with known answers.

    Raises:
        DataError: a column is missing, or a row has no text in it.
    """
    records = load_records(source)
    check_columns(["question", "answer"], records.column_names)
    found = []
    for row, record in enumerate(records, start=1):
        try:
            found.append(Question(text_of(record, "question"), text_of(record, "answer")))
        except DataError as error:
            raise error.at(f"{source}: row {row}") from error
    return found


@dataclass(frozen=True, kw_only=True)
class ContextEvaluation:
    """Asks the questions with every method.

    Args:
        base: the base model.
        cartridge: the same with the cartridge.
        dialogue: the form of its questions.
        texts: the corpus.
        chunk_tokens: tokens of a chunk that is summarized at most.
        tokens: P.
        questions: the questions.
        max_answer_tokens: tokens of an answer at most.
    """

    base: PreTrainedModel
    cartridge: PeftModel
    dialogue: Dialogue
    texts: Sequence[str]
    chunk_tokens: int
    tokens: int
    questions: Sequence[Question]
    max_answer_tokens: int

    def run(self, advance: Callable[[int, int], None]) -> list[ContextResult]:
        """Evaluate all methods; ``advance`` is told how many answers are written, and how many there will be."""
        texts: dict[str, Callable[[str], str]] = {
            FULL: lambda _: SEPARATOR.join(self.texts),
            RETRIEVED: self._retrieve,
            SUMMARY: lambda _: self._summary,
            NOTHING: lambda _: "",
        }
        total = (len(texts) + 1) * len(self.questions)
        found: list[ContextResult] = []

        def tell(done: int) -> None:
            advance(len(found) * len(self.questions) + done, total)

        found.append(self._evaluate_cartridge(tell))
        for name, text_for in texts.items():
            found.append(self._evaluate_context(name, text_for, tell))
        return found

    def _evaluate_cartridge(self, tell: Callable[[int], None]) -> ContextResult:
        answers, seconds = [], 0.0
        for number, one in enumerate(self.questions, start=1):
            asked = self.dialogue.request(one.question)
            if note := self._note(self.tokens + len(asked.input_ids) + self.max_answer_tokens):
                return ContextResult(name=CARTRIDGE, note=note)
            answer, spent = self._answer(self.cartridge, asked)
            answers.append(answer)
            seconds += spent
            tell(number)
        return self._result(CARTRIDGE, answers, tokens=self.tokens * len(answers), reading=0, seconds=seconds)

    def _evaluate_context(
        self, name: str, text_for: Callable[[str], str], tell: Callable[[int], None]
    ) -> ContextResult:
        """Evaluate a method that puts a text into the context, which may depend on the question."""
        answers, tokens, reading, answering, kept = list[str](), 0, 0.0, 0.0, None
        for number, one in enumerate(self.questions, start=1):
            text = text_for(one.question)
            ids = self.dialogue.context_ids(text) if text else []
            asked = self.dialogue.rest(text, one.question) if text else self.dialogue.request(one.question)
            if note := self._note(len(ids) + len(asked.input_ids) + self.max_answer_tokens):
                return ContextResult(name=name, note=note)
            if kept is None or kept[0] != ids:
                clock = time.perf_counter()
                kept = ids, prefill_context(self.base, ids)
                spent_reading = time.perf_counter() - clock if ids else 0.0
            answer, spent = self._answer(kept[1], asked)
            answers.append(answer)
            tokens, reading, answering = tokens + len(ids), reading + spent_reading, answering + spent
            tell(number)
        return self._result(name, answers, tokens=tokens, reading=reading, seconds=reading + answering)

    def _answer(self, model: PeftModel, asked: Example) -> tuple[str, float]:
        clock = time.perf_counter()
        limit = self.max_answer_tokens
        [answer] = write_texts(model, self.dialogue.tokenizer, [asked], max_new_tokens=limit, do_sample=False)
        return answer, time.perf_counter() - clock

    def _result(self, name: str, answers: list[str], *, tokens: int, reading: float, seconds: float) -> ContextResult:
        """The means over all questions, from the sums over them."""
        right, count = [one.answer for one in self.questions], len(answers)
        return ContextResult(
            name=name,
            tokens=tokens / count,
            kv_bytes=kv_bytes(self.base, tokens) / count,
            reading=reading / count,
            seconds=seconds / count,
            accuracy=sum(map(contains, right, answers)) / count,
            f1=span_quality([[answer] for answer in right], answers).metrics["f1"],
            answers=answers,
        )

    def _note(self, needed: int) -> str:
        """Why a request cannot be answered that needs so many positions; empty where it can."""
        return "" if needed <= self._positions else f"needs {needed} positions, the model has {self._positions}"

    @cached_property
    def _positions(self) -> float:
        return self.cartridge.backbone.max_positions or float("inf")

    @cached_property
    def _passages(self) -> list[str]:
        size = min(PASSAGE, max(self.tokens // 4, SHORTEST_PASSAGE))
        return [chunk.text for chunk in chunks_of(list(self.texts), self.dialogue.tokenizer, size)]

    def _retrieve(self, question: str) -> str:
        """Find passages by BM25 for a question, as many as have P tokens, in the order of the text."""
        scores = bm25_scores(self._passages, question)
        best = sorted(range(len(scores)), key=lambda number: -scores[number])
        chosen = list[int]()
        for number in best:
            text = SEPARATOR.join(self._passages[i] for i in sorted([*chosen, number]))
            if chosen and len(self.dialogue.context_ids(text)) > self.tokens:
                break
            chosen.append(number)
        return SEPARATOR.join(self._passages[i] for i in sorted(chosen))

    @cached_property
    def _summary(self) -> str:
        """The model's summaries of all chunks, cut to P tokens, as what is written may be read as more tokens."""
        room = max(self.tokens - len(self.dialogue.context_ids("a")), 1)
        text = SEPARATOR.join(self._summarize(room))
        offsets = self.dialogue.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= room else text[: offsets[room - 1][1]]

    def _summarize(self, room: int) -> Iterator[str]:
        """Write a summary of each chunk, of ``room`` tokens at most together, or as many as have positions."""
        chunks = chunks_of(list(self.texts), self.dialogue.tokenizer, self.chunk_tokens)
        size = max(room // len(chunks), 1)
        for chunk in chunks:
            ids, asked = self.dialogue.context_ids(chunk.text), self.dialogue.rest(chunk.text, SUMMARIZE)
            left = self._positions - len(ids) - len(asked.input_ids)
            model, most = prefill_context(self.base, ids), int(min(size, left))
            yield from write_texts(model, self.dialogue.tokenizer, [asked], max_new_tokens=most, do_sample=False)
