"""Sharded weights, of FSDP2 and of DeepSpeed's ZeRO-3: gathers those that are read outside of a ``forward``.

FSDP2 gathers a unit's weights when the unit's own ``forward`` is called. softtune also reads embeddings, and runs a
stack or its layers without the model around them. Knows nothing about adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

_ROOTS: WeakKeyDictionary[nn.Module, Callable[[], nn.Module | None]] = WeakKeyDictionary()
"""Weak references to the outermost sharded modules around base models, where those are not outermost themselves."""


def set_root(model: nn.Module, root: nn.Module) -> None:
    """Note that a base model's outermost sharded module is ``root``, around it, which has run no forward yet.

    It also gathers its weights for ``generate``, as for ``forward``.
    """
    for unit in _units(model):
        state = _state(unit)
        state._is_root = None  # the model's may have been, when its layers were observed
        state._state_ctx = type(state._state_ctx)()
    _ROOTS[model] = ref(root)
    sys.modules["torch.distributed.fsdp"].register_fsdp_forward_method(root, "generate")


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather the weights that a base model's layers do not hold, for the length of the block.

    The layers gather their own when they run. Nothing is done for a model that is not sharded.
    """
    root = _root(model)
    if (state := _state(root)) is None:
        yield
        return
    state._lazy_init()  # else the first layer to run would take itself for the outermost
    outer = [unit for unit in _outer_units(root) if any(group.is_sharded for group in _state(unit)._fsdp_param_groups)]
    for unit in outer:
        unit.unshard()
    try:
        yield
    finally:
        for unit in outer:
            unit.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether a model or parts of it are sharded."""
    return bool(_units(_root(model))) or is_partitioned(model)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 shards a model or parts of it."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def unpartitioned(*modules: nn.Module) -> Iterator[None]:
    """Gather what ZeRO-3 shards of some modules for the length of the block, which all processes must enter."""
    parameters = [parameter for module in modules for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    with sys.modules["deepspeed"].zero.GatheredParameters(parameters) if parameters else nullcontext():
        yield


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all of FSDP2's shards; all processes must call this for a sharded one."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _root(model: nn.Module) -> nn.Module:
    """The outermost sharded module, if the model or one around it is sharded."""
    return _ROOTS.get(model, lambda: model)() or model


def _outer_units(root: nn.Module) -> list[Any]:
    """The outermost unit, and those within that hold others, as a model holds its layers."""
    return [unit for unit in _units(root) if unit is root or len(_units(unit)) > 1]


def _units(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP2 shards as a whole, the outermost first."""
    return [module for module in model.modules() if _state(module) is not None]


def _state(module: nn.Module) -> Any:
    """FSDP2's state of a module; None if it is not sharded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp.fully_shard.state(module) if fsdp is not None and isinstance(module, fsdp.FSDPModule) else None
