"""Profiles a training step, and compares it with two limits of the hardware: its matrix products alone, in their own
shapes, and reading the frozen weights from memory. All of them are measured on the machine that trains.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.profiler import profile as Profiler
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainerControl, TrainerState

from softtune.training.trainer import AdapterTrainer

ROUNDS = 5
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "baddbmm_", "_linear_pointwise")
KINDS = {
    "the loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "copies": ("copy", "cat", "index", "gather", "stack", "clone", "contiguous", "fill", "zero"),
}
"""Kinds of operations, by parts of their names; the first kind that matches counts."""
COPIED = 256 * 2**20
"""Bytes of the tensor that is copied to measure the memory's bandwidth."""
WARM_UP = 2
"""Steps before the first that is measured, after which the trunk cache holds the batch."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Times of a training step on the same rows, in seconds: medians over five rounds."""

    tokens: int
    """Tokens of the rows, without padding and virtual tokens."""
    seconds: float
    """Time of a step: forward and backward of each of its batches, clipping, the optimiser."""
    shares: dict[str, float]
    """Shares of that time by the kind of operation; "between operations" is the Python interpreter's."""
    products: float
    """Time of the step's matrix products alone, with their own arguments."""
    weights: float
    """Time of reading all frozen weights twice, for forward and backward, even of layers that a trunk cache skips."""


def profile(trainer: AdapterTrainer) -> Profile:
    """Profile steps of a Trainer's own loop on its first rows. They change the adapter and write no checkpoint."""
    data: Any = trainer.train_dataset
    rows = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    trainer.train_dataset = [data[i] for i in range(min(rows, len(data)))]
    timer, recorder = _Timer(trainer.args.device), ProductRecorder()
    profilers = [Profiler() for _ in range(ROUNDS)]
    _run_steps(trainer, [*[nullcontext()] * WARM_UP, *[timer] * ROUNDS, recorder, *profilers])
    assert trainer.model is not None
    frozen = sum(p.nbytes for p in trainer.model.parameters() if not p.requires_grad)
    seconds = statistics.median(timer.seconds)
    return Profile(
        tokens=int(trainer.data_collator(trainer.train_dataset)["attention_mask"].sum()),
        seconds=seconds,
        shares=_shares(profilers, seconds, on_device=trainer.args.device.type != "cpu"),
        products=_median(recorder.replay, trainer.args.device),
        weights=2 * frozen / _bandwidth(trainer.args.device),
    )


def _run_steps(trainer: AdapterTrainer, contexts: Sequence[AbstractContextManager[Any]]) -> None:
    """Train for as many steps as there are contexts, each step within its own."""
    trainer.args.max_steps, trainer.args.save_strategy = len(contexts), "no"
    with ExitStack() as stack:
        trainer.add_callback(_StepContexts(contexts, stack))
        trainer.train()


class _StepContexts(TrainerCallback):
    """Enters a context at the beginning of each step, and leaves it at its end."""

    def __init__(self, contexts: Sequence[AbstractContextManager[Any]], stack: ExitStack) -> None:
        self._contexts, self._stack = contexts, stack

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stack.enter_context(self._contexts[state.global_step])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stack.close()


class _Timer:
    """Context manager that records the duration of each of its blocks."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device = device

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._start)


class ProductRecorder(TorchDispatchMode):
    """Records every matrix product that runs in its block, with its arguments, to replay it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.rpartition("::")[2] in PRODUCTS:
            self._products.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def replay(self) -> None:
        """Run the recorded products again, and nothing else."""
        with torch.no_grad():
            for function, args, kwargs in self._products:
                function(*args, **kwargs)


def _shares(profilers: Sequence[Profiler], seconds: float, *, on_device: bool) -> dict[str, float]:
    """Shares of a step's time by kind of operation: ``seconds`` is that of a step without a profiler, and each of
    ``profilers`` has recorded one step."""
    shares: dict[str, float] = defaultdict(float)
    for operation in chain.from_iterable(profiler.key_averages() for profiler in profilers):
        if operation.key.startswith("aten::"):
            microseconds = operation.self_device_time_total if on_device else operation.self_cpu_time_total
            shares[_kind(operation.key.removeprefix("aten::"))] += microseconds / 1e6 / len(profilers) / seconds
    return {**shares, "between operations": max(0.0, 1.0 - sum(shares.values()))}


def _kind(name: str) -> str:
    if name in PRODUCTS:
        return "matrix products"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "everything else")


def _bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / _median(lambda: target.copy_(source), device)


def _median(run: Callable[[], Any], device: torch.device) -> float:
    timer = _Timer(device)
    for _ in range(ROUNDS):
        with timer:
            run()
    return statistics.median(timer.seconds)
