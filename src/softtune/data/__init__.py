"""Data: from records to padded batches. Sources (files, the hub) and formats, tasks and templates, encoding (text to
token ids) and collation (padding)."""

from softtune.data.collate import Collator, answer_width, length_batches
from softtune.data.encoding import IGNORED, Example, encode, encode_apart, has_places_within
from softtune.data.records import each_row
from softtune.data.sources import load_records, sample_balanced, split_records
from softtune.data.templates import Template, Verbalizer

__all__ = [
    "IGNORED",
    "Collator",
    "Example",
    "Template",
    "Verbalizer",
    "answer_width",
    "each_row",
    "encode",
    "encode_apart",
    "has_places_within",
    "length_batches",
    "load_records",
    "sample_balanced",
    "split_records",
]
