"""Distils a text into a cartridge: Eyuboglu et al. 2025, "Cartridges: Lightweight and general-purpose long context
representations via self-study", arXiv 2506.06266.

Questions by the model itself, the teacher's log-probabilities, training, and a report. All but the report is kept in
the folder as it is done, batch by batch, so that the same call goes on after an interrupt; an interrupted report is
made anew. A short text, such as a system prompt, is a corpus of one chunk: this is prompt distillation (Kujanpää et
al. 2024, arXiv 2412.14964).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedModel, TrainerState, set_seed

from softtune.backbone import Backbone
from softtune.data import Collator
from softtune.data.chat import chat_template_of
from softtune.distillation.checks import check_positions, check_questions, check_vocabulary, chunk_tokens
from softtune.distillation.context import create_cartridge
from softtune.distillation.corpus import SEPARATOR, Chunk, chunks_of, read_corpus
from softtune.distillation.dialogue import Dialogue
from softtune.distillation.folder import DistillationFolder
from softtune.distillation.loss import TeacherCollator, TeacherDivergence
from softtune.distillation.report import ContextEvaluation, ContextResult, DistillationReport, Question, read_questions
from softtune.distillation.self_study import Conversation, SelfStudy, read_seed_prompts
from softtune.distillation.settings import Distillation
from softtune.distillation.teacher import DistillationExample, TeacherCache
from softtune.errors import DataError
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.callbacks import InterruptSaver, ProgressReporter
from softtune.training.progress import EVALUATING, TRAINING, Phase, Progress
from softtune.training.trainer import STATE_FILE, AdapterTrainer, checkpoints_in, step_of, training_arguments

GENERATING, LOG_PROBABILITIES = Phase("generating questions"), Phase("teacher log-probabilities")
HELD_OUT = 8
"""Without known answers, one of so many conversations is held out of training to measure agreement."""


def distill(settings: Distillation, *, progress: Progress = lambda *_: None) -> DistillationReport:
    """Distil a text into a cartridge, or go on with an interrupted distillation of the same settings.

    Args:
        settings: what is distilled, and how.
        progress: called after every step of each phase.

    Raises:
        ConfigError: the folder has a finished cartridge, or an unfinished one with other settings; the teacher has
            another vocabulary; the conversations are another distillation's, or were edited after the training had
            begun; the base model is no decoder, or has too few positions; or the teacher's log-probabilities need more
            room than ``cache_mb``.
        DataError: the corpus has no text, or fewer tokens than the cartridge; or a file is malformed.
        UnsupportedModelError: the base model takes no prefix.
        CheckpointError: the folder is a file or cannot be written, or a model cannot be loaded.
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
    teacher_dialogue: Dialogue
    """The form of the teacher's questions."""
    prompts: Sequence[str]
    texts: list[str]
    chunk_tokens: int
    """Tokens of a chunk that the teacher has in its context at most."""
    student_chunk_tokens: int
    """Tokens of a chunk at most that the base model has positions for, too."""
    known: list[Question]
    """Questions with known answers; empty without a file of them."""

    @classmethod
    def load(cls, settings: Distillation, folder: DistillationFolder, progress: Progress) -> _Distillation:
        """Read the text and load the models, and check that they fit, before anything is kept."""
        texts = read_corpus(
            settings.corpus, settings.text, [settings.questions, settings.seed_prompts, settings.output]
        )
        known = read_questions(settings.questions) if settings.questions else []
        prompts = read_seed_prompts(settings.seed_prompts)
        base, tokenizer = load_base_model(settings.model, options=settings.load)
        teacher, others = base, tokenizer
        if settings.teacher is not None:
            options = settings.load.model_copy(update={"revision": None})  # of the base model's repository
            teacher, others = load_base_model(settings.teacher, options=options)
            check_vocabulary(tokenizer, others)
        positions = Backbone.shared(base).max_positions
        room_beside = 1 << 30 if positions is None else positions - settings.tokens
        student = Dialogue(tokenizer, settings.text_role, room_beside)
        teacher_dialogue = Dialogue(others, settings.text_role)
        room, own_room = (
            SelfStudy.room(Dialogue(own, settings.text_role), prompts, settings.max_answer_tokens)
            for own in (others, tokenizer)
        )
        check_positions(base, settings.tokens, own_room)
        check_positions(teacher, settings.tokens, room)
        check_questions(known, student, settings.questions)
        size = chunk_tokens(teacher, settings.chunk_tokens, room)
        loaded = cls(
            settings=settings,
            folder=folder,
            progress=progress,
            base=base,
            student=student,
            teacher=teacher,
            teacher_dialogue=teacher_dialogue,
            prompts=prompts,
            texts=texts,
            chunk_tokens=size,
            student_chunk_tokens=chunk_tokens(base, size, own_room),
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
        ids = self.student.context_ids(SEPARATOR.join(self.texts))
        if len(ids) < (size := self.settings.tokens):
            raise DataError(
                f"tokens is {size}, and the text has {len(ids)}",
                f"set it to {len(ids)} at most; a cartridge is to save",
            )
        return ids[:size]

    def run(self) -> DistillationReport:
        """Run all phases."""
        chunks = chunks_of(self.texts, self.teacher_dialogue.tokenizer, self.chunk_tokens)
        conversations = self._conversations(chunks)
        held = _hold_out(len(conversations), self.settings.seed) if not self.known else set[int]()
        examples = self._examples(conversations, chunks, held)
        self.folder.check_examples(examples)
        model, history, seconds = self._train_cartridge(examples, self._fill_teacher_cache(examples))
        self.folder.save(model)
        questions = self.known or [Question(conversations[i].question, conversations[i].answer) for i in sorted(held)]
        report = DistillationReport(
            results=self._evaluate(model, questions),
            is_known=bool(self.known),
            questions=len(questions),
            conversations=len(examples),
            chunks=len(chunks),
            steps=len(history),
            first_loss=history[0],
            last_loss=sum(history[-_tenth(history) :]) / _tenth(history),
            seconds=seconds,
            folder=str(self.folder.path),
        )
        self.folder.finish(report)
        return report

    def _examples(
        self, conversations: Sequence[Conversation], chunks: Sequence[Chunk], held: set[int]
    ) -> list[DistillationExample]:
        """Encode the conversations that are not held out of training.

        Raises:
            DataError: one does not fit.
        """
        found = []
        for number, one in enumerate(conversations):
            if number in held:
                continue
            try:
                text = chunks[one.chunk].text
                found.append(DistillationExample.from_conversation(one, text, self.teacher_dialogue, self.student))
            except DataError as error:
                raise error.at(f"{self.folder.conversations_file}: row {number + 1}") from error
        return found

    def _conversations(self, chunks: Sequence[Chunk]) -> list[Conversation]:
        """The self-study's conversations; once all are there, those of the file, which may have been edited."""
        if not self.folder.has_conversations:
            study = SelfStudy(
                base=self.teacher,
                dialogue=self.teacher_dialogue,
                chunks=chunks,
                prompts=self.prompts,
                max_answer_tokens=self.settings.max_answer_tokens,
                seed=self.settings.seed,
            )
            count = self.settings.num_questions
            self.folder.keep(study.run(count, self.folder.self_study, self._reporter(GENERATING, count)))
        return self.folder.conversations(len(chunks))

    def _fill_teacher_cache(self, examples: Sequence[DistillationExample]) -> TeacherCache:
        """Compute the teacher's log-probabilities that are not yet on the disk."""
        vocabulary = self.base.config.get_text_config().vocab_size
        cache = TeacherCache(
            folder=self.folder.teacher,
            base=self.teacher,
            examples=examples,
            top_k=self.settings.top_k,
            vocabulary=vocabulary,
            pad_token_id=self._pad_token_id,
        )
        cache.check_size(self.settings.cache_mb)
        cache.fill(self._reporter(LOG_PROBABILITIES, len(examples)))
        return cache

    def _train_cartridge(
        self, examples: Sequence[DistillationExample], cache: TeacherCache
    ) -> tuple[PeftModel, list[float], float]:
        """Train a cartridge; return it with its losses by step, and the seconds since the last interrupt."""
        set_seed(self.settings.seed)
        model = create_cartridge(self.base, self.start_ids())
        if self.student.is_chat:
            model.adapter("default").chat_template = chat_template_of(self.student.tokenizer)
        interrupt = InterruptSaver()
        trainer = self._trainer(model, examples, cache, interrupt)
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
        self, model: PeftModel, examples: Sequence[DistillationExample], cache: TeacherCache, interrupt: InterruptSaver
    ) -> AdapterTrainer:
        settings = self.settings
        students = [example.student for example in examples]
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
            train_dataset=range(len(examples)),
            data_collator=TeacherCollator(Collator(self._pad_token_id, padding_side="left"), students, cache),
            objective=TeacherDivergence(),
            callbacks=[interrupt, ProgressReporter(lambda *step: self.progress(TRAINING, *step))],
        )

    def _evaluate(self, model: PeftModel, questions: Sequence[Question]) -> list[ContextResult]:
        """Compare the cartridge with other methods to give the base model the text."""
        evaluation = ContextEvaluation(
            base=self.base,
            cartridge=model,
            dialogue=self.student,
            texts=self.texts,
            chunk_tokens=self.student_chunk_tokens,
            tokens=self.settings.tokens,
            questions=questions,
            max_answer_tokens=self.settings.max_answer_tokens,
        )
        return evaluation.run(lambda done, total: self.progress(EVALUATING, done, total, ""))

    @property
    def _pad_token_id(self) -> int:
        return int(self.student.tokenizer.pad_token_id)

    def _reporter(self, phase: Phase, total: int) -> Callable[[int], None]:
        return lambda done: self.progress(phase, done, total, "")


def _hold_out(count: int, seed: int) -> set[int]:
    """Draw the numbers of the conversations to measure by, out of ``count``.

    Raises:
        DataError: none would be left to train on.
    """
    if count < 2:
        raise DataError("one conversation is left to train on and to measure by", "ask for more by num_questions")
    return {*Random(seed).sample(range(count), max(count // HELD_OUT, 1))}


def _tenth(history: Sequence[float]) -> int:
    return -(-len(history) // 10)
