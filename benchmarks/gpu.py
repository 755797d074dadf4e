"""Compares training steps with PEFT's on a GPU, and generation with the base model's: speed and memory.

A Llama of a billion random weights, in bfloat16 and in four bits. Both sides run in turn in one process. Run alone:
``make bench-gpu``; without a GPU it prints one line. ``--tiny`` runs all of it on the CPU with a tiny model, and keeps
no results.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import peft
import torch
from step import VIRTUAL_TOKENS, Batch, Step, at_answers, padded_batch, training_step
from timing import measure, ratio, report, show
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import softtune

MEGA = 10**6
METHODS = ("PrefixTuningConfig", "PromptTuningConfig")
SIZE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32_000}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
TINY_SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 97}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is run, and where."""

    device: str
    sizes: dict[str, int]
    rows: int
    length: int
    written: int
    """Tokens that are generated for each row."""
    rounds: int
    virtual: int

    @property
    def counts_memory(self) -> bool:
        return self.device == "cuda"

    def must(self, limit: float) -> float | None:
        """A limit, where the numbers mean anything."""
        return limit if self is WHOLE else None


WHOLE = Scale(device="cuda", sizes=SIZE | HEADS, rows=16, length=512, written=128, rounds=7, virtual=VIRTUAL_TOKENS)
TINY = Scale(device="cpu", sizes=TINY_SIZE | TINY_HEADS, rows=2, length=16, written=4, rounds=1, virtual=3)


def main() -> None:
    scale = TINY if "--tiny" in sys.argv[1:] else WHOLE
    if scale is WHOLE and not torch.cuda.is_available():
        print("skipped: there is no GPU that CUDA finds")
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        special = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
        LlamaForCausalLM(LlamaConfig(**scale.sizes, **special, tie_word_embeddings=True)).to(
            torch.bfloat16
        ).save_pretrained(folder)
        measures = [found for kind in kinds(scale) for found in measures_of(kind, folder, scale)]
    (show if scale is TINY else report)("gpu", measures)


def kinds(scale: Scale) -> tuple[str, ...]:
    has_bitsandbytes = find_spec("bitsandbytes") is not None
    if not has_bitsandbytes:
        print("4 bits are left out: bitsandbytes is not installed")
    return ("bf16", "4 bit") if has_bitsandbytes else ("bf16",)


def measures_of(kind: str, folder: str, scale: Scale) -> Iterator[dict[str, Any]]:
    vocabulary = scale.sizes["vocab_size"]
    batch = padded_batch(0, rows=scale.rows, length=scale.length, vocabulary=vocabulary)
    batch = {name: tensor.to(scale.device) for name, tensor in batch.items()}
    of = f"{kind}, {scale.rows} rows of {scale.length}"
    for method in METHODS:
        yield from training_measures(f"{method} P={scale.virtual}, {of}", kind, folder, method, batch, scale)
    yield from generation_measures(of, kind, folder, batch, scale)


def training_measures(
    name: str, kind: str, folder: str, method: str, batch: Batch, scale: Scale
) -> Iterator[dict[str, Any]]:
    ours, theirs = (with_adapter(kind, folder, method, side, scale) for side in (softtune, peft))
    step, ours_s, theirs_s = in_turn(training_step(ours, batch), training_step(theirs, batch), scale)
    kept, kept_s, _ = in_turn(training_step(ours, at_answers(batch)), training_step(theirs, batch), scale)
    yield measure(f"training step / peft's, {name}", step, scale.must(1.0))
    yield measure(f"training step with logits at the answers only / peft's, {name}", kept, None)
    yield measure(f"seconds of a step: softtune, {name}", ours_s, None)
    yield measure(f"seconds of a step: softtune, logits at the answers only, {name}", kept_s, None)
    yield measure(f"seconds of a step: peft, {name}", theirs_s, None)
    if scale.counts_memory:
        yield measure(
            f"MB of a step beyond the models: softtune, {name}", most_memory(training_step(ours, batch)), None
        )
        yield measure(f"MB of a step beyond the models: peft, {name}", most_memory(training_step(theirs, batch)), None)


def generation_measures(name: str, kind: str, folder: str, batch: Batch, scale: Scale) -> Iterator[dict[str, Any]]:
    model, alone = with_adapter(kind, folder, "PrefixTuningConfig", softtune, scale), base(kind, folder, scale)
    written, ours_s, alone_s = in_turn(generation(model.eval(), batch, scale), generation(alone, batch, scale), scale)
    count = scale.rows * scale.written
    yield measure(f"greedy generation with a prefix / the base model's, {name}", written, scale.must(1.1))
    yield measure(f"tokens/s: softtune, {name}", count / ours_s, None)
    yield measure(f"tokens/s: base model, {name}", count / alone_s, None)


def base(kind: str, folder: str, scale: Scale) -> Any:
    """The base model in a precision, on the device."""
    more: dict[str, Any] = {"device_map": scale.device}
    if kind == "4 bit":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more).eval()


def with_adapter(kind: str, folder: str, method: str, side: ModuleType, scale: Scale) -> Any:
    """A base model of its own with an adapter of softtune or PEFT."""
    config = getattr(side, method)(task_type="CAUSAL_LM", num_virtual_tokens=scale.virtual)
    return side.get_peft_model(base(kind, folder, scale), config).train()


def generation(model: Any, batch: Batch, scale: Scale) -> Step:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    length = {"max_new_tokens": scale.written, "min_new_tokens": scale.written, "do_sample": False}
    return lambda: model.generate(**inputs, **length)


def in_turn(ours: Step, theirs: Step, scale: Scale) -> tuple[float, float, float]:
    """See ``timing.ratio``; each call is over when the device has done its work."""
    return ratio(waiting(ours, scale), waiting(theirs, scale), rounds=scale.rounds)


def waiting(run: Step, scale: Scale) -> Step:
    def whole() -> None:
        run()
        if scale.device == "cuda":
            torch.cuda.synchronize()

    return whole


def most_memory(step: Step) -> float:
    """Megabytes of the device's memory that a step needs at most, beyond what is there before."""
    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEGA


if __name__ == "__main__":
    main()
