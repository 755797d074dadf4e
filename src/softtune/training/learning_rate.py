"""Looks for a learning rate by a range test: Smith, 2017, Cyclical Learning Rates for Training Neural Networks, §3.3.

The rate grows by the same factor from step to step. Too low a rate changes the loss little, too high a one raises it.
Training goes on all the while, so that the loss is lowest late, at a rate already too high for a run. What is suggested
is one order of magnitude below it, a rule of thumb: Gugger, 2018, How Do You Find A Good Learning Rate. It is a rate to
begin with, and not the best one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from softtune.errors import TrainingError
from softtune.training.trainer import AdapterTrainer

LOWEST, HIGHEST, STEPS = 1e-4, 1.0, 40
SMOOTHING = 0.8
"""Weight of the past in the mean of losses, which batches make uneven."""
FALLEN = 0.9
"""A loss that never is so small a part of the first one has not fallen."""
RISEN = 2.0
"""The test ends where the loss is so many times its lowest."""
SHARE = 0.1
"""Of the rate at which the loss was lowest."""


@dataclass(frozen=True)
class RangeTest:
    """Losses of steps with ever higher learning rates."""

    rates: list[float] = field(default_factory=list)
    """The highest that each loss was computed behind; 0 for the first one."""
    losses: list[float] = field(default_factory=list)
    """Running means, one a step."""

    @property
    def lowest(self) -> float:
        """The rate at which the loss was lowest."""
        return self.rates[min(range(len(self.losses)), key=self.losses.__getitem__)]

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate at which the loss was lowest. None where it hardly fell."""
        return SHARE * self.lowest if min(self.losses) < FALLEN * self.losses[0] else None

    @property
    def end(self) -> str | None:
        """Why there are fewer steps than asked for; None where there are all."""
        if len(self.losses) == STEPS:
            return None
        risen = self.losses[-1] > RISEN * min(self.losses)
        return (
            f"the loss was more than {RISEN:g} times its lowest" if risen else "at the next rate the loss was no number"
        )


def range_test(trainer: AdapterTrainer) -> RangeTest:
    """Train with a learning rate from 1e-4 to 1 in 40 steps, or until the loss rises; the adapter is spoiled by it.

    Raises:
        TrainingError: the loss is no number from the beginning.
    """
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = LOWEST
    growth = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: growth**step)
    trainer.args.max_steps, trainer.args.save_strategy = STEPS, "no"
    watcher = _Watcher()
    trainer.add_callback(watcher)
    try:
        trainer.train()
    except TrainingError as error:  # at a rate where the loss is no number, the test is over
        if not watcher.found.losses:
            raise TrainingError(
                "the loss is no number before anything is trained: check the base model's weights, and bf16"
            ) from error
    return watcher.found


class _Watcher(TrainerCallback):
    """Notes rates and mean losses, and ends the training when these rise."""

    def __init__(self) -> None:
        self.found = RangeTest()
        self._mean = 0.0
        self._rate = 0.0

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        # A step's loss is that of the rates before it; the first one's is that of none.
        rate, self._rate = self._rate, logs["learning_rate"]
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * logs["loss"]
        loss = self._mean / (1 - SMOOTHING ** (len(self.found.losses) + 1))
        self.found.rates.append(rate)
        self.found.losses.append(loss)
        control.should_training_stop |= not math.isfinite(loss) or loss > RISEN * min(self.found.losses)
