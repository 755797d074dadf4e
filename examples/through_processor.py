"""Training and generation of two scripts beside this one, whose models read a text and something else by a processor.

A row is a text with the processor's token where the picture or the sound stands, the answer to it, and the picture or
the sound itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from softtune import PeftModel, PrefixTuningConfig, TaskType, get_peft_model


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example."""

    text: str
    answer: str
    media: dict[str, Any]
    """What stands beside the text, by the processor's name for it: ``images`` or ``audio``."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the processor must know of it."""


def arguments(description: str, data: str, model: str, output: str) -> argparse.Namespace:
    """The command line that the scripts share.

    Args:
        description: what a script does.
        data: what its data are.
        model: the default base model.
        output: the default folder.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", nargs="?", help=data)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and made-up data, in seconds")
    parser.add_argument("--model", default=model, help="base model: a folder or a hub name")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of AdamW")
    parser.add_argument("--virtual", type=int, default=8, help="virtual tokens")
    parser.add_argument("--output", default=output, help="the adapter's folder")
    args = parser.parse_args()
    if (args.data is None) != args.tiny:
        parser.error("give the data, or --tiny")
    return args


def fit(base: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[Row], args: argparse.Namespace) -> list[float]:
    """Train a prefix and save it; the mean loss of each epoch."""
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=args.virtual)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    losses = []
    for epoch in range(args.epochs):
        steps = [step(model, inputs, optimizer) for inputs in batches(processor, rows, args.batch_size)]
        losses.append(sum(steps) / len(steps))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}")
    model.save_pretrained(args.output)
    return losses


def batches(processor: Any, rows: Sequence[Row], size: int) -> Iterator[dict[str, Tensor]]:
    """The inputs of each step, with labels on the answers alone."""
    for first in range(0, len(rows), size):
        yield encode(processor, rows[first : first + size], with_answers=True)


def encode(processor: Any, rows: Sequence[Row], *, with_answers: bool) -> dict[str, Tensor]:
    """The inputs of a batch, padded left; with labels where it has answers."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    answers = [f" {row.answer}{tokenizer.eos_token}" if with_answers else "" for row in rows]
    texts = [row.text + answer for row, answer in zip(rows, answers, strict=True)]
    media = {name: [row.media[name] for row in rows] for name in rows[0].media}
    inputs: dict[str, Tensor] = dict(
        processor(text=texts, **media, **rows[0].options, padding=True, return_tensors="pt")
    )
    if with_answers:
        labels = torch.full_like(inputs["input_ids"], -100)
        for number, row in enumerate(rows):
            before, whole = (len(tokenizer(text)["input_ids"]) for text in (row.text, texts[number]))
            labels[number, before - whole :] = inputs["input_ids"][number, before - whole :]
        inputs["labels"] = labels
    return inputs


def step(model: PeftModel, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> float:
    """One step of training; its loss."""
    loss = model.train()(**on_device(model, inputs)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def write(model: PeftModel, processor: Any, row: Row, most: int = 32) -> str:
    """The answer that a model writes to a row's text."""
    inputs = on_device(model, encode(processor, [row], with_answers=False))
    written = model.eval().generate(**inputs, max_new_tokens=most, do_sample=False)
    answer: str = processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def on_device(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs where the model computes, and in its precision."""
    dtype = model.get_base_model().dtype
    placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in placed.items()}


def word_tokenizer(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a tiny model: each word is a token."""
    vocabulary = ["<pad>", "</s>", "<unk>", *special.values(), *words]
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=special,
    )
