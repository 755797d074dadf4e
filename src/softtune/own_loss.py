"""The loss of a call whose adapters have one of their own, which may be over the prompt's tokens too.

Outputs have no place for the prompt's logits. In a decoder they depend on no row, and are computed once a call.
Letters: B rows, T tokens, K tokens whose logits are kept, P virtual tokens, V vocabulary size.

Internal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softtune.adapter_context import BatchAdapters
from softtune.backbone import Backbone, model_session
from softtune.errors import AdapterError, DataError
from softtune.injection.layout import row_starts
from softtune.injection.modules import ModuleChanges
from softtune.inputs import Inputs
from softtune.methods.prompt import IGNORED, Supervision


def has_own_loss(batch: BatchAdapters, inputs: Inputs, input_type_mask: Tensor | None) -> bool:
    """Whether a call with these adapters and labels has the loss of its adapters instead of the base model's.

    Raises:
        AdapterError: some of the adapters have a loss of their own and others do not, one that has is not alone in its
            row, or ``input_type_mask`` is given and none has one.
        DataError: types or labels do not fit the text, or virtual tokens stand among them.
    """
    adapters = [adapter for parts in batch.adapters.values() for adapter in parts]
    owners = [adapter for adapter in adapters if adapter.config.has_own_loss]
    if input_type_mask is not None and adapters and not owners:
        raise AdapterError("input_type_mask is for CPT, and no adapter of this batch has it", "leave it out")
    if not owners or inputs.labels is None:
        return False
    if len(owners) < len(batch.adapters) or any(len(parts) > 1 for parts in batch.adapters.values()):
        raise AdapterError(
            "labels with rows of adapters that have a loss of their own (CPT) and of others have no loss together",
            "run them apart, or without labels",
        )
    text = inputs.text
    if text is None or inputs.has_cache or inputs.columns is not None:
        raise DataError(
            "CPT's loss is of whole texts behind its virtual tokens", "leave out cache and prompt_positions"
        )
    for name, given in (("labels", inputs.labels), ("input_type_mask", input_type_mask)):
        if given is not None and given.shape != text.shape[:2]:
            raise DataError(f"{name} {list(given.shape)} do not fit the input {list(text.shape[:2])}", "one a token")
    return True


def own_loss(
    backbone: Backbone,
    batch: BatchAdapters,
    inputs: Inputs,
    logits: Tensor,
    *,
    kept: int | Tensor = 0,
    input_type_mask: Tensor | None = None,
    num_items: Any = None,
) -> Tensor:
    """The weighted mean of the cross-entropy over all labels of rows and, once a row, of their prompts.

    A row's first token is predicted from the last virtual token.

    Args:
        backbone: the base model.
        batch: adapters that all have a loss of their own.
        inputs: the call's inputs, with labels.
        logits: [B, K, V] the output's.
        kept: the call's ``logits_to_keep``: their number at the rows' ends, 0 for all, or their columns.
        input_type_mask: [B, T] types of the input's tokens; None where the method knows them.
        num_items: the number of labels of all batches of an update, of which this one has its share by its rows' labels
            alone; None where it is the only one.

    Raises:
        DataError: there is no label.
    """
    assert inputs.labels is not None
    device = logits.device
    labels, mask, types = (None if x is None else x.to(device) for x in (inputs.labels, inputs.mask, input_type_mask))
    assert labels is not None
    columns = torch.arange(labels.shape[1], device=device)
    columns = columns[-kept:] if isinstance(kept, int) else columns[kept]
    is_first = columns == row_starts(mask, len(labels), device)[:, None]
    total, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for number, (adapter,) in enumerate(batch.adapters.values()):
        rows = slice(None) if batch.rows is None else (batch.rows == number).to(device)
        found = adapter.module.supervision(labels[rows], None if types is None else types[rows])
        vectors = adapter.prompt().vectors
        assert vectors is not None
        with model_session(backbone.model), ModuleChanges(backbone, [], [adapter.heads]).applied():
            prompt_logits = backbone.logits_of_vectors(vectors)
        for losses, is_label in (
            _of_rows(found, logits[rows], columns, is_first[rows]),
            _of_first(found, prompt_logits, columns, is_first[rows]),
            _of_prompt(found, prompt_logits),
        ):
            total, count = total + losses.sum(), count + is_label.sum()
    if not bool(count):
        raise DataError("no label in the batch, and none in the prompt", "drop rows without an answer")
    mean = total / count
    return mean if num_items is None else mean * labels[:, 1:].ne(IGNORED).sum() / num_items


def _of_rows(found: Supervision, logits: Tensor, columns: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B, K - 1] of tokens behind others of their row, and which of them count."""
    labels = found.labels[:, columns].masked_fill(is_first, IGNORED)[:, 1:]
    return _cross_entropy(logits[:, :-1], labels) * found.weights[:, columns][:, 1:], labels != IGNORED


def _of_first(found: Supervision, logits: Tensor, columns: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B] of the rows' first tokens by the prompt's logits [P, V], and which of them count."""
    labels = found.labels[:, columns].masked_fill(~is_first, IGNORED).amax(dim=1)
    weights = (found.weights[:, columns] * is_first).sum(dim=1)
    return _cross_entropy(logits[-1].expand(len(labels), -1), labels) * weights, labels != IGNORED


def _of_prompt(found: Supervision, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B, P - 1] of the prompt's own tokens by its logits [P, V], and which of them count."""
    labels, weights = found.prompt_labels[1:], found.prompt_weights[:, 1:]
    return _cross_entropy(logits[:-1], labels) * weights, (labels != IGNORED).expand_as(weights)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[...] of logits [..., V] and labels [...], 0 where one is ``IGNORED``."""
    flat = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(labels.shape)
