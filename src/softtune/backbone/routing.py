"""Routes a model's attention through softtune: for the length of a block, or from a call with an adapter on.

A model that is only looked at keeps the names of its attention functions. One that has run with an adapter keeps
softtune's, since layers may be recomputed at any later time; copied, pickled and saved configs have the stock names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from softtune import compat
from softtune.backbone.interface import is_routed, register, stock_name


@dataclass
class _Route:
    """One config whose attention is routed for the length of blocks."""

    config: Any
    stock: str = ""
    blocks: int = 0


_ROUTES: dict[int, _Route] = {}
"""Routes of open blocks by the ``id`` of the config, which models may share."""
_CONFIGS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The configs of models that have been routed."""
_LOCK = Lock()


def install(model: nn.Module) -> None:
    """Route a model's attention from now on. Without a wrapper the outputs are bit-identical.

    Raises:
        UnsupportedModelError: an attention function of the model has no mask function.
    """
    with _LOCK:
        for config, name in _names(model):
            compat.set_attention_name(config, name)
            _ROUTES.pop(id(config), None)  # no block is to end it


@contextmanager
def routed(model: nn.Module) -> Iterator[None]:
    """Route a model's attention for the length of the block, which may overlap with others.

    Raises:
        UnsupportedModelError: see ``install``.
    """
    with _LOCK:
        routes = [route for config, name in _names(model) if (route := _enter(config, name)) is not None]
    try:
        yield
    finally:
        with _LOCK:
            for route in routes:
                _leave(route)


def forget_configs(model: nn.Module) -> None:
    """Look for a model's configs anew, since its modules have changed."""
    _CONFIGS.pop(model, None)


def _names(model: nn.Module) -> list[tuple[Any, str]]:
    """The configs of a model that uses the attention interface, and softtune's names for their attention functions."""
    if model not in _CONFIGS:
        _CONFIGS[model] = compat.configs_of(model) if compat.has_interface(model) else []
    return [(config, register(name)) for config in _CONFIGS[model] if (name := stock_name(config))]


def _enter(config: Any, name: str) -> _Route | None:
    """Count one more block of a config; None where it is routed for good."""
    if not is_routed(config):
        route = _ROUTES.setdefault(id(config), _Route(config))
        route.stock = str(compat.attention_name(config))
        compat.set_attention_name(config, name)
    if (open_route := _ROUTES.get(id(config))) is not None:
        open_route.blocks += 1
    return open_route


def _leave(route: _Route) -> None:
    """End one block of a config. The last one restores the stock name, unless another has been set."""
    route.blocks -= 1
    if route.blocks or _ROUTES.get(id(route.config)) is not route:  # else it is routed for good
        return
    del _ROUTES[id(route.config)]
    if is_routed(route.config):
        compat.set_attention_name(route.config, route.stock)
