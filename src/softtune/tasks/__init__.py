"""Tasks: what a record requests of a model, and what the results answer. A kind of task is one file, and one line of
``KINDS``."""

from softtune.tasks.base import Prediction, Task
from softtune.tasks.choices import ChoiceTask
from softtune.tasks.labels import LabelTask
from softtune.tasks.spans import SpanTask
from softtune.tasks.tags import TagTask
from softtune.tasks.texts import TextTask, alike, with_all_references

KINDS: list[type[Task]] = [TagTask, SpanTask, ChoiceTask, TextTask, LabelTask]
"""Every kind of task; a recipe is of the first that fits it."""

__all__ = [
    "KINDS",
    "ChoiceTask",
    "LabelTask",
    "Prediction",
    "SpanTask",
    "TagTask",
    "Task",
    "TextTask",
    "alike",
    "with_all_references",
]
