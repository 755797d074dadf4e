"""Batched requests to adapters with trained heads: sequence and token classification, extractive question answering.

A batch has rows of any adapters with one kind of head. A request is answered once all its rows have been run. Letters:
T tokens of an example, N classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtune import checkpoint
from softtune.adapter import Adapter
from softtune.adapter_context import BatchAdapters, apply_adapters, prompts_cached
from softtune.backbone import Backbone
from softtune.data import Collator, Example
from softtune.errors import TooLongError
from softtune.inputs import Inputs
from softtune.peft_types import TaskType
from softtune.serving import prompt_export
from softtune.serving.engine_config import EngineConfig
from softtune.serving.registry import Version
from softtune.serving.request_queue import RequestHandle
from softtune.serving.requests import checked
from softtune.serving.running_batch import RunningBatch

OUTPUTS = {
    TaskType.SEQ_CLS: ("logits",),
    TaskType.TOKEN_CLS: ("logits",),
    TaskType.QUESTION_ANS: ("start_logits", "end_logits"),
}
"""The outputs of each kind of head."""


MOST_BATCHES = 4
"""Maximum number of full batches that one request may take."""


@dataclass(eq=False)
class HeadRequest:
    """Examples to run through a head, and the callback for its outputs."""

    examples: Sequence[Example]
    tell: Callable[[list[tuple[Tensor, ...]]], None]
    """Called with the head's outputs for each example: logits [N], or [T, N], or [T] of start and [T] of end tokens."""
    outputs: list[tuple[Tensor, ...]] = field(default_factory=list, init=False)
    """The head's outputs so far, for the first of the examples."""

    @property
    def pending(self) -> Sequence[Example]:
        """The examples that have not been run."""
        return self.examples[len(self.outputs) :]

    @property
    def is_done(self) -> bool:
        """Whether all examples have been run."""
        return not self.pending

    def add(self, output: tuple[Tensor, ...]) -> None:
        """Append the head's outputs for the next example; the last one's are reported with all others.

        Raises:
            RequestError: a logit is NaN.
        """
        self.outputs.append(output)
        if self.is_done:
            self.tell([tuple(checked(part) for part in row) for row in self.outputs])


class CachedAdapter:
    """An adapter in memory.

    Args:
        adapter: the adapter.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        tensors = [*adapter.inference_state().values(), *adapter.head_state().values()]
        self.nbytes = sum(tensor.nbytes for tensor in tensors)

    def release(self) -> None:
        """Do nothing, since no other object refers to it."""


class HeadEngine:
    """Runs the requests to one kind of head.

    Args:
        backbone: the base model with such a head, in evaluation mode.
        task: the head's task type.
        pad_token_id: pads shorter rows.
        config: limits of the batch, the queue and memory.
    """

    def __init__(self, backbone: Backbone, task: TaskType, pad_token_id: int, config: EngineConfig) -> None:
        self.backbone = backbone
        self.outputs = OUTPUTS[task]
        self.judges_tokens = task is not TaskType.SEQ_CLS
        self.config = config
        self._collate = Collator(pad_token_id, padding_side="left")
        self.batch: RunningBatch[HeadRequest, CachedAdapter] = RunningBatch(
            config, lambda version: CachedAdapter(prompt_export.load_adapter(backbone, version.folder))
        )

    def export_adapter(self, adapter: Adapter, folder: Path, *, as_kv: bool) -> None:
        """See ``Engine``."""
        checkpoint.save(folder, adapter, self.backbone)

    def submit(self, handle: RequestHandle[HeadRequest]) -> None:
        """See ``Engine``.

        Raises:
            TooLongError: the request has more rows than ``MOST_BATCHES`` full batches.
        """
        if len(handle.request.examples) > MOST_BATCHES * self.config.max_num_seqs:
            raise TooLongError(f"the text has {len(handle.request.examples)} parts", "shorten it")
        self.batch.queue.add(handle)

    def step(self) -> None:
        """Run one batch of the running requests' rows, and answer the requests that are complete with it."""
        self.batch.abort_cancelled()
        self.batch.admit(lambda handle: len(self._pending) < self.config.max_num_seqs)
        if rows := self._next_rows():
            outputs = self._forward([example for _, example in rows], [_version(handle) for handle, _ in rows])
            for (handle, _), output in zip(rows, outputs, strict=True):
                self.batch.process(handle, handle.request.add, output)
        self.batch.evict_idle_adapters()

    def _next_rows(self) -> list[tuple[RequestHandle[HeadRequest], Example]]:
        """Pending rows for one batch, all with as many places for virtual tokens as the first one."""
        pending = self._pending
        alike = [row for row in pending if _num_places(row[1]) == _num_places(pending[0][1])]
        return alike[: self.config.max_num_seqs]

    @property
    def _pending(self) -> list[tuple[RequestHandle[HeadRequest], Example]]:
        """Rows of running requests that have not been run."""
        return [(handle, example) for handle in self.batch.running for example in handle.request.pending]

    @torch.no_grad()
    def _forward(self, examples: Sequence[Example], versions: Sequence[Version]) -> list[tuple[Tensor, ...]]:
        """The head's outputs for each example."""
        call: dict[str, Any] = {name: x.to(self.backbone.device) for name, x in self._collate(examples).items()}
        inputs = Inputs.from_call(call, call.pop("prompt_positions", None), self.backbone)
        adapters = {str(version.number): self.batch.adapter_cache[version].adapter for version in versions}
        batch = BatchAdapters.from_names([str(version.number) for version in versions], adapters.__getitem__)
        with prompts_cached(), apply_adapters(self.backbone, batch, inputs):
            output = self.backbone.model(**call, return_dict=True)
        rows = zip(*(output[name].float().cpu() for name in self.outputs), strict=True)
        if not self.judges_tokens:
            return list(rows)
        lengths = [len(example.input_ids) for example in examples]
        return [tuple(part[-length:] for part in row) for row, length in zip(rows, lengths, strict=True)]


def _num_places(example: Example) -> int:
    return len(example.prompt_positions or ())


def _version(handle: RequestHandle[HeadRequest]) -> Version:
    assert handle.version is not None
    return handle.version
