"""The folder of a distillation: what an unfinished one has done, or the cartridge with its report.

    conversations.jsonl     questions and answers, to be read, and edited before training begins
    distillation.json       the report of a finished distillation
    unfinished/             the settings, questions, log-probabilities and checkpoints; removed at the end

Knows nothing about models but how to save one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from softtune import storage
from softtune.distillation.report import REPORT_NAME, DistillationReport
from softtune.distillation.self_study import Conversation, read_conversations, write_conversations
from softtune.distillation.settings import Distillation
from softtune.distillation.teacher import Lesson
from softtune.errors import ConfigError, DataError
from softtune.model import PeftModel
from softtune.training.recipe import holds_adapter
from softtune.training.trainer import checkpoints_in

CONVERSATIONS_NAME = "conversations.jsonl"
SETTINGS_NAME = "settings.json"
LESSONS_NAME = "lessons.json"


class DistillationFolder:
    """The output folder of a distillation."""

    def __init__(self, settings: Distillation) -> None:
        self.settings = settings
        self.path = Path(settings.output)
        self.unfinished = self.path / "unfinished"
        self.self_study = self.unfinished / "self_study"
        self.teacher = self.unfinished / "teacher"
        self.checkpoints = self.unfinished / "checkpoints"

    def check(self) -> None:
        """Check that the folder can be written, and nothing in it would be overwritten.

        Raises:
            ConfigError: it has an adapter.
            CheckpointError: it is a file, or cannot be written.
        """
        storage.check_writable(self.path)
        if (self.path / REPORT_NAME).is_file() or (holds_adapter(self.path) and not self.unfinished.is_dir()):
            raise ConfigError(f"{self.path} has a finished adapter", "choose another output or delete it")

    def begin(self, texts: Sequence[str], prompts: Sequence[str]) -> None:
        """Keep the settings, or compare them with those that an interrupted distillation has kept.

        Raises:
            ConfigError: they differ.
        """
        digest = hashlib.sha256(json.dumps([[*texts], [*prompts]]).encode()).hexdigest()
        now = {**self.settings.decisive, "text and seed prompts": digest}
        file = self.unfinished / SETTINGS_NAME
        then = storage.read_json(file) if file.is_file() else now
        for name, value in now.items():
            if then.get(name) != value:
                raise ConfigError(
                    f"{name} is {value!r}, and {then.get(name)!r} in the interrupted distillation in {self.path}",
                    f"go on with the settings it began with, or delete the folder {self.path}",
                )
        with storage.staged(self.unfinished) as stage:
            storage.write_json(stage / SETTINGS_NAME, now)

    @property
    def has_conversations(self) -> bool:
        """Whether all conversations are there."""
        return (self.path / CONVERSATIONS_NAME).is_file()

    def keep(self, conversations: Sequence[Conversation]) -> None:
        """Write all conversations."""
        with storage.staged(self.path) as stage:
            write_conversations(stage / CONVERSATIONS_NAME, conversations)

    def conversations(self, num_chunks: int) -> list[Conversation]:
        """Read all conversations.

        Raises:
            DataError: the file has none, or was edited and is malformed.
        """
        found = read_conversations(self.path / CONVERSATIONS_NAME, num_chunks)
        if not found:
            raise DataError(f"{self.path / CONVERSATIONS_NAME} has no conversation", "delete it to have them written")
        return found

    def check_lessons(self, lessons: Sequence[Lesson]) -> None:
        """Keep a hash of what is trained on, or compare it with that of the checkpoints.

        Raises:
            ConfigError: the conversations were edited after the training had begun.
        """
        content = json.dumps([[one.context, one.student.input_ids] for one in lessons])
        now = {"lessons": hashlib.sha256(content.encode()).hexdigest()}
        file = self.checkpoints / LESSONS_NAME
        if checkpoints_in(self.checkpoints) and storage.read_json(file) != now:
            raise ConfigError(
                f"{self.path / CONVERSATIONS_NAME} is not what the training began with",
                f"restore it, or delete the folder {self.checkpoints}",
            )
        with storage.staged(self.checkpoints) as stage:
            storage.write_json(stage / LESSONS_NAME, now)

    def finish(self, model: PeftModel, report: DistillationReport) -> None:
        """Save the cartridge and the report, and remove what was unfinished."""
        model.save_pretrained(self.path)
        report.save(self.path)
        shutil.rmtree(self.unfinished, ignore_errors=True)

    @property
    def kept(self) -> str:
        """What an interrupted distillation leaves, as a message."""
        return f"stopped; what is done is kept in {self.path}: the same command goes on"
