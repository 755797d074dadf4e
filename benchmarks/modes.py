"""Effects of gradient checkpointing, bfloat16 and compilation on a step's time, memory and loss.

SmolLM2-135M with a prefix of 30 virtual tokens, eight rows of 16 to 48 tokens. Run alone: ``make bench``.
"""

from __future__ import annotations

import sys
import time

import torch
from memory import apart, resident
from step import ROUNDS, Step, adapted, at_answers, forward_backward, padded_batch
from timing import measure, ratio, report

from softtune.compat import enable_checkpointing
from softtune.pretrained import load_base_model

FORMS = ("gradient checkpointing", "autocast to bfloat16", "layers compiled")
PLAIN = "plain"


def main() -> None:
    plain, memory = step(PLAIN), apart(__file__, PLAIN)
    loss = plain()
    measures = []
    for form in FORMS:
        other = step(form)
        start = time.perf_counter()
        found = other()
        first = time.perf_counter() - start
        measures += [
            measure(f"{form}: step / plain", ratio(other, plain, rounds=ROUNDS)[0], None),
            measure(f"{form}: seconds of the first step", first, None),
            measure(f"{form}: difference of the loss, relative", float(abs(found - loss) / loss), None),
            measure(f"{form}: memory of a step / plain", apart(__file__, form) / memory, None),
        ]
    report("modes", measures)


def step(form: str) -> Step:
    """Forward and backward pass in one of the forms; it returns the loss."""
    base, tokenizer = load_base_model("smollm2-135m")
    torch.manual_seed(0)
    batch = at_answers(padded_batch(tokenizer.pad_token_id))
    model = adapted(base)
    with torch.no_grad():
        model(batch["input_ids"][:1, -2:])  # reads the weights from disk, which happens on first use
    if form == "gradient checkpointing":
        enable_checkpointing(model, use_reentrant=False)
    if form == "layers compiled":
        model.backbone.compile_layers()
    run = forward_backward(model, batch)
    return in_bfloat16(run) if form == "autocast to bfloat16" else run


def in_bfloat16(run: Step) -> Step:
    def lowered() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return lowered


def used(form: str) -> float:
    """Bytes that a first step needs beyond those resident before, including compilation."""
    before, most = resident(step(form))
    return most - before


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(used(sys.argv[1]))
    else:
        main()
