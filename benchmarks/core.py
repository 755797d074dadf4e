"""Compares a training step with PEFT's, and generation with a prefix with the base model's.

SmolLM2-135M in fp32. Run alone on an idle machine: ``make bench``.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from step import LENGTH, ROUNDS, ROWS, VIRTUAL_TOKENS, Step, adapted, at_answers, padded_batch, training_step
from timing import measure, ratio, report

from softtune.pretrained import load_base_model


def main() -> None:
    torch.manual_seed(0)
    base, tokenizer = load_base_model("smollm2-135m")
    batch = padded_batch(tokenizer.pad_token_id)
    ours, theirs = adapted(base), adapted(base, side=peft)
    weights = ours.prompt_encoder["default"].embedding.weight
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(weights)

    name = f"prefix P={VIRTUAL_TOKENS}, {ROWS} rows of {LENGTH}"
    step, ours_s, theirs_s = ratio(training_step(ours, batch), training_step(theirs, batch), rounds=ROUNDS)
    kept, kept_s, _ = ratio(training_step(ours, at_answers(batch)), training_step(theirs, batch), rounds=ROUNDS)
    written, ours_w, base_w = ratio(generation(ours.eval(), batch), generation(base, batch), rounds=ROUNDS)
    report(
        "core",
        [
            measure(f"training step / peft's, {name}", step, 1.0),
            measure(f"training step with logits at the answers only / peft's, {name}", kept, None),
            measure("greedy generation of 64 tokens / the base model's", written, 1.1),
            measure("seconds of a step: softtune", ours_s, None),
            measure("seconds of a step: softtune, logits at the answers only", kept_s, None),
            measure("seconds of a step: peft", theirs_s, None),
            measure("seconds of generation: softtune", ours_w, None),
            measure("seconds of generation: base model", base_w, None),
        ],
    )


def generation(model: Any, batch: dict[str, torch.Tensor]) -> Step:
    """Greedy generation of 64 new tokens for every row."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    length = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    return lambda: model.generate(**inputs, **length)


if __name__ == "__main__":
    main()
