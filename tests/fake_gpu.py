"""A device that stands in for a GPU on any machine, and counts what would keep a GPU waiting.

Its tensors are CPU tensors in a wrapper. As on a GPU, they do not mix with the CPU's own, and what needs their numbers
on the host waits for the device. It registers PyTorch's private device for the whole process, so that it is for
processes of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fakegpu"
SYNC, TO_DEVICE, TO_HOST = "sync", "to the device", "to the host"
aten = torch.ops.aten

_SYNCING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
"""Operations whose result, or its size, the host waits for."""
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_COPYING = {aten._to_copy.default, aten.copy_.default}
_FREE = {*_INDEXING, *_COPYING}
"""Operations that take tensors of the CPU beside those of the device."""


class _Module(_DummyBackendModule):
    """What PyTorch asks of a device's module."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install() -> torch.device:
    """Register the device."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) shows the copy
    return torch.device(NAME, 0)


class OnDevice(Tensor):
    """A tensor of the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        wrapper: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        wrapper.inner = inner
        return wrapper

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = OnDevice(self.inner.clone())
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Runs the device's operations, and notes its waits and copies."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[str, str]] | None = None
        """What was counted, and the line of softtune or transformers that asked for it; None where nothing is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.places is not None and (kind := kind_of(func, args, kwargs)) is not None:
            self.places.append((kind, _caller()))
        return run(func, args, kwargs)

    @contextmanager
    def counting(self) -> Iterator[list[tuple[str, str]]]:
        """Count the waits and copies of the block: each one's kind, and the line that asked for it."""
        self.places = places = []
        try:
            yield places
        finally:
            self.places = None


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the wrapped tensors; its results are the device's where it ran there."""
    wrappers = [x for x in _leaves((args, kwargs)) if isinstance(x, OnDevice)]
    target = kwargs.get("device")
    on_device = bool(wrappers) if target is None else torch.device(target).type == NAME
    _check_devices(func, args, kwargs, bool(wrappers))
    inner_args, inner_kwargs = _mapped(_unwrapped, (args, kwargs))
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
        if func is aten._to_copy.default and on_device != bool(wrappers):
            inner_kwargs["dtype"] = inner_kwargs.get("dtype") or inner_args[0].dtype
    result = func(*inner_args, **inner_kwargs)
    same = {id(wrapper.inner): wrapper for wrapper in wrappers}
    if func is aten.copy_.default:
        on_device = isinstance(args[0], OnDevice)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or not on_device:
            return x
        return same.get(id(x)) if id(x) in same else OnDevice(x)

    return _mapped(wrapped, result)


def kind_of(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """What an operation costs: a wait, a copy, or nothing (None)."""
    flat = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_device = [x for x in flat if isinstance(x, OnDevice)]
    if func in _COPYING:
        source = args[1] if func is aten.copy_.default else args[0]
        if not source.numel():  # transformers begins caches with empty tensors
            return None
        target = _is_on_device(args[0]) if func is aten.copy_.default else _goes_to_device(args[0], kwargs)
        if target == _is_on_device(source):
            return None
        return TO_DEVICE if target else TO_HOST
    if not on_device:
        return None
    if func is aten.repeat_interleave.Tensor:
        return SYNC if kwargs.get("output_size") is None else None
    if func in _INDEXING and _is_on_device(args[0]):
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return SYNC
        return TO_DEVICE if any(not _is_on_device(x) for x in indices) else None
    return SYNC if func in _SYNCING else None


def _is_on_device(x: Any) -> bool:
    return isinstance(x, OnDevice)


def _goes_to_device(x: Tensor, kwargs: dict[str, Any]) -> bool:
    target = kwargs.get("device")
    return _is_on_device(x) if target is None else torch.device(target).type == NAME


def _check_devices(func: Any, args: Any, kwargs: dict[str, Any], is_on_device: bool) -> None:
    flat = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
    others = [x for x in flat if not isinstance(x, OnDevice) and x.dim()]
    if is_on_device and others and func not in _FREE:
        shapes = [list(x.shape) for x in others]
        raise RuntimeError(f"{func}: tensors {shapes} are on the CPU, others on the device")


def _unwrapped(x: Any) -> Any:
    if isinstance(x, OnDevice):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _caller() -> str:
    """The innermost line of softtune or transformers on the stack."""
    frame = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if "softtune/" in file or "/transformers/" in file:
            return f"{file.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _leaves(x: Any) -> Iterator[Any]:
    """What stands in nested tuples, lists and dicts; PyTorch's own functions for it are slow."""
    if isinstance(x, (tuple, list)):
        for part in x:
            yield from _leaves(part)
    elif isinstance(x, dict):
        yield from _leaves(list(x.values()))
    else:
        yield x


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """The same with each leaf changed."""
    if isinstance(x, (tuple, list)):
        return type(x)([_mapped(change, part) for part in x])
    if isinstance(x, dict):
        return {name: _mapped(change, part) for name, part in x.items()}
    return change(x)
