"""A thin Hugging Face Trainer for adapters: computes logits at the answers only, saves only the adapter in checkpoints,
and keeps the last good weights when training stops early (an interrupt, a loss that is NaN or infinite).

Knows nothing about recipes, files or templates. Letters: B rows, T tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from softtune import checkpoint, compat
from softtune.adapter_context import prompts_cached
from softtune.data.collate import answer_width
from softtune.data.encoding import IGNORED
from softtune.errors import AdapterError, DataError, TrainingError
from softtune.formatting import in_words
from softtune.gradients import describe, without_gradient
from softtune.model import PeftModel
from softtune.tasks.metrics import LOSS, METRICS
from softtune.training import ranks
from softtune.training.loss_weight import Batch, loss_divisors, num_rows, with_a_label, without_labels
from softtune.training.sampler import LengthGroupedSampler

EVALUATION_BATCH = 8
"""Rows of a batch of the validation, or the next more that all processes can share."""
STATE_FILE = "trainer_state.json"
"""Written last: a checkpoint without it is incomplete."""


class Objective(Protocol):
    """A loss other than the model's own. N is the number of a batch's labels, V the vocabulary."""

    @property
    def inputs(self) -> Sequence[str]:
        """The tensors of a batch that are for it, and not for the model."""
        ...

    def __call__(self, logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean loss over the labels, from the logits [N, V] that predict them, one row after the other."""
        ...


@compat.trainer_hooks
class AdapterTrainer(Trainer):
    """Trains the active adapter of a ``PeftModel``.

    Args:
        model: the base model with its adapter.
        trunk_cache: megabytes of memory to cache each text's states below the lowest prefix; see
            ``PeftModel.trunk_cache``. 0 by default, as is ``trunk_cache_disk``: every step runs all layers.
        trunk_cache_disk: megabytes of a temporary file beside the checkpoints, for when that memory is full.
        group_by_length: whether rows of similar length share a batch.
        measure: computes further metrics of the adapter at each evaluation, by name; None for the loss alone.
        objective: computes the loss of a language model's batch; None for the model's own.
        kwargs: the Trainer's.

    Raises:
        ConfigError, UnsupportedModelError: from ``train``: no such cache is possible, with this size or with this model
            and adapter.
        TrainingError: from ``train``: the loss or the adapter is NaN or infinite. The adapter is then back at its best
            checkpoint where there is one, or else as it was at the last finite loss.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        trunk_cache: float = 0,
        trunk_cache_disk: float = 0,
        group_by_length: bool = False,
        measure: Callable[[], dict[str, float]] | None = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        self.trunk_cache = (trunk_cache, trunk_cache_disk)
        self.measure = measure
        self.objective: Objective | None = objective
        self.gradients: Callable[[dict[str, Tensor]], Tensor] | None = None
        """Computes a batch's loss and gradients instead of the Trainer; None to let the Trainer do it."""
        with compat.sharded_models_allowed(kwargs["args"]):
            super().__init__(model=model, **kwargs)
        self.is_distributed_loading_by_transformers = False  # what is trained is not sharded
        self.model_accepts_loss_kwargs = False  # the loss is the mean over a batch's answers
        if (
            ranks.world_size() > 1
        ):  # training_step averages the gradients, since a wrapper would also handle the base model
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        for callback in compat.console_callbacks():
            self.remove_callback(callback)
        if group_by_length:
            compat.set_train_sampler(self, self._by_length)
        self._divisors: Iterator[float] = iter(())
        """What the losses of the update's next batches are divided by."""
        self._learns = False
        """Whether the first step has given gradients to the trained parameters."""
        self._last_good: list[Tensor] = []
        """Copies of the trained parameters at the last finite loss."""

    @property
    def history(self) -> list[dict[str, float]]:
        """``step`` and ``loss`` of each step; ``step``, ``validation_loss`` and, where they are measured, the other
        metrics of each validation, such as ``validation_accuracy``; also from before a resume."""
        measured = {f"eval_{name}": f"validation_{name}" for name in METRICS}
        found = []
        for entry in self.state.log_history:
            names = measured if "eval_loss" in entry else {"loss": "loss"}
            if values := {name: entry[key] for key, name in names.items() if key in entry}:
                found.append({"step": entry["step"], **values})
        return found

    @property
    def has_ended(self) -> bool:
        """Whether training is complete: all steps are done, or early stopping has ended it."""
        return 0 < self.state.max_steps <= self.state.global_step or _is_out_of_patience(self.state)

    def train(self, resume_from_checkpoint: str | None = None) -> None:  # type: ignore[override]
        """Train with the trunk cache; only load the best checkpoint if early stopping had ended the resumed run.

        Raises:
            TrainingError: nothing is trained; see also the class.
        """
        assert isinstance(self.model, PeftModel)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise TrainingError("the adapter has nothing to train", "lower num_frozen_tokens, or load it to be trained")
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE_FILE)))
            if _is_out_of_patience(state):
                self.state = state
                self.load_best()
                return
        # training_step raises an error instead of the watch's warning
        with self._frozen_layer_cache(), self.model.gradient_watch.suspended():
            super().train(resume_from_checkpoint=resume_from_checkpoint)
        self._check_numbers()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimiser, in which parts of a combined adapter have learning rates of their own."""
        is_new, optimizer = self.optimizer is None, super().create_optimizer(*args, **kwargs)
        ratios = self._rate_ratios() if is_new else {}
        if {*ratios.values()} - {1.0}:
            optimizer.param_groups = [part for group in optimizer.param_groups for part in _by_rate(group, ratios)]
        return optimizer

    def _rate_ratios(self) -> dict[int, float]:
        """The factors of the learning rates of the active adapter's tensors, by ``id``; none for a baseline."""
        assert isinstance(self.model, PeftModel)
        adapters = map(self.model.adapter, self.model.active_adapters)
        named = [(adapter.config, name, x) for adapter in adapters for name, x in adapter.module.named_parameters()]
        return {id(x): config.learning_rate_ratio(name) for config, name, x in named}

    def _frozen_layer_cache(self) -> AbstractContextManager[Any]:
        if self.gradients is not None or not any(self.trunk_cache):
            return nullcontext()
        assert isinstance(self.model, PeftModel)
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        return self.model.trunk_cache(*self.trunk_cache, folder)

    def _by_length(self, dataset: Any = None) -> LengthGroupedSampler:
        """The sampler of training rows of similar length."""
        examples: Any = self.train_dataset if dataset is None else dataset
        return LengthGroupedSampler(
            [len(example.input_ids) for example in examples],
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Collect the batches of the next update, and weigh their losses by their labels.

        Raises:
            DataError: no process has a label to learn from.
        """
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        assert isinstance(self.model, PeftModel)
        surplus = self._surplus(batches[-1]) if batches else 0
        batches = [*batches[:-1], *(without_labels(batch, surplus) for batch in batches[-1:])]
        divisors = loss_divisors(batches, shifts_labels=self.model.backbone.continues_text, surplus=surplus)
        if any(map(math.isnan, divisors)):
            raise self._no_label()
        self._divisors = iter(divisors)
        return [with_a_label(batch) for batch in batches] if ranks.world_size() > 1 else batches, num_items

    def _no_label(self) -> DataError:
        return DataError(f"no label in the batch of step {self.state.global_step + 1}", "drop rows without an answer")

    def _surplus(self, batch: Batch) -> int:
        """The rows at the end of this process's part of a batch that the last batch of the data set lacks.

        accelerate fills that batch up with rows from the beginning, for parts of equal size.
        """
        if ranks.world_size() == 1:
            return 0
        own = num_rows(batch)
        last = self._rows_of(own * ranks.world_size())
        return min(max((ranks.rank() + 1) * own - last, 0), own)

    def _rows_of(self, full: int) -> int:
        """The rows of the current batch over all processes, where a batch that is not the last has ``full``."""
        state = self.accelerator.gradient_state
        return (len(state.active_dataloader.dataset) % full if state.end_of_dataloader else 0) or full

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss, from the logits at the rows' ends alone where that is enough for the answers."""
        assert isinstance(self.model, PeftModel)
        inputs = {**inputs, **kept_logits(self.model, inputs)}
        if self.objective is not None:
            own = {name: inputs.pop(name) for name in self.objective.inputs}
            outputs = model(**inputs)
            loss = self.objective(self._predicting(outputs.logits, inputs["labels"]), own)
            return (loss, outputs) if return_outputs else loss
        if self.label_smoother is None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)  # with the labels, by which virtual tokens and decoder inputs are placed
        logits, labels, shifts = outputs.logits, inputs["labels"], self.model.backbone.continues_text
        kept = labels[:, -logits.shape[1] :] if shifts else labels
        loss = self.label_smoother({"logits": logits.float()}, kept, shift_labels=shifts)
        return (loss, outputs) if return_outputs else loss

    def _predicting(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits [N, V] that predict the labels [B, T], of those at the rows' ends."""
        assert isinstance(self.model, PeftModel)
        kept = labels[:, -logits.shape[1] :]
        if self.model.backbone.continues_text:
            logits, kept = logits[:, :-1], kept[:, 1:]
        return logits[kept != IGNORED]

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss and gradients of one batch.

        Raises:
            DataError: the batch has no label to learn from.
            TrainingError: the loss is NaN or infinite, or trained parameters got no gradient in the first step.
        """
        if isinstance(labels := inputs.get("labels"), Tensor) and bool((labels == IGNORED).all()):
            raise self._no_label()
        # The Trainer divides the loss by this number of batches, as if all had as many labels.
        self.current_gradient_accumulation_steps: Any = next(self._divisors, 1)
        if self.gradients is None:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        else:
            loss = self.gradients(compat.prepared_inputs(self, inputs))
        if ranks.world_size() > 1:
            loss = ranks.all_reduce(loss.clone()) / ranks.world_size()
            if self.accelerator.sync_gradients:
                assert isinstance(self.model, PeftModel)
                ranks.average_gradients([p for p in self.model.parameters() if p.requires_grad])
        if not torch.isfinite(loss):
            raise self._blown_up(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        if not self._learns:
            self._check_gradients()
        self._keep()
        return loss

    def _check_gradients(self) -> None:
        """Check after the first step that the trained parameters have gradients.

        Raises:
            TrainingError: some have none, or zeros only.
        """
        assert isinstance(self.model, PeftModel)
        for adapter in map(self.model.adapter, self.model.active_adapters):
            gradients = {name: parameter.grad for name, parameter in adapter.trained.items()}
            if idle := adapter.cut_off(without_gradient(gradients)):
                raise TrainingError(describe(idle, len(gradients)))
        self._learns = True

    def _keep(self) -> None:
        """Copy the trained parameters, before the update of the step, as the last good ones."""
        self._last_good = self._last_good or [torch.empty_like(p) for p in self._trained()]
        for kept, parameter in zip(self._last_good, self._trained(), strict=True):
            kept.copy_(parameter.detach())

    def _check_numbers(self) -> None:
        """Check that the trained parameters, and the prompt computed from them, are finite.

        Raises:
            TrainingError: one of them is NaN or infinite.
        """
        assert isinstance(self.model, PeftModel)
        prompts = [self.model.adapter(name).inference_state() for name in self.model.active_adapters]
        made = [x for prompt in prompts for x in prompt.values()]
        if not all(torch.isfinite(x).all() for x in (*self._trained(), *made)):
            raise self._blown_up(f"the adapter is no longer made of numbers after step {self.state.global_step}")

    def _blown_up(self, what: str) -> TrainingError:
        """Restore the weights of the best checkpoint, or else of the last finite loss, and return an error that says
        which."""
        when = "the last finite loss"
        if self.state.best_model_checkpoint is not None:
            metric = self.args.metric_for_best_model or LOSS
            when = f"its {'lowest' if metric == LOSS else 'best'} validation {in_words(metric)}"
            self.load_best()
        elif self._last_good:
            for kept, parameter in zip(self._last_good, self._trained(), strict=True):
                parameter.data.copy_(kept)
        return TrainingError(f"{what}", f"lower the learning rate; the adapter is kept as it was at {when}")

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Compute the loss of a validation batch, over the labels of all processes."""
        if ranks.world_size() == 1:
            found: tuple[Any, ...] = super().prediction_step(model, inputs, *args, **kwargs)
            return found
        assert isinstance(self.model, PeftModel)
        surplus, shifts = self._surplus(inputs), self.model.backbone.continues_text
        rows = without_labels(inputs, surplus)
        [divisor] = loss_divisors([rows], shifts_labels=shifts, surplus=surplus)
        loss, *others = super().prediction_step(model, dict(with_a_label(rows)), *args, **kwargs)
        assert loss is not None
        return (ranks.all_reduce(loss / divisor) / ranks.world_size(), *others)

    def _once_a_row(self, losses: Tensor) -> Tensor:
        """The losses of a validation batch, once for each of its rows; they are the same in all processes."""
        return losses[: self._rows_of(len(losses))]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's evaluation loop with the prompt computed once, and measure the further metrics.

        Raises:
            TrainingError: the adapter's outputs contain NaN.
        """
        if ranks.world_size() > 1:
            self.gather_function = self._once_a_row  # until the loop ends
        with prompts_cached():
            output = super().evaluation_loop(*args, **kwargs)
            try:
                found = {} if self.measure is None else self.measure()
            except AdapterError as error:
                raise self._blown_up(error.what) from error
        assert output.metrics is not None
        output.metrics.update({f"eval_{name}": value for name, value in found.items()})
        return output

    def _trained(self) -> list[nn.Parameter]:
        """The adapters' trained parameters, without those of a base model that is trained itself."""
        assert isinstance(self.model, PeftModel)
        adapters = [self.model.adapter(name) for name in self.model.active_adapters]
        return [parameter for adapter in adapters for parameter in adapter.trained.values()]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the adapter, for which all processes must read a sharded base model."""
        self.save_adapter(output_dir)

    def save_adapter(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter alone, from whose folder training can resume.

        Raises:
            TrainingError: the adapter is NaN or infinite.
        """
        self._check_numbers()
        assert isinstance(self.model, PeftModel)
        name = self.model.active_adapter
        checkpoint.save(
            output_dir or str(self.args.output_dir),
            self.model.adapter(name),
            self.model.backbone,
            is_main_process=ranks.is_main_process(),
        )

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
    """How many logits at the rows' ends the loss of a batch needs, as the argument ``logits_to_keep`` of ``forward``;
    empty where it needs all."""
    labels, text = batch.get("labels"), batch.get("input_ids")
    if not model.keeps_logits or labels is None or text is None or labels.shape != text.shape:
        return {}
    return {"logits_to_keep": answer_width(labels)}


def checkpoints_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints in a folder, the newest last."""
    whole = [path.parent for path in Path(folder).glob(f"checkpoint-*/{STATE_FILE}")]
    return sorted(whole, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def training_arguments(
    folder: str | os.PathLike[str],
    device: torch.device | None = None,
    *,
    eval_steps: int | None = None,
    save_total_limit: int = 1,
    **settings: Any,
) -> TrainingArguments:
    """Build the Trainer's arguments from settings and fixed values.

    Every step is logged.

    Args:
        folder: the folder of checkpoints.
        device: where the base model computes; by default a GPU if there is one.
        eval_steps: steps between evaluations, which need not divide ``save_steps`` with an ``EvaluationSaver``.
        save_total_limit: newest checkpoints to keep, and the best one beside them if it is loaded at the end.
        settings: further arguments.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = compat.training_arguments_on(
        device,
        output_dir=os.fspath(folder),
        logging_steps=1,
        save_total_limit=save_total_limit + bool(settings.get("load_best_model_at_end")),  # the best is one of them
        restore_callback_states_from_checkpoint=True,
        save_strategy="steps",
        report_to="none",
        accelerator_config={"split_batches": ranks.world_size() > 1},  # a batch is shared by all processes
        per_device_eval_batch_size=-(-EVALUATION_BATCH // ranks.world_size()) * ranks.world_size(),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        include_num_input_tokens_seen="non_padding",
        logging_nan_inf_filter=False,
        **settings,
    )
    if eval_steps is not None:
        arguments.eval_steps = eval_steps
    return arguments


def _by_rate(group: dict[str, Any], ratios: Mapping[int, float]) -> list[dict[str, Any]]:
    """Split an optimiser's group by the factors of its parameters' learning rates; by ``id``, 1 where there is none."""
    by_ratio: dict[float, list[Tensor]] = {}
    for parameter in group["params"]:
        by_ratio.setdefault(ratios.get(id(parameter), 1.0), []).append(parameter)
    return [{**group, "params": params, "lr": group["lr"] * ratio} for ratio, params in by_ratio.items()]
