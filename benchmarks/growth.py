"""How the time of a step grows with tokens, virtual tokens and adapters: fits and plots a line for each."""

from __future__ import annotations

import statistics
from typing import Any

import matplotlib.pyplot as plt
import torch
from step import ROUNDS, Step, adapted, forward_backward
from timing import RESULTS, measure, seconds
from transformers import PreTrainedModel

TOKENS, VIRTUAL, ADAPTERS = (75, 150, 300, 600, 1200), (10, 160, 320, 480, 640), (1, 2, 4, 8, 16)
LENGTH = 30
"""Tokens of a row."""


def measures(base: PreTrainedModel) -> list[dict[str, Any]]:
    """R² of each line; the plot goes to ``results/growth.png``."""
    steps: dict[str, dict[int, Step]] = {
        "tokens": {n: step(base, rows=n // LENGTH, tokens=n) for n in TOKENS},
        "virtual tokens": {p: step(base, virtual=p) for p in VIRTUAL},
        "adapters, two rows each": {a: step(base, rows=2 * a, adapters=a) for a in ADAPTERS},
    }
    found = {name: times(by_size) for name, by_size in steps.items()}
    draw(found)
    return [
        measure(f"growth of a step in {name}: R2 of a line", fit(by_size)[2], 0.95, at_least=True)
        for name, by_size in found.items()
    ]


def step(base: PreTrainedModel, *, rows: int = 8, tokens: int = 0, virtual: int = 30, adapters: int = 1) -> Step:
    """Forward and backward pass on random rows, which share no prefix, with logits at their ends."""
    names = ["default", *(f"adapter-{i}" for i in range(1, adapters))]
    model = adapted(base, virtual=virtual)
    for name in names[1:]:
        model.add_adapter(name, model.peft_config["default"])
    model.set_requires_grad(names)
    length = (tokens or rows * LENGTH) // rows
    ids = torch.randint(100, 40_000, (rows, length))
    mixed = {"adapter_names": [names[i % adapters] for i in range(rows)]} if adapters > 1 else {}
    return forward_backward(model, {"input_ids": ids, "labels": ids, "logits_to_keep": 3, **mixed})


def times(steps: dict[int, Step]) -> dict[int, float]:
    """Median seconds by size, with the sizes timed in turn. A machine is faster in some minutes than in others, so each
    size counts by its share of its round."""
    rounds = [[seconds(run) for run in steps.values()] for _ in range(ROUNDS + 1)][1:]
    whole = statistics.median(map(sum, rounds))
    shares = zip(*([one / sum(round_) for one in round_] for round_ in rounds), strict=True)
    return {size: whole * statistics.median(share) for size, share in zip(steps, shares, strict=True)}


def fit(found: dict[int, float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of the least-squares line."""
    sizes = [float(size) for size in found]
    slope, start = statistics.linear_regression(sizes, [*found.values()])
    return slope, start, statistics.correlation(sizes, [*found.values()]) ** 2


def draw(found: dict[str, dict[int, float]]) -> None:
    """Plot points and lines, one panel each."""
    _, pictures = plt.subplots(1, len(found), figsize=(11, 3.4), sharey=False, layout="constrained")
    for axes, (name, by_size) in zip(pictures, found.items(), strict=True):
        slope, start, _ = fit(by_size)
        sizes = [0, max(by_size)]
        axes.plot(sizes, [start + slope * size for size in sizes], color="tab:gray", linewidth=1)
        axes.plot(list(by_size), list(by_size.values()), "o", color="tab:blue")
        axes.set(xlabel=name, xlim=0, ylim=0)
    pictures[0].set_ylabel("seconds of a step")
    plt.savefig(RESULTS / "growth.png", dpi=150)
