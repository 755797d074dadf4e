"""Data: from records to padded batches. Sources (files, the hub) and formats, tasks and templates, encoding (text to
token ids) and collation (padding)."""

from softtune.data.choosing import ChoiceTask
from softtune.data.collate import Collator, answer_width, length_batches
from softtune.data.encoding import IGNORED, Example, encode, encode_apart, has_places_within
from softtune.data.labelling import LabelTask
from softtune.data.records import each_row
from softtune.data.sources import load_records, sample_balanced, split_records
from softtune.data.spans import SpanTask
from softtune.data.tagging import TagTask
from softtune.data.task import Task
from softtune.data.templates import Template, Verbalizer
from softtune.data.writing import TextTask, alike, with_all_references

__all__ = [
    "IGNORED",
    "ChoiceTask",
    "Collator",
    "Example",
    "LabelTask",
    "SpanTask",
    "TagTask",
    "Task",
    "Template",
    "TextTask",
    "Verbalizer",
    "alike",
    "answer_width",
    "each_row",
    "encode",
    "encode_apart",
    "has_places_within",
    "length_batches",
    "load_records",
    "sample_balanced",
    "split_records",
    "with_all_references",
]
