"""Presents a model with adapters to other libraries in the form that they expect.

Trainers and pipelines inspect a model's class name, the parameters of its ``forward`` and the base model below it, each
in a different way; ``docs/design.md`` lists which library inspects what.

Internal.
"""

from __future__ import annotations

import copy
import inspect
import sys
from inspect import Parameter
from typing import Any

from torch import nn


class View:
    """A proxy of a module that has its class and attributes, and is equal to it.

    Args:
        module: the module.
        below: an object with the attributes that the module lacks; none by default.
    """

    _module: nn.Module
    _below: Any

    def __init__(self, module: nn.Module, below: Any = None) -> None:
        vars(self).update(_module=module, _below=below)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner_of(name), name)

    def _owner_of(self, name: str) -> Any:
        is_below = not hasattr(self._module, name) and hasattr(self._below, name)
        return self._below if is_below else self._module

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._owner_of(name), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._owner_of(name), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return self._module is (vars(other)["_module"] if issubclass(type(other), View) else other)

    def __hash__(self) -> int:
        return hash(self._module)

    def __repr__(self) -> str:
        return repr(self._module)

    def __dir__(self) -> list[str]:
        return dir(self._module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._module, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._module, self._below)


class BaseView(View):
    """The base model as ``model.base_model``, for code that expects PEFT's prompt learning and code that expects LoRA.

    With PEFT's prompts ``base_model.model`` is the base model's attribute ``model``, often its layers. With PEFT's LoRA
    it is the base model itself, on which Trainers rely. Here it is the base model, with the attributes of its layers
    too.
    """

    @property
    def model(self) -> Any:
        return View(self._module, below=getattr(self._module, "model", None))


def peft_class_of(softtune_class: type) -> type:
    """PEFT's class with the name of a softtune class or of one of its bases; the class itself if PEFT is not loaded.

    Trainers, accelerate and TRL recognize PEFT's models and configs by their classes alone.
    """
    peft = sys.modules.get("peft")
    return next(
        (known for cls in softtune_class.__mro__ if (known := getattr(peft, cls.__name__, None))), softtune_class
    )


def shared_config_class(softtune_class: type) -> type:
    """A subclass of a softtune config class and of PEFT's class of the same name; the class itself without PEFT.

    It makes objects of the softtune class when it is called, as ``dataclasses.replace`` does.
    """
    peft_class = peft_class_of(softtune_class)
    if peft_class is softtune_class:
        return softtune_class
    if (softtune_class, peft_class) not in _BOTH:
        members = {"__new__": lambda cls, *args, **fields: softtune_class(*args, **fields)}
        _BOTH[softtune_class, peft_class] = type(softtune_class.__name__, (softtune_class, peft_class), members)
    return _BOTH[softtune_class, peft_class]


_BOTH: dict[tuple[type, type], type] = {}


def pefts_version() -> str | None:
    """The version that PEFT writes into its configs; None if PEFT is not loaded."""
    configs = sys.modules.get("peft.config")
    return configs.PeftConfigMixin._get_peft_version() if configs is not None else None


def patch_peft() -> None:
    """Make PEFT's ``PeftModel`` return a softtune model for a softtune config, if PEFT is loaded.

    PEFT would compute a prompt of its own. So a Trainer's ``peft_config=`` takes configs of both libraries.
    """
    theirs = getattr(sys.modules.get("peft"), "PeftModel", None)
    if theirs is None or theirs in _PATCHED:
        return
    original = vars(theirs).get("__new__")

    def make(cls: type, model: Any = None, peft_config: Any = None, *args: Any, **options: Any) -> Any:
        softtune = sys.modules["softtune"]  # it imports this file, and is fully loaded by now
        if isinstance(peft_config, softtune.PeftConfig):
            return softtune.get_peft_model(model, peft_config, *args, **options)
        return original(cls, model, peft_config, *args, **options) if original else object.__new__(cls)

    theirs.__new__ = make
    _PATCHED.add(theirs)


_PATCHED: set[type] = set()


def with_parameters_of(function: Any, base_forward: Any) -> inspect.Signature:
    """The signature of a model's ``forward`` merged with its base model's, by which Trainers choose columns.

    Args:
        function: the model's ``forward``; its ``labels`` is kept only if the base model takes labels.
        base_forward: the base model's. Parameters that ``function`` lacks are appended as keyword-only ones, and
            ``**kwargs`` is kept only if the base model takes it.
    """
    signature, base = inspect.signature(function), inspect.signature(base_forward).parameters
    signature = signature.replace(parameters=[p for n, p in signature.parameters.items() if n != "labels" or n in base])
    others = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in base.values() if p.name not in signature.parameters]
    others = [p for p in others if p.name not in ("self", "args", "kwargs")]
    takes_more = any(p.kind is Parameter.VAR_KEYWORD for p in base.values())
    named = [p for p in signature.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is Parameter.VAR_KEYWORD and takes_more]
    return signature.replace(parameters=[*named, *others, *rest])
