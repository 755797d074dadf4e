"""Trains several adapters at once over one frozen base model: a step is one forward and backward for all of them.

Every run is a Trainer's own loop, with its own optimiser, schedule, order of rows, random state and checkpoints. Where
it would compute gradients, it hands over its batch and waits for its loss until all others have done the same. Each run
is a greenlet, so that no two run concurrently. A row uses the adapter of the run that it comes from, and gives
gradients to no other.

Letters: B rows of a run's batch, T tokens, P virtual tokens, V words or classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from accelerate.state import GradientState
from greenlet import getcurrent, greenlet
from torch import Tensor
from torch.nn import functional as F
from transformers import set_seed

from softtune import compat
from softtune.data.encoding import IGNORED
from softtune.errors import ConfigError, DataError, TrainingError
from softtune.model import PeftModel
from softtune.peft_types import TaskType
from softtune.training.trainer import AdapterTrainer, kept_logits

Batch = Mapping[str, Tensor]

TASKS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, TaskType.SEQ_CLS, TaskType.TOKEN_CLS)
"""Tasks whose loss is a mean over labels, with one label for each text or token."""


def train_together(
    trainers: Sequence[AdapterTrainer], checkpoints: Sequence[str | None] | None = None
) -> list[TrainingError | None]:
    """Train several adapters over one base model at once, each as its ``trainer.train()`` alone would train it.

    Only dropout draws other random numbers than it would alone. A run whose loss or adapter becomes NaN or infinite
    ends without affecting the others, and one with fewer steps ends before them. Any other error ends all runs, each
    with a checkpoint of its last step.

    Args:
        trainers: one per run. Their models share the base model and its task. Batches, steps, seeds, settings of the
            optimiser, methods and data may differ.
        checkpoints: the folder that each run resumes from, or None where it begins.

    Returns:
        For each run the error that ended it, or None.

    Raises:
        ConfigError: the runs do not share a base model, a task or a precision, one has a loss other than the task's, or
            they run in several processes or on several devices.
    """
    _check(trainers)
    starts = checkpoints if checkpoints is not None else [None] * len(trainers)
    runs = [_Run(f"run-{i}", *each) for i, each in enumerate(zip(trainers, starts, strict=True))]
    model = PeftModel.from_adapters(runs[0].model.get_base_model(), {run.name: run.adapter for run in runs})
    model.gradient_watch.is_over = True  # each Trainer checks its own gradients
    with ExitStack() as stack:
        memory, disk = (sum(sizes) for sizes in zip(*(t.trunk_cache for t in trainers), strict=True))
        if memory or disk:
            stack.enter_context(model.trunk_cache(memory, disk, trainers[0].args.output_dir))
        try:
            _train(model, runs)
        except Exception:
            for run in runs:
                run.save()
            raise
    return [run.error for run in runs]


def _train(model: PeftModel, runs: Sequence[_Run]) -> None:
    waiting = [run for run in runs if run.begin()]
    while waiting:
        losses = _step(model, waiting)
        waiting = [run for run, loss in zip(waiting, losses, strict=True) if run.go_on(loss)]


class _Run:
    """A Trainer's loop, which pauses wherever it needs gradients."""

    def __init__(self, name: str, trainer: AdapterTrainer, start: str | None) -> None:
        assert isinstance(trainer.model, PeftModel)
        self.name = name
        self.trainer = trainer
        self.model = trainer.model
        self.adapter = self.model.adapter(self.model.active_adapter)
        self.batch: Batch = {}
        self.error: TrainingError | None = None
        self._start = start
        self._driver = getcurrent()
        self._loop = greenlet(self._train)
        self._random = torch.get_rng_state()
        self._accumulation = dict(vars(GradientState()))

    @property
    def rows(self) -> int:
        return len(self.batch["labels"])

    def begin(self) -> bool:
        """Run until the first batch; return False if there is none."""
        return self._run(None)

    def go_on(self, loss: Tensor) -> bool:
        """Continue with the loss of its batch until the next one, after the backward; return False if there is none."""
        return self._run(loss)

    def save(self) -> None:
        """Write a checkpoint of the last step, if the run has taken one and has not ended."""
        if self._loop and self.trainer.state.global_step > 0:
            with self.own_state(), suppress(TrainingError, OSError):
                compat.save_checkpoint(self.trainer)

    def _run(self, loss: Tensor | None) -> bool:
        with self.own_state():
            self._loop.switch(loss)
        return not self._loop.dead

    @contextmanager
    def own_state(self) -> Iterator[None]:
        """Swap in the run's random state and its gradient accumulation state for the length of the block."""
        shared = vars(GradientState())  # accelerate has one for all Trainers of a process
        others = dict(shared)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            shared.update(self._accumulation)
            try:
                yield
            finally:
                self._random, self._accumulation = torch.get_rng_state(), dict(shared)
                shared.update(others)

    def _train(self, _: None) -> None:
        set_seed(self.trainer.args.seed)
        self.trainer.gradients = self._wait
        try:
            self.trainer.train(resume_from_checkpoint=self._start)
        except TrainingError as error:
            self.error = error
        finally:
            self.trainer.gradients = None

    def _wait(self, batch: Batch) -> Tensor:
        text = batch.get("input_ids", batch.get("inputs_embeds"))
        assert text is not None
        self.batch = {"attention_mask": torch.ones(text.shape[:2], dtype=torch.long, device=text.device), **batch}
        loss: Tensor = self._driver.switch()
        return loss


def _check(trainers: Sequence[AdapterTrainer]) -> None:
    models: list[Any] = [trainer.model for trainer in trainers]
    if any(model.get_base_model() is not models[0].get_base_model() for model in models):
        raise ConfigError("runs that train together need the same base model", "load it once, and wrap it for each")
    tasks = {model.active_peft_config.task_type for model in models}
    if len(tasks) > 1 or not tasks <= {*TASKS}:
        raise ConfigError(f"runs that train together need one task of {', '.join(TASKS)}", "train them apart")
    has_own_loss = any(model.active_peft_config.has_own_loss for model in models)
    for trainer in trainers:
        if trainer.args.world_size > 1 or trainer.args.n_gpu > 1:
            raise ConfigError("runs train together in one process on one device", "train them apart on several")
        if trainer.accelerator.scaler is not None or trainer.args.bf16 != trainers[0].args.bf16:
            raise ConfigError("runs that train together need the same precision, bf16 or none", "set it in all")
        if trainer.compute_loss_func is not None or trainer.objective is not None or has_own_loss:
            raise ConfigError("runs that train together need the task's own loss", "train those with another one apart")


def _step(model: PeftModel, runs: Sequence[_Run]) -> list[Tensor]:
    """Compute each run's loss, and add its gradients to its adapter's parameters."""
    losses: dict[_Run, Tensor] = {}
    for group in _alike(runs):
        with group[0].own_state():  # dropout draws from the first run's random state, which its checkpoints save
            group_losses = _losses(model, group)
            torch.stack(group_losses).sum().backward()
        losses |= dict(zip(group, (loss.detach() for loss in group_losses), strict=True))
    return [losses[run] for run in runs]


def _alike(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Group runs whose batches can be joined: with the same inputs, and as many places for virtual tokens."""
    groups: dict[Any, list[_Run]] = {}
    for run in runs:
        places = run.batch.get("prompt_positions")
        groups.setdefault((*sorted(run.batch), None if places is None else places.shape[1]), []).append(run)
    return list(groups.values())


def _losses(model: PeftModel, runs: Sequence[_Run]) -> list[Tensor]:
    """Each run's mean loss over its batch's labels, weighed by their share of its update's labels."""
    batch = _joined([run.batch for run in runs], model)
    names = [run.name for run in runs for _ in range(run.rows)]
    with runs[0].trainer.accelerator.autocast():
        logits = model.train()(**batch, **kept_logits(model, batch), adapter_names=names).logits
    labels = batch["labels"]
    if model.backbone.continues_text:
        logits, labels = logits[:, :-1], labels[:, -logits.shape[1] :][:, 1:]
    sizes = [run.rows for run in runs]
    parts = zip(runs, logits.split(sizes), labels.split(sizes), strict=True)
    return [_loss(run.trainer, *part) for run, *part in parts]


def _loss(trainer: AdapterTrainer, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss over a batch's labels, weighed by their share of the update's; see ``_mean_loss``."""
    loss = _mean_loss(logits, labels, smoothing=trainer.args.label_smoothing_factor)
    weighed: Tensor = loss / trainer.current_gradient_accumulation_steps
    return weighed


def _mean_loss(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Mean cross-entropy over logits [B, T, V] and labels [B, T], or [B, V] and [B] or [B, 1].

    Raises:
        DataError: there is not one class id for each label.
    """
    labels = labels.reshape(-1) if logits.dim() == 2 else labels
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise DataError("runs that train together need one class for each label", "train them apart")
    is_label = labels != IGNORED
    return F.cross_entropy(logits[is_label].float(), labels[is_label], label_smoothing=smoothing)


def _joined(batches: Sequence[Batch], model: PeftModel) -> dict[str, Tensor]:
    """Join the rows of all batches, padded on the left to one width. An encoder-decoder's labels and decoder inputs are
    padded on the right."""
    text = "input_ids" if "input_ids" in batches[0] else "inputs_embeds"
    widths = [batch[text].shape[1] for batch in batches]
    apart = {"labels", "decoder_input_ids", "decoder_attention_mask"} if model.backbone.is_encoder_decoder else set()
    joined: dict[str, Tensor] = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        if name == "prompt_positions":
            parts = [part + max(widths) - width for part, width in zip(parts, widths, strict=True)]
        elif parts[0].dim() > 1:
            parts = _padded(parts, IGNORED if name == "labels" else 0, left=name not in apart)
        joined[name] = torch.cat(parts)
    return joined


def _padded(parts: Sequence[Tensor], fill: int, *, left: bool) -> list[Tensor]:
    """Pad tensors [B, T, ...] to one T."""
    width = max(part.shape[1] for part in parts)
    missing = [width - part.shape[1] for part in parts]
    sides = [(n, 0) if left else (0, n) for n in missing]
    return [F.pad(x, (0, 0) * (x.dim() - 2) + side, value=fill) for x, side in zip(parts, sides, strict=True)]
