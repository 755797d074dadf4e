"""Tasks: what a record requests of a model, and what the results answer. A kind of task is one file, and one line of
``KINDS``.

Import what ``__all__`` names from here; the modules are internal.
"""

from softtune.tasks.base import Prediction, Task
from softtune.tasks.choices import ChoiceTask
from softtune.tasks.conversations import ConversationTask
from softtune.tasks.labels import LabelTask
from softtune.tasks.metrics import Quality
from softtune.tasks.spans import SpanTask
from softtune.tasks.tags import TagTask
from softtune.tasks.texts import TextTask

KINDS: list[type[Task]] = [TagTask, SpanTask, ConversationTask, ChoiceTask, TextTask, LabelTask]
"""Every kind of task; a recipe is of the first that fits it."""

__all__ = [
    "ChoiceTask",
    "ConversationTask",
    "LabelTask",
    "Prediction",
    "Quality",
    "SpanTask",
    "TagTask",
    "Task",
    "TextTask",
]
