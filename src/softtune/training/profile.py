"""Where a training step's time goes, beside the two limits that nobody passes: its matrix products alone, in their own
shapes, and reading the frozen weights from memory. All of it is measured on the spot.
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
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
KINDS = {
    "the loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "copies": ("copy", "cat", "index", "gather", "stack", "clone", "contiguous", "fill", "zero"),
}
"""What the names of operations contain, by the kind that these count as."""
COPIED = 256 * 2**20
"""Bytes of the tensor whose copy shows the memory's bandwidth."""
WARM_UP = 2
"""Steps before the first that is measured: the trunk cache has then met the batch."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Medians over five steps on one batch as the recipe trains them, in seconds."""

    tokens: int
    """Of the batch, without padding and virtual tokens."""
    seconds: float
    """Of a step: forward, backward, clipping, the optimiser."""
    shares: dict[str, float]
    """Of that time by the kind of operation; "between operations" is the interpreter's."""
    products: float
    """The step's matrix products alone, with their own arguments."""
    weights: float
    """Reading the frozen weights twice, once for each direction; those of layers too that a trunk cache leaves out."""


def profile(trainer: AdapterTrainer) -> Profile:
    """Measure steps of a Trainer's own loop on its first rows. They train the adapter, and write nothing."""
    data: Any = trainer.train_dataset
    trainer.train_dataset = [data[i] for i in range(min(trainer.args.train_batch_size, len(data)))]
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
    """Train for as many steps as there are contexts, each step in its own."""
    trainer.args.max_steps, trainer.args.save_strategy = len(contexts), "no"
    with ExitStack() as stack:
        trainer.add_callback(_EachIn(contexts, stack))
        trainer.train()


class _EachIn(TrainerCallback):
    """Enters a context at the beginning of each step, and leaves it at its end."""

    def __init__(self, contexts: Sequence[AbstractContextManager[Any]], stack: ExitStack) -> None:
        self._contexts, self._stack = contexts, stack

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stack.enter_context(self._contexts[state.global_step])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stack.close()


class _Timer:
    """Notes how long each of its blocks takes."""

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
    """Keeps every matrix product that runs in its block, with its arguments, to run them again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.removeprefix("aten::") in PRODUCTS:
            self._products.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def replay(self) -> None:
        """Run the products again, and nothing else."""
        with torch.no_grad():
            for function, args, kwargs in self._products:
                function(*args, **kwargs)


def _shares(profilers: Sequence[Profiler], seconds: float, *, on_device: bool) -> dict[str, float]:
    """By kind, of the seconds that a step takes when nobody looks on; one profiler for each step."""
    found: dict[str, float] = defaultdict(float)
    for operation in chain.from_iterable(profiler.key_averages() for profiler in profilers):
        if operation.key.startswith("aten::"):
            microseconds = operation.self_device_time_total if on_device else operation.self_cpu_time_total
            found[_kind(operation.key.removeprefix("aten::"))] += microseconds / 1e6 / len(profilers) / seconds
    return {**found, "between operations": max(0.0, 1.0 - sum(found.values()))}


def _kind(name: str) -> str:
    if name in PRODUCTS:
        return "matrix products"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "everything else")


def _bandwidth(device: torch.device) -> float:
    """Bytes a second that are read and written."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / _median(lambda: target.copy_(source), device)


def _median(run: Callable[[], Any], device: torch.device) -> float:
    timer = _Timer(device)
    for _ in range(ROUNDS):
        with timer:
            run()
    return statistics.median(timer.seconds)
