"""Compares training steps in bfloat16 with PEFT's in bfloat16, and with softtune's own in float32.

SmolLM2-135M on one thread: eight rows of 16 to 48 real tokens, and two of 1,024. Run alone on an idle machine: ``make
bench``.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from typing import Any

import peft
import torch
from memory import apart, resident
from step import (
    ROUNDS,
    Batch,
    Step,
    adapted,
    at_answers,
    forward_backward,
    matrix_products,
    padded_batch,
    training_step,
    without_shared_padding,
)
from timing import measure, ratio, report
from torch import nn

import softtune
from softtune.backbone.prepacked_weights import prepacked_weights
from softtune.pretrained import load_base_model

SIDES = {"softtune": softtune, "peft": peft}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PREFIX, PROMPT = ("PrefixTuningConfig", 30), ("PromptTuningConfig", 100)
WRITTEN = 32
"""Tokens to write of each text."""
LONG = 1024
"""Tokens of each of the two long rows."""


def main() -> None:
    torch.manual_seed(0)
    base, pad = {}, 0
    for name, dtype in DTYPES.items():
        loaded, tokenizer = load_base_model("smollm2-135m")
        base[name], pad = loaded.to(dtype).requires_grad_(False).eval(), tokenizer.pad_token_id
    batch = padded_batch(pad)
    report("precision", [*short_rows(base, batch), *prepacked(base, batch), *long_rows(base), *memory()])


def short_rows(base: dict[str, nn.Module], batch: Batch) -> list[dict[str, Any]]:
    """Steps on eight rows: beside PEFT's, beside those in float32, and beside their own matrix products."""
    step = step_of(base["bf16"], batch)
    measures = []
    for name, given, must in (("64", batch, 0.4), ("the longest row", without_shared_padding(batch), 0.52)):
        share = ratio(step, step_of(base["bf16"], given, side="peft"), rounds=ROUNDS)[0]
        measures.append(measure(f"bf16, prefix P=30: step / peft's bf16, padded to {name}", share, must))
    ours, theirs = (forward_backward(adapted(base["bf16"], *PREFIX, side=side), batch) for side in SIDES.values())
    share, seconds, _ = ratio(ours, theirs, rounds=ROUNDS)
    in_fp32, _, of_fp32 = ratio(step, step_of(base["fp32"], batch), rounds=ROUNDS)
    of_products, of_step, products = ratio(step, matrix_products(step), rounds=ROUNDS)
    measures += [
        measure("bf16: model(**padded_batch) with labels and backward / peft's bf16", share, 0.6),
        measure("seconds of that call", seconds, None),
        measure("bf16 step / the same in fp32", in_fp32, 0.5),
        measure("bf16 step / its matrix products alone", of_products, None),
        measure("seconds of a step in fp32", of_fp32, None),
        measure("seconds of a step in bf16", of_step, None),
        measure("seconds of its matrix products", products, None),
    ]
    for name, own in base.items():
        prompt, others = (step_of(own, batch, PROMPT, side=side) for side in SIDES)
        share = ratio(prompt, others, rounds=ROUNDS)[0]
        measures.append(measure(f"{name}, prompt tuning P=100: step / peft's", share, 0.2))
    return measures


def prepacked(base: dict[str, Any], batch: Batch) -> list[dict[str, Any]]:
    """A step, and texts, computed from prepacked weights."""
    model = adapted(base["fp32"], *PREFIX)
    step = training_step(model, at_answers(batch))
    products = matrix_products(step)
    with model.prepacked_weights(gradients=True):
        share = ratio(step, products, rounds=ROUNDS)[0]
    measures = [measure("fp32 step with prepacked weights / its matrix products without", share, 1.0)]
    for name, own in base.items():
        for texts in (1, 16):
            plain, copied = written(own, texts, is_prepacked=False), written(own, texts, is_prepacked=True)
            share = ratio(copied, plain, rounds=3)[0]
            measures.append(
                measure(
                    f"{name}, {WRITTEN} tokens of {texts} texts: with prepacked weights, made anew / without",
                    share,
                    None,
                )
            )
    return measures


def written(base: Any, texts: int, *, is_prepacked: bool) -> Step:
    """Writes texts with the base model alone."""
    ids = torch.randint(100, 40_000, (texts, 16))
    options = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}

    def run() -> None:
        with prepacked_weights(base) if is_prepacked else nullcontext():
            base.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return run


def long_rows(base: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Steps on two rows of 1,024 tokens, with labels at their ends and on all tokens."""
    measures = []
    for name, own in base.items():
        for everywhere, must in ((False, 0.6), (True, None)):
            batch = long_batch(everywhere=everywhere)
            ours, theirs = (step_of(own, batch, side=side) for side in SIDES)
            share, seconds, _ = ratio(ours, theirs, rounds=2)
            measures += [
                measure(f"{name}, 2 rows of {LONG} tokens{', all labelled' * everywhere}: step / peft's", share, must),
                measure("seconds of that step", seconds, None),
            ]
    return measures


def memory() -> list[dict[str, Any]]:
    """Peak memory above the model, beside PEFT's in the same precision."""
    measures = []
    for rows, name in (("short", "bf16"), ("long", "fp32"), ("long", "bf16")):
        ours, theirs = (apart(__file__, side, name, rows, rounds=3) for side in SIDES)
        measures += [
            measure(f"{name}, {rows} rows, prefix P=30: peak memory above the model / peft's", ours / theirs, 0.4),
            measure("MB of softtune's", ours / 1e6, None),
        ]
    return measures


def step_of(base: nn.Module, batch: Batch, method: tuple[str, int] = PREFIX, *, side: str = "softtune") -> Step:
    """A training step: softtune's Trainer has logits at the answers only."""
    given = at_answers(batch) if side == "softtune" else batch
    return training_step(adapted(base, *method, side=SIDES[side]), given)


def long_batch(*, everywhere: bool) -> Batch:
    """Two rows without padding; labels are at the last two tokens of each, or everywhere."""
    batch = {**padded_batch(0, rows=2, length=LONG), "attention_mask": torch.ones(2, LONG, dtype=torch.long)}
    ids = torch.randint(100, 40_000, (2, LONG))
    return {**batch, "input_ids": ids, "labels": ids if everywhere else batch["labels"]}


def peak(side: str, name: str, rows: str) -> float:
    """Peak resident bytes of two training steps, less those before."""
    base, tokenizer = load_base_model("smollm2-135m")
    base = copy.deepcopy(base.to(DTYPES[name]))  # in memory, not in a file that is read at first use
    batch = long_batch(everywhere=False) if rows == "long" else padded_batch(tokenizer.pad_token_id)
    step = step_of(base, batch, side=side)
    before, most = resident(lambda: (step(), step()))
    return most - before


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak(*sys.argv[1:]))
    else:
        main()
