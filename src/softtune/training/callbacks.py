"""What a Trainer calls at its steps: saves at interrupts and evaluations, progress, trackers.

Knows nothing about models.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from softtune import compat
from softtune.training import ranks


class InterruptSaver(TrainerCallback):
    """Ends training with a checkpoint after the current step on Ctrl-C or SIGTERM within its block.

    Runs that step together all end after the same step, and so do all processes of a run. A second Ctrl-C interrupts at
    once, except among several processes, to each of which torchrun passes on the Ctrl-C that it has got already.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}
        self._begun: dict[int, int] = {}
        """Steps that each Trainer has begun, by the ``id`` of its arguments."""

    def __enter__(self) -> InterruptSaver:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._interrupt) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether any process has been interrupted. All must ask this, and all know it then."""
        if ranks.any_of(self.interrupted):
            self.interrupted = True
        return self.interrupted

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begun.pop(id(args), None)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begun[id(args)] = self._begun.get(id(args), 0) + 1

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreed() and self._begun[id(args)] == max(self._begun.values()):
            control.should_save = control.should_training_stop = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        if ranks.world_size() == 1:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class EvaluationSaver(TrainerCallback):
    """Saves a checkpoint at every evaluation, so that the best one is there to be kept."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = True


class ProgressReporter(TrainerCallback):
    """Calls a function with each step's number, the number of steps, and the latest loss and tokens/s as text."""

    def __init__(self, report: Callable[[int, int, str], None]) -> None:
        self.report = report
        self._start = (0.0, 0)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._start = (time.perf_counter(), state.num_input_tokens_seen)
        self.report(state.global_step, state.max_steps, "")

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            then, seen = self._start
            speed = (state.num_input_tokens_seen - seen) / (time.perf_counter() - then)
            self.report(state.global_step, state.max_steps, f"loss {float(logs['loss']):.3f}, {speed:.0f} tokens/s")


def trackers(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """Make the Trainer's callbacks for TensorBoard, which writes into ``folder``, and W&B."""
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(compat.tracking_callback("tensorboard")(SummaryWriter(folder)))
    if "wandb" in names:
        callbacks.append(compat.tracking_callback("wandb")())
    return callbacks
