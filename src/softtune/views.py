"""What other libraries find when they look at a model with adapters from outside.

Trainers and pipelines ask a model for its class's name, for the parameters of its ``forward`` and for the base model
below it, each in a way of its own; ``docs/design.md`` lists who looks at what.
"""

from __future__ import annotations

import copy
import inspect
import sys
from inspect import Parameter
from typing import Any

from torch import nn


class View:
    """A module under another name: it is the module to all who ask.

    Args:
        module: the module.
        below: where attributes are looked for that the module lacks; nowhere by default.
    """

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
    """The base model as ``model.base_model``, for those who know PEFT's prompts and for those who know its LoRA.

    With PEFT's prompts ``base_model.model`` is what the base model calls so, often its layers; with PEFT's LoRA it is
    the base model itself, and that is what Trainers go by. Here it is the base model, and has the attributes of its
    layers too.
    """

    @property
    def model(self) -> Any:
        return View(self._module, below=getattr(self._module, "model", None))


def peft_class_of(own: type) -> type:
    """The class of PEFT with the name of a class of softtune's, or of one above it; the same class where PEFT is not
    loaded. Trainers, accelerate and TRL know PEFT's models and configs by their classes alone."""
    peft = sys.modules.get("peft")
    return next((known for cls in own.__mro__ if (known := getattr(peft, cls.__name__, None))), own)


def shared_config_class(own: type) -> type:
    """A class of softtune's that is a subclass of PEFT's of that name too, where PEFT is loaded, and makes softtune's
    objects when it is called, as ``dataclasses.replace`` does."""
    theirs = peft_class_of(own)
    if theirs is own:
        return own
    if (own, theirs) not in _BOTH:
        members = {"__new__": lambda cls, *args, **fields: own(*args, **fields), "stands_for": own}
        _BOTH[own, theirs] = type(own.__name__, (own, theirs), members)
    return _BOTH[own, theirs]


_BOTH: dict[tuple[type, type], type] = {}


def pefts_version() -> str | None:
    """The version that PEFT's configs name where PEFT is loaded."""
    configs = sys.modules.get("peft.config")
    return configs.PeftConfigMixin._get_peft_version() if configs is not None else None


def patch_peft() -> None:
    """Let PEFT's models, if it is loaded, give way to softtune's where the config is softtune's: PEFT would compute a
    prompt of its own. So ``peft_config=`` of a Trainer takes both."""
    theirs = getattr(sys.modules.get("peft"), "PeftModel", None)
    if theirs is None or theirs in _PATCHED:
        return
    original = vars(theirs).get("__new__")

    def make(cls: type, model: Any = None, peft_config: Any = None, *args: Any, **options: Any) -> Any:
        softtune = sys.modules["softtune"]  # which is above this file, and whole by now
        if isinstance(peft_config, softtune.PeftConfig):
            return softtune.get_peft_model(model, peft_config, *args, **options)
        return original(cls, model, peft_config, *args, **options) if original else object.__new__(cls)

    theirs.__new__ = make
    _PATCHED.add(theirs)


_PATCHED: set[type] = set()


def with_parameters_of(function: Any, base_forward: Any) -> inspect.Signature:
    """The signature of a model's ``forward`` together with its base model's, by which Trainers choose columns.

    Args:
        function: the model's; labels are the base model's to take.
        base_forward: the base model's; the parameters that ``function`` lacks follow by keyword, and any others can be
            passed only if the base model takes them.
    """
    own, base = inspect.signature(function), inspect.signature(base_forward).parameters
    own = own.replace(parameters=[p for n, p in own.parameters.items() if n != "labels" or n in base])
    others = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in base.values() if p.name not in own.parameters]
    others = [p for p in others if p.name not in ("self", "args", "kwargs")]
    takes_more = any(p.kind is Parameter.VAR_KEYWORD for p in base.values())
    named = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    rest = [p for p in own.parameters.values() if p.kind is Parameter.VAR_KEYWORD and takes_more]
    return own.replace(parameters=[*named, *others, *rest])
