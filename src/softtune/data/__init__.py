"""From records to batches: sources (files, the hub), templates, encoding (text to token ids) and collate (padding)."""

from softtune.data.collate import Collator, answer_width, length_batches
from softtune.data.encoding import IGNORED, Example, encode, encode_apart
from softtune.data.sources import each_row, load_records, sample_balanced, split_records
from softtune.data.task import Task
from softtune.data.templates import Template, Verbalizer

__all__ = [
    "IGNORED",
    "Collator",
    "Example",
    "Task",
    "Template",
    "Verbalizer",
    "answer_width",
    "each_row",
    "encode",
    "encode_apart",
    "length_batches",
    "load_records",
    "sample_balanced",
    "split_records",
]
