"""Batched inference: scores of label words or of a head's classes, tags, spans, and generated text.

Rows of similar length share a batch; rows are padded left, so that answers are at the end. Knows nothing about files
or metrics. Letters: B rows, N labels, T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from softtune.adapter_context import prompts_cached
from softtune.data import Collator, Example
from softtune.data.collate import answer_width, length_batches
from softtune.data.encoding import IGNORED
from softtune.errors import AdapterError
from softtune.model import PeftModel

Advance = Callable[[int], None]
"""Progress callback: takes the number of rows done."""


def unwatched(done: int) -> None:
    """An ``Advance`` that does nothing."""


@prompts_cached()
def score_words(
    model: PeftModel,
    rows: Sequence[Sequence[Example]],
    pad_token_id: int,
    *,
    batch_size: int = 32,
    advance: Advance = unwatched,
) -> Tensor:
    """[B, N] log-probabilities of each label's words after each row's prompt; -inf where a row has fewer labels.

    Args:
        model: a language model with its adapter.
        rows: for each record one example per label, encoded with that label's words as its answer.
        pad_token_id: the token id that pads shorter rows.
        batch_size: rows of one forward pass. A record takes one row per label, unless all labels are single tokens.
        advance: called after every batch with the number of records done.

    Raises:
        AdapterError: a score is NaN.
    """
    is_one_token = all(sum(x != IGNORED for x in example.labels) == 1 for row in rows for example in row)
    scores = torch.full((len(rows), max(map(len, rows), default=0)), -torch.inf)
    if is_one_token and not model.backbone.is_encoder_decoder:
        score = _score_next_token
    else:
        score, batch_size = _score_whole_answers, max(1, batch_size // max(1, scores.shape[1]))
    for batch in _batches([len(row[0].input_ids) for row in rows], batch_size, advance):
        with torch.no_grad():
            batch_scores = _check_nan(score(model, [rows[i] for i in batch], pad_token_id))
        scores[batch, : batch_scores.shape[1]] = batch_scores
    return scores


def _score_next_token(model: PeftModel, rows: Sequence[Sequence[Example]], pad_token_id: int) -> Tensor:
    """[B, N] scores of all labels from one row per record, where every label is a single token."""
    batch = _collate([row[0] for row in rows], pad_token_id)  # with labels, which tell where a suffix or infix goes
    logits: Tensor = _forward(model, batch, keep=2).logits[:, -2].float().log_softmax(-1)
    answers = [torch.tensor([example.input_ids[-1] for example in row], device=logits.device) for row in rows]
    return _stacked([row[labels] for row, labels in zip(logits, answers, strict=True)])


def _score_whole_answers(model: PeftModel, rows: Sequence[Sequence[Example]], pad_token_id: int) -> Tensor:
    """[B, N] scores of all labels of all records from one forward pass, one row per label.

    A decoder computes the text that a record's rows share once (see ``injection.pack``), and gets no last token.
    """
    batch = _collate([example for row in rows for example in row], pad_token_id)
    labels = batch["labels"].to(model.device)
    if model.backbone.is_encoder_decoder:
        logits = _forward(model, batch).logits
    else:
        keep = answer_width(labels) - 1
        labels = labels[:, -keep:]
        per_virtual_token = ("prompt_positions", "prefix_mask")
        shorter = {name: x if name in per_virtual_token else x[:, :-1] for name, x in batch.items()}
        logits = _forward(model, shorter, keep=keep).logits[:, -keep:]
    found = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return _stacked((found * (labels != IGNORED)).sum(-1).split([len(row) for row in rows]))


def _stacked(scores: Sequence[Tensor]) -> Tensor:
    """Stack the scores of each record to [B, N], with -inf for missing labels."""
    return pad_sequence([*scores], batch_first=True, padding_value=-torch.inf).cpu()


@prompts_cached()
def score_head(
    model: PeftModel,
    examples: Sequence[Example],
    pad_token_id: int,
    *,
    batch_size: int = 16,
    advance: Advance = unwatched,
) -> Tensor:
    """[B, N] log-probabilities of a classification head's classes.

    Raises:
        AdapterError: a score is NaN.
    """
    scores = torch.zeros(len(examples), model.config.num_labels)
    for batch in _batches([len(e.input_ids) for e in examples], batch_size, advance):
        inputs = _collate([examples[i] for i in batch], pad_token_id)
        inputs.pop("labels", None)
        with torch.no_grad():
            scores[batch] = _check_nan(_forward(model, inputs).logits.float().log_softmax(-1).cpu())
    return scores


@prompts_cached()
def score_tokens(
    model: PeftModel,
    examples: Sequence[Example],
    pad_token_id: int,
    *,
    batch_size: int = 16,
    advance: Advance = unwatched,
) -> list[Tensor]:
    """A token classification head's logits [T, N] of each text.

    Args:
        model: a token classifier with its adapter.
        examples: the texts.
        pad_token_id: the token id that pads shorter rows.
        batch_size: rows of one forward pass.
        advance: called after every batch with the number of rows done.

    Raises:
        AdapterError: a logit is NaN.
    """
    found: dict[int, Tensor] = {}
    for batch in _batches([len(example.input_ids) for example in examples], batch_size, advance):
        with torch.no_grad():
            output = _forward(model, _collate([examples[i] for i in batch], pad_token_id))
            logits = _check_nan(output.logits).float().cpu()
        found |= {i: row[len(row) - len(examples[i].input_ids) :].clone() for i, row in zip(batch, logits, strict=True)}
    return [found[i] for i in range(len(examples))]


@prompts_cached()
def score_spans(
    model: PeftModel,
    examples: Sequence[Example],
    pad_token_id: int,
    *,
    batch_size: int = 16,
    advance: Advance = unwatched,
) -> list[tuple[Tensor, Tensor]]:
    """Start and end logits [T] of each text: of the answer's first token, and of its last.

    Args:
        model: a question answering model with its adapter.
        examples: questions with their contexts.
        pad_token_id: the token id that pads shorter rows.
        batch_size: rows of one forward pass.
        advance: called after every batch with the number of rows done.

    Raises:
        AdapterError: a logit is NaN.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in _batches([len(example.input_ids) for example in examples], batch_size, advance):
        with torch.no_grad():
            output = _forward(model, _collate([examples[i] for i in batch], pad_token_id))
        first_logits, last_logits = (_check_nan(x).float().cpu() for x in (output.start_logits, output.end_logits))
        for i, first, last in zip(batch, first_logits, last_logits, strict=True):
            padding = len(first) - len(examples[i].input_ids)
            found[i] = first[padding:], last[padding:]
    return [found[i] for i in range(len(examples))]


@prompts_cached()
def write_texts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    *,
    batch_size: int = 16,
    advance: Advance = unwatched,
    **generation: Any,
) -> list[str]:
    """Generate a text after each prompt.

    Args:
        model: a language model with its adapter.
        tokenizer: its tokenizer.
        prompts: encoded with an empty answer.
        batch_size: prompts of one batch.
        advance: called after every batch with the number of prompts done.
        generation: options of ``generate``, such as ``max_new_tokens``, ``num_beams`` and ``do_sample``.
    """
    texts = [""] * len(prompts)
    for batch in _batches([len(e.input_ids) for e in prompts], batch_size, advance):
        inputs = _collate([prompts[i] for i in batch], int(tokenizer.pad_token_id))
        options = generation | {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with torch.no_grad():
            ids = model.generate(pad_token_id=tokenizer.pad_token_id, **options)
        start = 0 if model.backbone.is_encoder_decoder else inputs["input_ids"].shape[1]
        for i, text in zip(batch, tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
    return texts


def _batches(lengths: Sequence[int], batch_size: int, advance: Advance) -> Iterator[list[int]]:
    """Indices of rows of similar length, batch by batch; calls ``advance`` after each."""
    done = 0
    for batch in length_batches(lengths, batch_size):
        yield batch
        done += len(batch)
        advance(done)


def _check_nan(scores: Tensor) -> Tensor:
    """Return the scores unchanged.

    Raises:
        AdapterError: a score is NaN.
    """
    if bool(scores.isnan().any()):
        raise AdapterError("the scores are no numbers, as after a training that blew up", "train anew at a lower rate")
    return scores


def _collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    return Collator(pad_token_id, padding_side="left")(examples)


def _forward(model: PeftModel, batch: dict[str, Tensor], keep: int | None = None) -> Any:
    """Outputs of a batch, with logits of the last ``keep`` tokens only where the model supports that."""
    options: dict[str, Any] = {"logits_to_keep": keep} if keep and model.keeps_logits else {}
    if model.backbone.is_decoder_only:
        options["use_cache"] = False
    return model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, **options)
