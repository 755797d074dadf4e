"""A thin Hugging Face Trainer for adapters: logits at the answers only, adapters in the checkpoints, and stops that
keep what was reached (an interrupt, a loss that is not a number).

Knows nothing about recipes, files or templates. Letters: B rows, T tokens.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from softtune import checkpoint, compat
from softtune.acting import baked
from softtune.data import IGNORED, answer_width
from softtune.errors import DataError, TrainingError
from softtune.gradients import describe, without_gradient
from softtune.model import PeftModel

STATE_FILE = "trainer_state.json"
"""Written last: a checkpoint without it was cut short."""


@compat.trainer_hooks
class AdapterTrainer(Trainer):
    """Trains the active adapter of a ``PeftModel``.

    Args:
        model: the base model with its adapter.
        trunk_cache: megabytes of memory for what layers below the prefix make of each text, and
        trunk_cache_disk: megabytes of a temporary file beside the checkpoints, when that is full; see
            ``PeftModel.trunk_cache``. By default both are 0: every step runs all layers.
        kwargs: the Trainer's.

    Raises, from ``train``:
        ConfigError, UnsupportedModelError: there can be no such cache, of this size or with this model and adapter.
        TrainingError: the loss or the adapter is no number; the adapter is then what it was at the last loss that was
            one.
    """

    def __init__(self, model: PeftModel, *, trunk_cache: float = 0, trunk_cache_disk: float = 0, **kwargs: Any) -> None:
        self.trunk_cache = (trunk_cache, trunk_cache_disk)
        self.gradients: Callable[[dict[str, Tensor]], Tensor] | None = None
        """Computes a batch's loss and gradients in place of the Trainer; None where that does it."""
        super().__init__(model=model, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is the mean over a batch's answers
        for callback in compat.console_callbacks():
            self.remove_callback(callback)
        self._learns = False
        """Whether the first step has given gradients to what is trained."""
        self._last_good: list[Tensor] = []
        """What was trained when the loss was last a number."""

    @property
    def history(self) -> list[dict[str, float]]:
        """``step`` and ``loss`` of each step, and ``validation_loss`` where there was one; those before an interrupt
        too."""
        names = {"loss": "loss", "eval_loss": "validation_loss"}
        return [
            {"step": entry["step"], names[name]: entry[name]}
            for entry in self.state.log_history
            for name in names
            if name in entry
        ]

    @property
    def has_ended(self) -> bool:
        """Whether a training has nothing more to do: all steps are done, or rows held out have said to stop."""
        return self.state.global_step >= self.state.max_steps or _is_out_of_patience(self.state)

    def train(self, resume_from_checkpoint: str | None = None) -> None:  # type: ignore[override]
        """The Trainer's, with the trunk cache; nothing where rows held out had said to stop at the checkpoint."""
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE_FILE)))
            if _is_out_of_patience(state):
                self.state = state
                self.load_best()
                return
        assert isinstance(self.model, PeftModel)
        with self._trunk(), self.model.gradient_watch.suspended():  # an error comes instead of its warning
            super().train(resume_from_checkpoint=resume_from_checkpoint)
        self._check_numbers()

    def _trunk(self) -> AbstractContextManager[Any]:
        if self.gradients is not None or not any(self.trunk_cache):
            return nullcontext()
        assert isinstance(self.model, PeftModel)
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        return self.model.trunk_cache(*self.trunk_cache, folder)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss, from the logits of the rows' ends alone where the answers stand there."""
        assert isinstance(self.model, PeftModel)
        return super().compute_loss(model, {**inputs, **kept_logits(self.model, inputs)}, *args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One step.

        Raises:
            DataError: the batch has no label to learn from.
            TrainingError: the loss is not a number, or what is trained got no gradient.
        """
        if isinstance(labels := inputs.get("labels"), Tensor) and bool((labels == IGNORED).all()):
            raise DataError(f"no label in the batch of step {self.state.global_step + 1}: drop rows without an answer")
        if self.gradients is None:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        else:
            loss = self.gradients(compat.prepared_inputs(self, inputs))
        if not torch.isfinite(loss):
            raise self._blown_up(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        if not self._learns:
            self._check_gradients()
        self._keep()
        return loss

    def _check_gradients(self) -> None:
        """Raise TrainingError where the first step left what is trained without a gradient."""
        assert isinstance(self.model, PeftModel)
        for adapter in map(self.model.adapter, self.model.active_adapters):
            gradients = {name: parameter.grad for name, parameter in adapter.trained.items()}
            if idle := adapter.cut_off(without_gradient(gradients)):
                raise TrainingError(describe(idle, len(gradients)))
        self._learns = True

    def _keep(self) -> None:
        """Note what is trained as good; the update of the step comes later."""
        self._last_good = self._last_good or [torch.empty_like(p) for p in self._trained()]
        for kept, parameter in zip(self._last_good, self._trained(), strict=True):
            kept.copy_(parameter.detach())

    def _check_numbers(self) -> None:
        """Raise TrainingError where the last step left what is trained, or the prompt that it makes, with something
        else than numbers."""
        assert isinstance(self.model, PeftModel)
        prompts = [self.model.adapter(name).baked_state() for name in self.model.active_adapters]
        made = [x for prompt in prompts for x in prompt.values()]
        if not all(torch.isfinite(x).all() for x in (*self._trained(), *made)):
            raise self._blown_up(f"the adapter is no longer made of numbers after step {self.state.global_step}")

    def _blown_up(self, what: str) -> TrainingError:
        """Put back the numbers of the best checkpoint, where there is one, or else of the last finite loss, and say
        so."""
        when = "the last finite loss"
        if self.state.best_model_checkpoint is not None:
            when = "its lowest validation loss"
            self.load_best()
        elif self._last_good:
            for kept, parameter in zip(self._last_good, self._trained(), strict=True):
                parameter.data.copy_(kept)
        return TrainingError(f"{what}: lower the learning rate; the adapter is kept as it was at {when}")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the prompt computed once."""
        with baked():
            return super().evaluation_loop(*args, **kwargs)

    def _trained(self) -> list[nn.Parameter]:
        """What the adapters train; nothing of a base model that is trained itself."""
        assert isinstance(self.model, PeftModel)
        adapters = [self.model.adapter(name) for name in self.model.active_adapters]
        return [parameter for adapter in adapters for parameter in adapter.trained.values()]

    def save_adapter(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter alone: its folder holds all that training goes on from. Raises TrainingError where it is no
        longer made of numbers."""
        self._check_numbers()
        assert isinstance(self.model, PeftModel)
        name = self.model.active_adapter
        checkpoint.save(output_dir or str(self.args.output_dir), self.model.adapter(name), self.model.backbone)

    def load_adapter(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert isinstance(self.model, PeftModel)
        checkpoint.load(resume_from_checkpoint, self.model.adapter(self.model.active_adapter))

    def load_best(self) -> None:
        self.load_adapter(str(self.state.best_model_checkpoint))


def _is_out_of_patience(state: TrainerState) -> bool:
    callbacks: Any = state.stateful_callbacks
    stopping = callbacks.get(EarlyStoppingCallback.__name__)
    return stopping is not None and bool(
        stopping["attributes"]["early_stopping_patience_counter"] >= stopping["args"]["early_stopping_patience"]
    )


def kept_logits(model: PeftModel, batch: Mapping[str, Any]) -> dict[str, int]:
    """How many logits at the rows' ends the loss of a batch needs, as an option of ``forward``; none where it needs all
    of them."""
    labels, text = batch.get("labels"), batch.get("input_ids")
    if not model.keeps_logits or labels is None or text is None or labels.shape != text.shape:
        return {}
    return {"logits_to_keep": answer_width(labels)}


class InterruptSaver(TrainerCallback):
    """Lets Ctrl-C within its block end trainings after the running step, with a checkpoint; those that take steps
    together, all after the same one. A second one ends them at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None
        self._begun: dict[int, int] = {}
        """Steps that each training has begun, by the ``id`` of its arguments."""

    def __enter__(self) -> InterruptSaver:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._begun[id(args)] = self._begun.get(id(args), 0) + 1

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.interrupted and self._begun[id(args)] == max(self._begun.values()):
            control.should_save = control.should_training_stop = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._previous)


class ProgressReporter(TrainerCallback):
    """Tells a function each step's number, the number of steps, and the latest loss and tokens a second in words."""

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
    """The Trainer's callbacks for TensorBoard, which writes into a folder, and W&B."""
    found: list[TrainerCallback] = []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        found.append(compat.tracking_callback("tensorboard")(SummaryWriter(folder)))
    if "wandb" in names:
        found.append(compat.tracking_callback("wandb")())
    return found


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in a folder."""
    whole = [p.parent for p in Path(folder).glob(f"checkpoint-*/{STATE_FILE}")]
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def training_arguments(folder: str | os.PathLike[str], **settings: Any) -> TrainingArguments:
    """The Trainer's arguments with what is fixed here: AdamW, a log line a step, only the newest checkpoint kept, and
    the best one where that counts."""
    return TrainingArguments(
        output_dir=os.fspath(folder),
        logging_steps=1,
        save_total_limit=2 if settings.get("load_best_model_at_end") else 1,  # of 1, the end leaves the best alone
        restore_callback_states_from_checkpoint=True,
        save_strategy="steps",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        include_num_input_tokens_seen="non_padding",
        use_cpu=not torch.cuda.is_available(),
        logging_nan_inf_filter=False,
        **settings,
    )
