"""From records to batches: sources (files, the hub), templates (text to token ids) and collate (padding)."""

from softtune.data.collate import Collator, length_batches
from softtune.data.sources import load_records, sample_balanced, split_records
from softtune.data.templates import Encoded, Example, Template, Verbalizer, encode, encode_records

__all__ = [
    "Collator",
    "Encoded",
    "Example",
    "Template",
    "Verbalizer",
    "encode",
    "encode_records",
    "length_batches",
    "load_records",
    "sample_balanced",
    "split_records",
]
