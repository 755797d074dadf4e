"""One training step against PEFT's, and generation with a prefix against the base model's own.

SmolLM2-135M in fp32. Run alone on an idle machine: ``make bench``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from timing import measure, ratio, report
from torch import nn

import softtune
from softtune.pretrained import load_base_model
from softtune.training.profile import ProductRecorder

ROWS, LENGTH, ANSWER = 8, 64, 2
VIRTUAL_TOKENS = 30
ROUNDS = 5


def main() -> None:
    torch.manual_seed(0)
    base, tokenizer = load_base_model("smollm2-135m")
    batch = padded_batch(tokenizer.pad_token_id)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL_TOKENS}
    ours = softtune.get_peft_model(copy.deepcopy(base), softtune.PrefixTuningConfig(**settings)).train()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.PrefixTuningConfig(**settings)).train()
    weights = ours.prompt_encoder["default"].embedding.weight
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(weights)

    name = f"prefix P={VIRTUAL_TOKENS}, {ROWS} rows of {LENGTH}"
    step, ours_s, theirs_s = ratio(training_step(ours, batch), training_step(theirs, batch), rounds=ROUNDS)
    at_answers = {**batch, "logits_to_keep": ANSWER + 1}
    kept, kept_s, _ = ratio(training_step(ours, at_answers), training_step(theirs, batch), rounds=ROUNDS)
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


def padded_batch(pad: int) -> dict[str, torch.Tensor]:
    """Rows of 16 to 48 real tokens, padded left to LENGTH, with the answer at their ends."""
    lengths = torch.linspace(16, 48, ROWS).int()
    mask = (torch.arange(LENGTH) >= LENGTH - lengths[:, None]).long()
    ids = torch.randint(100, 40_000, (ROWS, LENGTH)) * mask + pad * (1 - mask)
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def training_step(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    """Forward, backward, and the optimiser's update."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_products(step: Callable[[], None]) -> Callable[[], None]:
    """The matrix products of a step again, with their own arguments, and nothing else of it."""
    with (recorder := ProductRecorder()):
        step()
    return recorder.replay


def generation(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """64 new tokens for every row."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    length = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    return lambda: model.generate(**inputs, **length)


if __name__ == "__main__":
    main()
