"""What a model with the text in its context expects at each token of an answer, on the disk.

Of each distribution the k most likely tokens are kept, as in "Cartridges" (arXiv 2506.06266), so that a file has 8·k
bytes a token. Letters: N tokens of an answer, k tokens kept, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from softtune import storage
from softtune.backbone import Backbone
from softtune.data import Collator, Example
from softtune.data.collate import answer_width, length_batches
from softtune.distillation.context import prefill_context
from softtune.distillation.dialogue import Dialogue, answer_ids
from softtune.distillation.self_study import Conversation
from softtune.errors import ConfigError
from softtune.formatting import in_units
from softtune.model import PeftModel

SHARD = 32
"""Conversations in a file."""
BATCH = 8
"""Conversations of a forward pass."""
ENTRY_BYTES = 8
"""Bytes of a token's id and log-probability."""


@dataclass(frozen=True, kw_only=True)
class DistillationExample:
    """A conversation as token ids, for the teacher and for the student."""

    chunk: int
    context: list[int]
    """The chunk in front of the teacher's question."""
    teacher: Example
    """The teacher's question and its answer, with labels on that."""
    student: Example
    """The student's question and the same answer."""

    @classmethod
    def from_conversation(
        cls, one: Conversation, text: str, teacher: Dialogue, student: Dialogue
    ) -> DistillationExample:
        """Encode a conversation about the chunk ``text``.

        Raises:
            DataError: it is longer than the student takes.
        """
        example = student.answered(one.question, one.answer)
        rest, answer = teacher.rest(text, one.question), answer_ids(example)
        asked = replace(rest, input_ids=rest.input_ids + answer, labels=rest.labels + answer)
        return cls(chunk=one.chunk, context=teacher.context_ids(text), teacher=asked, student=example)


@dataclass(frozen=True, kw_only=True)
class TeacherCache:
    """The k most likely tokens at each token of the examples' answers, with their log-probabilities.

    Each file's name has a hash of all that its content depends on, so that only what has changed is computed again.

    Args:
        folder: where the files are.
        base: the teacher.
        examples: all examples.
        top_k: k.
        vocabulary: V, the student's; the teacher's further entries are left out.
        pad_token_id: the token id that pads shorter rows.
    """

    folder: Path
    base: PreTrainedModel
    examples: Sequence[DistillationExample]
    top_k: int
    vocabulary: int
    pad_token_id: int

    def check_size(self, megabytes: float) -> None:
        """Check that the files fit into so many megabytes.

        Raises:
            ConfigError: they do not.
        """
        tokens = sum(len(answer_ids(example.student)) for example in self.examples)
        needed = tokens * min(self.top_k, self.vocabulary) * ENTRY_BYTES
        if needed > megabytes * 1e6:
            raise ConfigError(
                f"{tokens} tokens with {self.top_k} log-probabilities each take {in_units(needed)}, cache_mb allows "
                f"{in_units(megabytes * 1e6)}",
                "raise cache_mb, or begin anew with a lower top_k or num_questions",
            )

    def fill(self, advance: Callable[[int], None]) -> None:
        """Compute the files that are missing, and remove those of other examples."""
        for file in {*self.folder.glob("*.safetensors")} - {*self._files}:
            file.unlink()
        for number, file in enumerate(self._files):
            if not file.is_file():
                with storage.staged(self.folder) as stage:
                    save_file(dict(self._computed(number)), stage / file.name)
            advance(min((number + 1) * SHARD, len(self.examples)))

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """Token ids [N, k] and log-probabilities [N, k] of a example, read from the disk at each call."""
        with safe_open(self._files[number // SHARD], framework="pt") as shard:
            return shard.get_tensor(f"{number}.ids").long(), shard.get_tensor(f"{number}.log_probabilities")

    @cached_property
    def _files(self) -> list[Path]:
        return [self._file(number) for number in range(-(-len(self.examples) // SHARD))]

    def _file(self, number: int) -> Path:
        examples = self.examples[number * SHARD : (number + 1) * SHARD]
        sample = Backbone.shared(self.base).embedding_sample()
        content = [[example.context, example.teacher.input_ids, answer_ids(example.teacher)] for example in examples]
        key = json.dumps([str(self.base.dtype), sample, self.top_k, self.vocabulary, content])
        return self.folder / f"shard-{number:05}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"

    def _computed(self, shard: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a file, by name. A chunk is read once for all its examples in it."""
        numbers = range(shard * SHARD, min((shard + 1) * SHARD, len(self.examples)))
        for context in dict.fromkeys(tuple(self.examples[number].context) for number in numbers):
            rows = [number for number in numbers if tuple(self.examples[number].context) == context]
            examples = [self.examples[row].teacher for row in rows]
            model = prefill_context(self.base, context)
            for batch in length_batches([len(example.input_ids) for example in examples], BATCH):
                logits = answer_logits(model, [examples[i] for i in batch], self.pad_token_id)
                for i, own in zip(batch, logits, strict=True):
                    kept = own[:, : self.vocabulary].float().log_softmax(-1)
                    top = kept.topk(min(self.top_k, kept.shape[1]), dim=-1)
                    yield f"{rows[i]}.ids", top.indices.int().cpu().contiguous()
                    yield f"{rows[i]}.log_probabilities", top.values.cpu().contiguous()


@torch.no_grad()
def answer_logits(model: PeftModel, examples: Sequence[Example], pad_token_id: int) -> list[Tensor]:
    """The logits [N, V] that predict the labelled tokens of each example."""
    batch = Collator(pad_token_id, padding_side="left")(examples)
    labels = batch.pop("labels")
    width = answer_width(labels)
    options = {"logits_to_keep": width} if model.keeps_logits else {}
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits = model(**inputs, **options, use_cache=False).logits[:, -width:]
    counts = [len(answer_ids(example)) for example in examples]
    return [row[-count - 1 : -1] for row, count in zip(logits, counts, strict=True)]
