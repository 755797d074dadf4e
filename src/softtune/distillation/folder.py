"""The folder of a distillation: what an unfinished one has done, or the cartridge with its report.

    conversations.jsonl     questions and answers, to be read, and edited before training begins
    distillation.json       the report; a folder that has it is finished
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
from softtune.distillation.settings import HOLDS_OUT, Distillation
from softtune.distillation.teacher import DistillationExample
from softtune.errors import ConfigError, DataError
from softtune.model import PeftModel
from softtune.training.recipe import holds_adapter
from softtune.training.trainer import checkpoints_in

CONVERSATIONS_NAME = "conversations.jsonl"
SETTINGS_NAME = "settings.json"
EXAMPLES_NAME = "examples.json"
TEXTS = "text and seed prompts"
"""Key of the hash of the text and the seed prompts, among the settings."""
CHANGES = {
    TEXTS: "the text or the seed prompts have changed",
    HOLDS_OUT: "questions were given or dropped",
}
"""What has changed, where the name and the two values of a setting do not say it."""


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
            ConfigError: it has an adapter, or conversations of a distillation that is no longer there; or it is the
                corpus.
            CheckpointError: it is a file, or cannot be written.
        """
        storage.check_writable(self.path)
        if (self.path / REPORT_NAME).is_file() or (holds_adapter(self.path) and not self.unfinished.is_dir()):
            raise ConfigError(f"{self.path} has a finished adapter", "choose another output or delete it")
        if self.has_conversations and not (self.unfinished / SETTINGS_NAME).is_file():
            file = self.conversations_file
            raise ConfigError(f"{file} is of no interrupted distillation", "choose another output or delete the file")
        corpus = self.settings.corpus
        if corpus is not None and self.path.resolve() == Path(corpus).expanduser().resolve():
            raise ConfigError(f"{self.path} is the corpus", "choose another output")

    def begin(self, texts: Sequence[str], prompts: Sequence[str]) -> None:
        """Keep the settings, or compare them with those that an interrupted distillation has kept.

        Raises:
            ConfigError: they differ.
        """
        digest = hashlib.sha256(json.dumps([[*texts], [*prompts]]).encode()).hexdigest()
        now = {**self.settings.decisive, TEXTS: digest}
        file = self.unfinished / SETTINGS_NAME
        then = storage.read_json(file) if file.is_file() else now
        for name, value in now.items():
            if then.get(name, value) != value:
                place = f"the interrupted distillation in {self.path}"
                differs = f"{name} is {value!r}, and {then.get(name)!r} in {place}"
                raise ConfigError(
                    f"{CHANGES[name]} since {place} began" if name in CHANGES else differs,
                    f"go on with the settings it began with, or delete the folder {self.path}",
                )
        with storage.staged(self.unfinished) as stage:
            storage.write_json(stage / SETTINGS_NAME, now)

    @property
    def conversations_file(self) -> Path:
        """The file of all conversations."""
        return self.path / CONVERSATIONS_NAME

    @property
    def has_conversations(self) -> bool:
        """Whether all conversations are there."""
        return self.conversations_file.is_file()

    def keep(self, conversations: Sequence[Conversation]) -> None:
        """Write all conversations."""
        with storage.staged(self.path) as stage:
            write_conversations(stage / CONVERSATIONS_NAME, conversations)

    def conversations(self, num_chunks: int) -> list[Conversation]:
        """Read all conversations.

        Raises:
            DataError: the file has none, or was edited and is malformed.
        """
        found = read_conversations(self.conversations_file, num_chunks)
        if not found:
            raise DataError(f"{self.conversations_file} has no conversation", "delete it to have them written")
        return found

    def check_examples(self, examples: Sequence[DistillationExample]) -> None:
        """Keep a hash of what is trained on, or compare it with that of the checkpoints.

        Raises:
            ConfigError: the conversations were edited after the training had begun.
        """
        content = json.dumps([[one.context, one.student.input_ids] for one in examples])
        now = {"sha256": hashlib.sha256(content.encode()).hexdigest()}
        file = self.checkpoints / EXAMPLES_NAME
        then = storage.read_json(file) if file.is_file() else {}
        if checkpoints_in(self.checkpoints) and then != now:
            raise ConfigError(
                f"{self.conversations_file} is not what the training began with",
                f"restore it, or delete the folder {self.checkpoints}",
            )
        with storage.staged(self.checkpoints) as stage:
            storage.write_json(stage / EXAMPLES_NAME, now)

    def save(self, model: PeftModel) -> None:
        """Save the cartridge. What is unfinished stays, so that the same distillation can go on to its report."""
        model.save_pretrained(self.path)

    def finish(self, report: DistillationReport) -> None:
        """Save the report, and remove what was unfinished."""
        report.save(self.path)
        shutil.rmtree(self.unfinished, ignore_errors=True)

    @property
    def kept(self) -> str:
        """What an interrupted distillation leaves, as a message."""
        return f"stopped; what is done is kept in {self.path}: the same command goes on"
