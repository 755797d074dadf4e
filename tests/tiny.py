"""A tiny base model with a tokenizer in a folder, and a small data file: what the tests of whole runs work on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = ["red", "green", "blue", "cold", "warm", "good", "bad", "the", "sky", "is", "text", "label", ":", " "]
LABELS = ("warm", "cold")
TEMPLATE = "text : {words} label : "


def save_models(folder: Path, seed: int = 0, **llama: Any) -> dict[str, str]:
    """A Llama, some fields of its config replaced, a BERT and a T5, each in a folder with a tokenizer of WORDS."""
    torch.manual_seed(seed)
    size = {"vocab_size": len(WORDS) + 3, "pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3}
    models = {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                **size,
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=32,
                **{"max_position_embeddings": 64, "attention_dropout": 0.1, **llama},
            )
        ),
        "bert": BertForSequenceClassification(
            BertConfig(**size, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        ),
        "t5": T5ForConditionalGeneration(
            T5Config(**size, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer(ends=name != "llama").save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def tokenizer(*, ends: bool) -> PreTrainedTokenizerFast:
    """One token a word or space; ``ends`` puts the end-of-sequence token behind a text."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Split(" ", "isolated")
    if ends:
        core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write_rows(file: Path, rows: int) -> str:
    """A CSV file whose label is decided by its first word: red is warm, blue is cold."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["words", "label"])
        for i in range(rows):
            middle = " ".join([WORDS[(i * 7 + k) % 7] for k in range(1 + i % 4)])
            writer.writerow([f"{'red' if i % 2 else 'blue'} {middle}", LABELS[1 - i % 2]])
    return str(file)


CHATML = (
    "{% for message in messages %}<s>{{ message.role }} {{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
"""A chat template as ChatML's, with white space behind the end of a turn."""
MARKED = CHATML.replace(
    "{{ message.role }} {{ message.content }}</s>\n",
    "{% if message.role == 'assistant' %}assistant {% generation %}{{ message.content }}</s>{% endgeneration %}"
    "{{ '\\n' }}"
    "{% else %}{{ message.role }} {{ message.content }}</s>\n{% endif %}",
)
"""The same, which marks the assistant's turns."""


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a word, space, newline or end of a turn."""
    words = ["<pad>", "</s>", "<unk>", "<s>", "\n", "system", "user", "assistant", *WORDS]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = Split(" ", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def save_chat_model(folder: Path, template: str | None = CHATML, **llama: Any) -> str:
    """A Llama in a folder with a tokenizer that has a chat template."""
    torch.manual_seed(0)
    words = chat_tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(words),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
        initializer_range=0.3,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        **{"max_position_embeddings": 128, **llama},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def recipe_fields(model: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of 16 rows for one of ``save_models``."""
    return {
        "model": model,
        "train": write_rows(folder / "rows.csv", 16),
        "test_size": 4,
        "template": TEMPLATE,
        "label_column": "label",
        "labels": list(LABELS),
        "max_length": 24,
        "learning_rate": 0.02,
        "output": str(folder / "adapter"),
        "options": {"num_virtual_tokens": 3},
        **changes,
    }
