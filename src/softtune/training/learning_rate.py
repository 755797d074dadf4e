"""Learning rate range test: Smith, 2017, Cyclical Learning Rates for Training Neural Networks, §3.3.

The rate grows by the same factor from step to step. Too low a rate changes the loss little, too high a one raises it.
The adapter is trained all the while, so that the loss is lowest late, at a rate already too high for a run. The
suggestion is one order of magnitude below it, a rule of thumb: Gugger, 2018, How Do You Find A Good Learning Rate. It
is a rate to start from, not the best one.
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
"""Weight of past losses in the running mean, which evens out differences between batches."""
FALLEN = 0.9
"""The loss counts as fallen if it is ever below this share of the first one."""
RISEN = 2.0
"""The test ends when the loss is more than so many times its lowest."""
SHARE = 0.1
"""Share of the rate at which the loss was lowest that is suggested."""


@dataclass(frozen=True)
class RangeTest:
    """Losses of steps with increasing learning rates."""

    rates: list[float] = field(default_factory=list)
    """For each loss the learning rate of the last update before it; 0 for the first one, before any update."""
    losses: list[float] = field(default_factory=list)
    """Running mean of the loss, one per step."""

    @property
    def lowest(self) -> float:
        """The rate at which the loss was lowest."""
        return self.rates[min(range(len(self.losses)), key=self.losses.__getitem__)]

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate at which the loss was lowest; None if it hardly fell."""
        return SHARE * self.lowest if min(self.losses) < FALLEN * self.losses[0] else None

    @property
    def end(self) -> str | None:
        """Why the test ended before its last step; None if it did not."""
        if len(self.losses) == STEPS:
            return None
        risen = self.losses[-1] > RISEN * min(self.losses)
        return (
            f"the loss was more than {RISEN:g} times its lowest" if risen else "at the next rate the loss was no number"
        )


def range_test(trainer: AdapterTrainer) -> RangeTest:
    """Train 40 steps with learning rates from 1e-4 to 1, or until the loss rises. The adapter is not usable afterwards.

    Raises:
        TrainingError: the loss is NaN or infinite from the beginning.
    """
    optimizer = trainer.create_optimizer()
    ratio = optimizer.param_groups[0]["lr"] / trainer.args.learning_rate
    for group in optimizer.param_groups:
        group["lr"] *= LOWEST / trainer.args.learning_rate
    growth = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: growth**step)
    trainer.args.max_steps, trainer.args.save_strategy = STEPS, "no"
    watcher = _Watcher(ratio)
    trainer.add_callback(watcher)
    try:
        trainer.train()
    except TrainingError as error:  # a loss that is NaN or infinite ends the test
        if not watcher.result.losses:
            raise TrainingError(
                "the loss is no number before anything is trained", "check the base model's weights, and bf16"
            ) from error
    return watcher.result


class _Watcher(TrainerCallback):
    """Records learning rates and mean losses, and ends the training when the loss rises.

    Args:
        ratio: the factor of the learning rate of the optimiser's first group, which is the one that is logged.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.result = RangeTest()
        self._mean = 0.0
        self._rate = 0.0

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        # A step's loss is computed before its update: it shows the rate of the update before.
        rate, self._rate = self._rate, logs["learning_rate"] / self.ratio
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * logs["loss"]
        loss = self._mean / (1 - SMOOTHING ** (len(self.result.losses) + 1))
        self.result.rates.append(rate)
        self.result.losses.append(loss)
        control.should_training_stop |= not math.isfinite(loss) or loss > RISEN * min(self.result.losses)
