"""What gradient checkpointing, bfloat16 and compilation do to a step's time, memory and loss.

SmolLM2-135M with a prefix of 30 virtual tokens, eight rows of 16 to 48 tokens. Run alone: ``make bench``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from core import ANSWER, ROUNDS, padded_batch
from memory import resident
from timing import measure, ratio, report

from softtune import PeftModel, PrefixTuningConfig
from softtune.pretrained import load_base_model

Step = Callable[[], torch.Tensor]


def main() -> None:
    torch.manual_seed(0)
    base, tokenizer = load_base_model("smollm2-135m")
    batch = {**padded_batch(tokenizer.pad_token_id), "logits_to_keep": ANSWER + 1}
    plain = step(model := adapted(base), batch)
    loss = plain()
    checkpointed = adapted(base)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = adapted(base)
    compiled.backbone.compile_layers()
    others = {
        "gradient checkpointing": step(checkpointed, batch),
        "autocast to bfloat16": in_bfloat16(step(model, batch)),
        "layers compiled": step(compiled, batch),
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


def adapted(base: torch.nn.Module) -> Any:
    """A copy of the base model with a prefix that starts as every other."""
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30)
    return PeftModel(copy.deepcopy(base), config).train()


def step(model: Any, batch: dict[str, Any]) -> Step:
    """Forward and backward."""

    def run() -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return run


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
