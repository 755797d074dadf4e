"""Savings of the trunk cache, for a prefix in the last third of the layers, and of training eight adapters at once."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from growth import step
from memory import apart, resident
from step import ANSWER, ROUNDS, Step, adapted, at_answers, matrix_products, padded_batch, training_step
from timing import measure, ratio
from transformers import PreTrainedModel

from softtune import PeftModel, PrefixTuningConfig
from softtune.data import Collator, Example
from softtune.pretrained import load_base_model
from softtune.training.multi_run import train_together
from softtune.training.trainer import AdapterTrainer, training_arguments

ADAPTERS, STEPS, ROWS = 8, 6, 2


def measures(base: PreTrainedModel, pad: int) -> list[dict[str, Any]]:
    """Lines of the results."""
    batches = [padded_batch(pad) for _ in range(2)]
    late, plain, full = (adapted(base, layers=layers) for layers in ("last:10", "last:10", None))
    cached = epoch(late, batches)
    with late.trunk_cache(memory=1024):
        cached()  # the first epoch, which fills the cache
        share, seconds, _ = ratio(cached, epoch(full, batches), rounds=ROUNDS)
        to_uncached, _, _ = ratio(cached, epoch(plain, batches), rounds=ROUNDS)
    together, one = (apart(__file__, way) for way in ("together", "alone"))
    name = f"{ADAPTERS} adapters in one run, batch {ROWS} each"
    return [
        measure("epoch >= 2 with the trunk cache, prefix in the last 10 of 30 layers / prefix in all", share, 0.45),
        measure("the same / the same prefix without the cache", to_uncached, None),
        measure("seconds of that epoch", seconds, None),
        *(line for threads in (1, 2) for line in _times(name, base, pad, threads)),
        measure(f"{name}: peak memory / {ADAPTERS} processes of one run each", together / one / ADAPTERS, 0.3),
        measure("MB of all at once, with the model", together / 1e6, None),
        measure("MB of one run, with the model", one / 1e6, None),
    ]


def _times(name: str, base: PreTrainedModel, pad: int, threads: int) -> list[dict[str, Any]]:
    """Results for runs at once against the same runs in sequence, and for the matrix products of their steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = (partial(several, base, pad, at_once=at_once) for at_once in (True, False))
        share, together, apart = ratio(*runs, rounds=ROUNDS)
        products = matrix_products(step(base, rows=ADAPTERS * ROWS, adapters=ADAPTERS))
        products_of_one = matrix_products(step(base, rows=ROWS))
        floor, _, _ = ratio(products, lambda: [products_of_one() for _ in range(ADAPTERS)], rounds=ROUNDS)
    finally:
        torch.set_num_threads(before)
    at = f"{name}, {threads} thread{'s' * (threads > 1)}"
    return [
        measure(f"{at}: time / {ADAPTERS} runs one after the other", share, 0.7),
        measure(f"{at}: the same of a step's matrix products alone", floor, None),
        measure(f"{at}: seconds of {STEPS} steps of all at once", together, None),
        measure(f"{at}: seconds of {STEPS} steps of all one after the other", apart, None),
    ]


def epoch(model: PeftModel, batches: list[dict[str, Any]]) -> Step:
    """A step on each batch."""
    steps = [training_step(model, at_answers(batch)) for batch in batches]

    def run() -> None:
        for each in steps:
            each()

    return run


def several(base: PreTrainedModel, pad: int, *, at_once: bool, count: int = ADAPTERS) -> None:
    """Train adapters for a few steps, at once or one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = [trainer(base, pad, Path(folder, str(seed)), seed) for seed in range(count)]
        if at_once:
            train_together(trainers)
        else:
            for one in trainers:
                one.train()


def trainer(base: PreTrainedModel, pad: int, folder: Path, seed: int) -> AdapterTrainer:
    """A Trainer of STEPS steps on random texts of 16 to 48 tokens."""
    torch.manual_seed(seed)
    model = PeftModel(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30))
    rows = [torch.randint(100, 40_000, (int(n),)).tolist() for n in torch.linspace(16, 48, STEPS * ROWS)]
    settings = {"max_steps": STEPS, "per_device_train_batch_size": ROWS, "save_steps": STEPS + 1}
    return AdapterTrainer(
        model,
        args=training_arguments(folder, seed=seed, learning_rate=1e-4, **settings),
        train_dataset=[Example(input_ids=row, labels=[-100] * (len(row) - ANSWER) + row[-ANSWER:]) for row in rows],
        data_collator=Collator(pad, padding_side="left"),
    )


def _peak(way: str) -> float:
    """Peak resident bytes, including the model."""
    base, tokenizer = load_base_model("smollm2-135m")
    count = ADAPTERS if way == "together" else 1
    return resident(partial(several, base, int(tokenizer.pad_token_id), at_once=True, count=count))[1]


if __name__ == "__main__":
    print(_peak(sys.argv[1]))
