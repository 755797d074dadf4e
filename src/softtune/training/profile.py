"""Where a training step's time goes, beside the two limits that nobody passes: its matrix products alone, in their own
shapes, and reading the frozen weights from memory. All of it is measured on the spot.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import profile as operations_of
from torch.utils._python_dispatch import TorchDispatchMode

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

Step = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Medians over five steps on one batch, in seconds."""

    tokens: int
    """Of the batch, without padding and virtual tokens."""
    seconds: float
    """Of a step: forward, backward, clipping, the optimiser."""
    shares: dict[str, float]
    """Of that time by the kind of operation; "between operations" is the interpreter's."""
    products: float
    """The step's matrix products alone, with their own arguments."""
    weights: float
    """Reading the frozen weights twice, once for each direction."""


def profile(trainer: AdapterTrainer) -> Profile:
    """Measure steps of a Trainer on its first batch. They train the adapter, and write nothing."""
    inputs = next(iter(trainer.get_train_dataloader()))
    step = _step(trainer, inputs)
    step()
    seconds = _median(step)
    recorder = ProductRecorder()
    with recorder:
        step()
    assert trainer.model is not None
    frozen = sum(p.nbytes for p in trainer.model.parameters() if not p.requires_grad)
    return Profile(
        tokens=int(inputs["attention_mask"].sum()),
        seconds=seconds,
        shares=_shares(step, seconds, on_device=trainer.args.device.type != "cpu"),
        products=_median(recorder.replay),
        weights=2 * frozen / _bandwidth(trainer.args.device),
    )


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


def _step(trainer: AdapterTrainer, inputs: dict[str, Any]) -> Step:
    """A step as the Trainer's loop takes it."""
    trainer.create_optimizer_and_scheduler(num_training_steps=2 * ROUNDS + 3)
    trainer.current_gradient_accumulation_steps = 1  # as its loop sets it
    model, optimizer = trainer.model, trainer.optimizer
    assert model is not None
    assert optimizer is not None
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        trainer.training_step(model, inputs)
        torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()

    return step


def _shares(step: Step, seconds: float, *, on_device: bool) -> dict[str, float]:
    """By kind, of the seconds that a step takes when nobody looks on."""
    with operations_of() as observed:
        for _ in range(ROUNDS):
            step()
    found: dict[str, float] = defaultdict(float)
    for operation in observed.key_averages():
        if operation.key.startswith("aten::"):
            microseconds = operation.self_device_time_total if on_device else operation.self_cpu_time_total
            found[_kind(operation.key.removeprefix("aten::"))] += microseconds / 1e6 / ROUNDS / seconds
    return {**found, "between operations": max(0.0, 1.0 - sum(found.values()))}


def _kind(name: str) -> str:
    if name in PRODUCTS:
        return "matrix products"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "everything else")


def _bandwidth(device: torch.device) -> float:
    """Bytes a second that are read and written."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / _median(lambda: target.copy_(source))


def _median(run: Step) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
