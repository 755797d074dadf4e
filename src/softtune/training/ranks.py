"""The processes of a run that torchrun or accelerate started, each of which computes a part of every batch.

One process is the usual case, in which everything here does nothing. Knows nothing about recipes and models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from softtune.errors import DataError, SofttuneError
from softtune.formatting import in_one_line
from softtune.load_options import num_processes

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""After which a process that does not answer counts as hung; others may evaluate or upload for long."""


def start(device: torch.device) -> None:
    """Join the other processes, if there are any.

    Args:
        device: where this process computes; decides how the processes communicate.
    """
    if num_processes() > 1:
        PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def part(rows: int) -> range:
    """The indices of this process's part of some rows: neighbours, as many as in other parts or one more or less."""
    return range(rows * rank() // world_size(), rows * (rank() + 1) // world_size())


def is_main_process() -> bool:
    """Whether this process is the one that writes files and reports, which is the first."""
    return rank() == 0


def all_gather(own: T) -> list[T]:
    """What every process has, in the order of the processes."""
    every: list[Any] = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(every, own)
    return every


def check_same(fingerprints: Sequence[Mapping[str, str]]) -> None:
    """Check that all processes have the same data.

    Args:
        fingerprints: hashes of the data of each recipe, by the name of the data.

    Raises:
        DataError: they have not.
    """
    for number, others in enumerate(all_gather(fingerprints)):
        for own, other in zip(fingerprints, others, strict=True):
            if differing := [name for name in own if own[name] != other.get(name)]:
                raise DataError(
                    f"process {number} has other {differing[0]} data than process {rank()}",
                    "give every machine the same files",
                )


def on_main_process(work: Callable[[], T]) -> T:
    """Let the main process alone do a piece of work, and return its result in all.

    Raises:
        SofttuneError: the work raised it; in all processes.
    """
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = work()
        except SofttuneError as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    result, raised = outcome
    if raised is not None:
        raise raised
    found: T = result
    return found


def wait_for_everyone() -> None:
    """Wait until all processes have come here."""
    if world_size() > 1:
        PartialState().wait_for_everyone()


def any_of(flag: bool) -> bool:
    """Whether a flag is set in any process."""
    return flag if world_size() == 1 else bool(all_reduce(torch.tensor(float(flag))))


def all_reduce(number: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() == 1:
        return number
    moved = number.to(PartialState().device, copy=True)
    dist.all_reduce(moved)
    return moved.to(number.device)


@contextmanager
def joined() -> Iterator[None]:
    """Leave the other processes at the end of the block, if it joins them."""
    try:
        yield
    finally:
        if world_size() > 1:
            dist.destroy_process_group()


@contextmanager
def needing_all() -> Iterator[None]:
    """Tell in the block where another process has ended.

    Raises:
        SofttuneError: it has.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or any(name in str(error) for name in ("by peer", "gloo"))
        if world_size() == 1 or not is_lost:
            raise
        raise SofttuneError(
            f"another process of this run has ended ({in_one_line(error)})",
            "see what it says, and go on with --resume",
        ) from error


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = all_reduce(torch.cat([gradient.flatten().float() for gradient in gradients])) / world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
