"""What the benchmarks time: a batch of eight rows, adapters on copies of a base model, and their training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

import softtune
from softtune.data.collate import answer_width
from softtune.training.profile import ProductRecorder

ROWS, LENGTH, ANSWER = 8, 64, 2
VIRTUAL_TOKENS = 30
ROUNDS = 5

Batch = dict[str, Any]
Step = Callable[[], Any]


def padded_batch(pad: int, *, rows: int = ROWS, length: int = LENGTH, vocabulary: int = 40_000) -> Batch:
    """Rows with a quarter to three quarters of ``length`` real tokens, padded left, with the answer at their ends."""
    lengths = torch.linspace(length // 4, 3 * length // 4, rows).int()
    mask = (torch.arange(length) >= length - lengths[:, None]).long()
    ids = torch.randint(min(100, vocabulary // 2), vocabulary, (rows, length)) * mask + pad * (1 - mask)
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def at_answers(batch: Batch) -> Batch:
    """The batch as softtune's Trainer passes it to the model: with logits at the answers only."""
    return {**batch, "logits_to_keep": answer_width(batch["labels"])}


def without_shared_padding(batch: Batch) -> Batch:
    """The batch padded to its longest row, as a dynamic collator does."""
    first = int((batch["attention_mask"] != 0).any(dim=0).int().argmax())
    return {name: x[:, first:] for name, x in batch.items()}


def adapted(
    base: nn.Module,
    config: str = "PrefixTuningConfig",
    virtual: int = VIRTUAL_TOKENS,
    *,
    side: ModuleType = softtune,
    **options: Any,
) -> Any:
    """A copy of the base model with an adapter of softtune or PEFT; softtune's always have the same initial weights."""
    torch.manual_seed(0)
    settings = getattr(side, config)(task_type="CAUSAL_LM", num_virtual_tokens=virtual, **options)
    return side.get_peft_model(copy.deepcopy(base), settings).train()


def forward_backward(model: nn.Module, batch: Batch) -> Step:
    """A step without an optimizer; it returns the loss."""

    def step() -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step


def training_step(model: nn.Module, batch: Batch) -> Step:
    """Forward pass, backward pass, and the optimizer's update."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    gradients = forward_backward(model, batch)

    def step() -> None:
        gradients()
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_products(step: Step) -> Step:
    """Replays the matrix products of a step with their original arguments, and nothing else of it."""
    with (recorder := ProductRecorder()):
        step()
    return recorder.replay
