"""Distils a text into a cartridge: Eyuboglu et al. 2025, "Cartridges: Lightweight and general-purpose long context
representations via self-study", arXiv 2506.06266.

Questions by the model itself, the teacher's log-probabilities, training, and a report. Each phase keeps what it has
done in the folder, so that the same call goes on after an interrupt. A short text, such as a system prompt, is a corpus
of one chunk: this is prompt distillation (Kujanpää et al. 2024, arXiv 2412.14964).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, set_seed

from softtune.backbone import Backbone
from softtune.data import Collator
from softtune.data.chat import chat_template_of
from softtune.distillation.context import cartridge
from softtune.distillation.corpus import BETWEEN, Chunk, chunks_of, read_corpus
from softtune.distillation.dialogue import Dialogue
from softtune.distillation.folder import DistillationFolder
from softtune.distillation.loss import TeacherCollator, TeacherDivergence
from softtune.distillation.report import DistillationReport, Examination, Question, Way, read_questions
from softtune.distillation.self_study import SEED_PROMPTS, Conversation, SelfStudy
from softtune.distillation.settings import Distillation
from softtune.distillation.teacher import Lesson, TeacherCache
from softtune.errors import ConfigError, DataError
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.callbacks import InterruptSaver, ProgressReporter
from softtune.training.progress import TRAINING, Phase, Progress
from softtune.training.trainer import STATE_FILE, AdapterTrainer, checkpoints_in, step_of, training_arguments

ASKING, TEACHING, MEASURING = Phase("asking itself"), Phase("reading the teacher"), Phase("measuring")
HELD_OUT = 8
"""Without known answers, one of so many conversations is held out of training to measure agreement."""
LEAST_CHUNK = 16
"""Tokens of a chunk at least."""


def distill(settings: Distillation, *, progress: Progress = lambda *_: None) -> DistillationReport:
    """Distil a text into a cartridge, or go on with an interrupted distillation of the same settings.

    Args:
        settings: what is distilled, and how.
        progress: called after every step of each phase.

    Raises:
        ConfigError: the folder has a finished cartridge, or an unfinished one with other settings; the teacher has
            another vocabulary; the base model is no decoder, or has too few positions; or the teacher's
            log-probabilities need more room than ``cache_mb``.
        DataError: the corpus has no text, or fewer tokens than the cartridge; or a file is malformed.
        UnsupportedModelError: the base model takes no prefix.
        TrainingError: the loss or the cartridge is NaN or infinite.
        KeyboardInterrupt: Ctrl-C; its message says how to go on.
    """
    folder = DistillationFolder(settings)
    folder.check()
    try:
        return _Distillation.load(settings, folder, progress).run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(folder.kept) from None


@dataclass(frozen=True, kw_only=True)
class _Distillation:
    """A distillation with all that it reads."""

    settings: Distillation
    folder: DistillationFolder
    progress: Progress
    base: PreTrainedModel
    student: Dialogue
    teacher: PreTrainedModel
    asking: Dialogue
    """The form of the teacher's questions."""
    prompts: Sequence[str]
    texts: list[str]
    chunk_tokens: int
    known: list[Question]
    """Questions with known answers; empty without a file of them."""

    @classmethod
    def load(cls, settings: Distillation, folder: DistillationFolder, progress: Progress) -> _Distillation:
        """Read the text and load the models, and check that they fit, before anything is kept."""
        texts = read_corpus(settings.corpus, settings.text, [settings.questions, settings.seed_prompts])
        known = read_questions(settings.questions) if settings.questions else []
        prompts = _seed_prompts(settings.seed_prompts)
        base, tokenizer = load_base_model(settings.model, options=settings.load)
        teacher, others = base, tokenizer
        if settings.teacher is not None:
            teacher, others = load_base_model(settings.teacher, options=settings.load)
            check_vocabulary(tokenizer, others)
        positions = Backbone.shared(base).max_positions
        room_beside = 1 << 30 if positions is None else positions - settings.tokens
        student = Dialogue(tokenizer, settings.text_role, room_beside)
        asking = Dialogue(others, settings.text_role)
        room = SelfStudy.room(asking, prompts, settings.max_answer_tokens)
        for model in (base, teacher):
            _check_positions(model, settings.tokens, room)
        loaded = cls(
            settings=settings,
            folder=folder,
            progress=progress,
            base=base,
            student=student,
            teacher=teacher,
            asking=asking,
            prompts=prompts,
            texts=texts,
            chunk_tokens=_chunk_tokens(teacher, settings.chunk_tokens, room),
            known=known,
        )
        loaded.start_ids()
        folder.begin(texts, prompts)
        return loaded

    def start_ids(self) -> list[int]:
        """[P] the first tokens of the text in a conversation, whose keys and values the cartridge starts from.

        Raises:
            DataError: the text has fewer.
        """
        ids = self.student.context_ids(BETWEEN.join(self.texts))
        if len(ids) < (size := self.settings.tokens):
            raise DataError(
                f"tokens is {size}, and the text has {len(ids)}",
                f"set it to {len(ids)} at most; a cartridge is to save",
            )
        return ids[:size]

    def run(self) -> DistillationReport:
        """Run all phases."""
        chunks = chunks_of(self.texts, self.asking.tokenizer, self.chunk_tokens)
        conversations = self._conversations(chunks)
        held, trained = _held_out(conversations, self.settings.seed, needs=not self.known)
        lessons = [Lesson.from_conversation(one, chunks[one.chunk].text, self.asking, self.student) for one in trained]
        cache = self._taught(lessons)
        model, history, seconds = self._trained(lessons, cache)
        questions = self.known or [Question(one.question, one.answer) for one in held]
        report = DistillationReport(
            ways=self._measured(model, questions),
            is_known=bool(self.known),
            questions=len(questions),
            conversations=len(trained),
            chunks=len(chunks),
            steps=len(history),
            first_loss=history[0],
            last_loss=sum(history[-_tenth(history) :]) / _tenth(history),
            seconds=seconds,
            folder=str(self.folder.path),
        )
        self.folder.finish(model, report)
        return report

    def _conversations(self, chunks: Sequence[Chunk]) -> list[Conversation]:
        """The self-study's conversations; once all are there, those of the file, which may have been edited."""
        if not self.folder.has_conversations:
            study = SelfStudy(
                base=self.teacher,
                dialogue=self.asking,
                chunks=chunks,
                prompts=self.prompts,
                max_answer_tokens=self.settings.max_answer_tokens,
                seed=self.settings.seed,
            )
            count = self.settings.num_questions
            self.folder.keep(study.run(count, self.folder.self_study, self._telling(ASKING, count)))
        return self.folder.conversations(len(chunks))

    def _taught(self, lessons: Sequence[Lesson]) -> TeacherCache:
        """The teacher's log-probabilities, on the disk."""
        vocabulary = self.base.config.get_text_config().vocab_size
        cache = TeacherCache(
            folder=self.folder.teacher,
            base=self.teacher,
            lessons=lessons,
            top_k=self.settings.top_k,
            vocabulary=vocabulary,
            pad_token_id=self._pad_token_id,
        )
        cache.check_size(self.settings.cache_mb)
        cache.fill(self._telling(TEACHING, len(lessons)))
        return cache

    def _trained(self, lessons: Sequence[Lesson], cache: TeacherCache) -> tuple[PeftModel, list[float], float]:
        """The trained cartridge, its losses by step, and the seconds that it took since the last interrupt."""
        set_seed(self.settings.seed)
        model = cartridge(self.base, self.start_ids())
        if self.student.is_chat:
            model.adapter("default").chat_template = chat_template_of(self.student.tokenizer)
        self.folder.check_lessons(lessons)
        interrupt = InterruptSaver()
        trainer = self._trainer(model, lessons, cache, interrupt)
        clock = time.perf_counter()
        with interrupt:
            self._train(trainer)
        if interrupt.interrupted and not trainer.has_ended:
            raise KeyboardInterrupt
        losses = [entry["loss"] for entry in trainer.history]
        return model.eval(), losses, time.perf_counter() - clock

    def _train(self, trainer: AdapterTrainer) -> None:
        """Train from the newest checkpoint, unless that is of the last step."""
        starts = checkpoints_in(self.folder.checkpoints)
        if not starts or step_of(starts[-1]) < self.settings.steps:
            trainer.train(resume_from_checkpoint=str(starts[-1]) if starts else None)
            return
        trainer.state = TrainerState.load_from_json(str(starts[-1] / STATE_FILE))
        trainer.load_adapter(str(starts[-1]))

    def _trainer(
        self, model: PeftModel, lessons: Sequence[Lesson], cache: TeacherCache, interrupt: InterruptSaver
    ) -> AdapterTrainer:
        settings = self.settings
        examples = [lesson.student for lesson in lessons]
        return AdapterTrainer(
            model,
            args=training_arguments(
                self.folder.checkpoints,
                model.device,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=0.1,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                weight_decay=0.0,
                save_steps=settings.save_steps,
                seed=settings.seed,
                label_names=["labels"],
            ),
            train_dataset=range(len(lessons)),
            data_collator=TeacherCollator(Collator(self._pad_token_id, padding_side="left"), examples, cache),
            objective=TeacherDivergence(),
            callbacks=[interrupt, ProgressReporter(lambda *step: self.progress(TRAINING, *step))],
        )

    def _measured(self, model: PeftModel, questions: Sequence[Question]) -> list[Way]:
        examination = Examination(
            base=self.base,
            cartridge=model,
            dialogue=self.student,
            texts=self.texts,
            chunk_tokens=self.chunk_tokens,
            tokens=self.settings.tokens,
            questions=questions,
            max_answer_tokens=self.settings.max_answer_tokens,
        )
        return examination.run(lambda done, total: self.progress(MEASURING, done, total, ""))

    @property
    def _pad_token_id(self) -> int:
        return int(self.student.tokenizer.pad_token_id)

    def _telling(self, phase: Phase, total: int) -> Callable[[int], None]:
        return lambda done: self.progress(phase, done, total, "")


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


def _check_positions(base: PreTrainedModel, tokens: int, room: int) -> None:
    """Check that a model has room for the cartridge, a question and an answer, and for a chunk instead.

    Raises:
        ConfigError: it has not.
    """
    positions = Backbone.shared(base).max_positions
    needed = max(tokens, LEAST_CHUNK) + room
    if positions is not None and positions < needed:
        raise ConfigError(
            f"{tokens} tokens with a question and an answer take {needed} positions, the model has {positions}",
            "lower tokens or max_answer_tokens",
        )


def _chunk_tokens(base: PreTrainedModel, size: int, room: int) -> int:
    """Tokens of a chunk, as many as are asked for and as the model has positions for."""
    positions = Backbone.shared(base).max_positions
    return size if positions is None else min(size, positions - room)


def _seed_prompts(file: str | None) -> tuple[str, ...]:
    """The instructions by which the model writes questions."""
    if file is None:
        return SEED_PROMPTS
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}", "check the path of the seed prompts")
    lines = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    if not lines:
        raise DataError(f"{path} has no seed prompt", "write one instruction a line")
    return lines


def _held_out(
    conversations: Sequence[Conversation], seed: int, *, needs: bool
) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to measure by, and those to train on.

    Raises:
        DataError: there are too few for both.
    """
    if not needs:
        return [], [*conversations]
    if len(conversations) < 2:
        raise DataError("one conversation is left to train on and to measure by", "ask for more by num_questions")
    count = max(len(conversations) // HELD_OUT, 1)
    held = {*Random(seed).sample(range(len(conversations)), count)}
    parts = [[one for i, one in enumerate(conversations) if (i in held) is side] for side in (True, False)]
    return parts[0], parts[1]


def _tenth(history: Sequence[float]) -> int:
    return -(-len(history) // 10)
