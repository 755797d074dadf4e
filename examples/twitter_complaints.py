"""Data of the three scripts beside this one: tweets, each a complaint or not.

Any CSV file with the columns ``Tweet text`` and ``Label`` will do; RAFT's twitter_complaints is the well-known one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from softtune import SofttuneError
from softtune.data import check_columns, load_records

LENGTH = 64
BATCH_SIZE = 8


def arguments(description: str) -> argparse.Namespace:
    """The command line that the scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", help="CSV file with the columns 'Tweet text' and 'Label'")
    parser.add_argument("--model", default="smollm2-135m", help="base model: a folder, a hub name or smollm2-135m")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training data")
    parser.add_argument("--output", default="runs/twitter_complaints", help="the adapter's folder")
    return parser.parse_args()


def load(file: str) -> DatasetDict:
    """Load the rows: four fifths for training, one fifth for evaluation."""
    records = load_records(file)
    check_columns(["Tweet text", "Label"], records.column_names)
    return records.train_test_split(test_size=0.2, seed=0)


def preprocess(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, *, pad: bool) -> DatasetDict:
    """Token ids of "Tweet text : ... Label : complaint", with labels on the answer alone; padded left to LENGTH."""

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        answer = tokenizer(f" {row['Label']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        start, end = (
            tokenizer("Tweet text :")["input_ids"],
            tokenizer(" Label :", add_special_tokens=False)["input_ids"],
        )
        tweet = tokenizer(f" {row['Tweet text']}", add_special_tokens=False)["input_ids"]
        prompt = start + tweet[: LENGTH - len(start) - len(end) - len(answer)] + end
        empty = LENGTH - len(prompt) - len(answer) if pad else 0
        return {
            "input_ids": [tokenizer.pad_token_id] * empty + prompt + answer,
            "attention_mask": [0] * empty + [1] * (len(prompt) + len(answer)),
            "labels": [-100] * (empty + len(prompt)) + answer,
        }

    return data.map(encode, remove_columns=data["train"].column_names)


def run(main: Callable[[], None]) -> None:
    """Run a script; an error that its user can fix is printed as one line."""
    try:
        main()
    except SofttuneError as error:
        sys.exit(str(error))
