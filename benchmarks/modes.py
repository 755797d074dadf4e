"""What gradient checkpointing, bfloat16 and compilation do to a step's time, memory and loss.

SmolLM2-135M with a prefix of 30 virtual tokens, eight rows of 16 to 48 tokens. Run alone: ``make bench``.
"""

from __future__ import annotations

import time

import torch
from memory import resident
from step import ROUNDS, Step, adapted, at_answers, forward_backward, padded_batch
from timing import measure, ratio, report

from softtune.pretrained import load_base_model


def main() -> None:
    torch.manual_seed(0)
    base, tokenizer = load_base_model("smollm2-135m")
    batch = at_answers(padded_batch(tokenizer.pad_token_id))
    plain = forward_backward(model := adapted(base), batch)
    loss = plain()
    checkpointed = adapted(base)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = adapted(base)
    compiled.backbone.compile_layers()
    others = {
        "gradient checkpointing": forward_backward(checkpointed, batch),
        "autocast to bfloat16": in_bfloat16(forward_backward(model, batch)),
        "layers compiled": forward_backward(compiled, batch),
    }
    measures = []
    for name, other in others.items():
        start = time.perf_counter()
        found = other()
        first = time.perf_counter() - start
        measures += [
            measure(f"{name}: step / plain", ratio(other, plain, rounds=ROUNDS)[0], None),
            measure(f"{name}: seconds of the first step", first, None),
            measure(f"{name}: difference of the loss, relative", float(abs(found - loss) / loss), None),
            measure(f"{name}: memory of a step / plain", used(other) / used(plain), None),
        ]
    report("modes", measures)


def in_bfloat16(run: Step) -> Step:
    def lowered() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    return lowered


def used(run: Step) -> float:
    """Bytes above what is resident before."""
    before, most = resident(run)
    return most - before


if __name__ == "__main__":
    main()
