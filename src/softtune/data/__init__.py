"""Data: from records to padded batches. Sources (files, the hub) and formats, tasks and templates, encoding (text to
token ids) and collation (padding).

Import from here; the modules are internal.
"""

from softtune.data.collate import Collator
from softtune.data.encoding import Example, encode
from softtune.data.records import check_columns
from softtune.data.sources import load_records, sample_balanced, split_records
from softtune.data.templates import Template, Verbalizer

__all__ = [
    "Collator",
    "Example",
    "Template",
    "Verbalizer",
    "check_columns",
    "encode",
    "load_records",
    "sample_balanced",
    "split_records",
]
