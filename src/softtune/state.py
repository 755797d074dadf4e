"""Manages the adapters on a base model by name: adds and removes them, activates and trains them, and returns their
state dict.

Knows nothing about files, and nothing about what adapters do in a call.

Internal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softtune import self_check
from softtune.adapter import Adapter
from softtune.backbone import Backbone
from softtune.errors import AdapterError, AdapterMismatchError
from softtune.gradients import GradientWatch
from softtune.injection.provenance import BASE
from softtune.methods import PeftConfig
from softtune.options import check_options
from softtune.views import BaseView


class AdapterState(nn.Module):
    """A base model and the adapters on it.

    Args:
        base_model: the base model.
        backbone: the interface of softtune to this base model.
    """

    def __init__(self, base_model: PreTrainedModel, backbone: Backbone) -> None:
        super().__init__()
        self.add_module("base_model", base_model)  # the attribute of this name is a view of it
        self.backbone = backbone
        self.prompt_encoder = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.peft_config: dict[str, PeftConfig] = {}
        self.chat_templates: dict[str, str | None] = {}
        """The chat template that each adapter was trained with; see ``Adapter``."""
        self.active_adapter = ""
        """The name of the active adapter; empty if there is none."""
        self.gradient_watch = GradientWatch()
        """Warns after the first backward pass in which trained tensors get no gradient."""
        self._times_disabled = 0

    def adapter(self, adapter_name: str) -> Adapter:
        """An adapter by name.

        Raises:
            AdapterError: no such adapter.
        """
        if adapter_name not in self.peft_config:
            loaded = ", ".join(self.peft_config) or "none"
            raise AdapterError(f"no adapter is named {adapter_name!r}", f"load it first (loaded: {loaded})")
        own_heads = self.heads[adapter_name]
        assert isinstance(own_heads, nn.ModuleDict)
        heads = {name.replace("/", "."): head for name, head in own_heads.items()}
        module, template = self.prompt_encoder[adapter_name], self.chat_templates[adapter_name]
        return Adapter(self.peft_config[adapter_name], module, heads, template)

    @property
    def base_model(self) -> Any:
        """The base model, in the form that other libraries expect; see ``BaseView``."""
        return BaseView(self.get_base_model())

    def get_base_model(self) -> PreTrainedModel:
        """The base model itself, which computes without adapters."""
        return self.backbone.model

    @property
    def device(self) -> torch.device:
        """The device of the base model's computation and of the adapters."""
        return self.backbone.device

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.get_base_model().config

    @config.setter
    def config(self, config: Any) -> None:
        self.get_base_model().config = config

    @property
    def generation_config(self) -> Any:
        """The base model's generation config."""
        return self.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, generation_config: Any) -> None:
        self.get_base_model().generation_config = generation_config

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter's name in a list; empty within ``disable_adapter``, or without adapters."""
        return [] if self._times_disabled or not self.active_adapter else [self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and not disabled."""
        return bool(self.active_adapters)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the active adapter, even while adapters are disabled.

        Raises:
            AdapterError: no adapter is active.
        """
        return self.adapter(self.active_adapter).config

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable the active adapter within the ``with`` block; ``adapter_names`` still apply.

        Outputs are then bit-identical to the base model's.
        """
        self._times_disabled += 1
        try:
            yield
        finally:
            self._times_disabled -= 1

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter, freeze the others, and train it unless it was loaded for inference.

        Args:
            adapter_name: the adapter's name, or a list of this one name.
            inference_mode: freeze this adapter too.

        Raises:
            AdapterError: no such adapter, or several names.
        """
        adapter_name = _single(adapter_name)
        self.adapter(adapter_name)
        self.active_adapter = adapter_name
        for name, config in self.peft_config.items():
            self.set_requires_grad(name, name == adapter_name and not (inference_mode or config.inference_mode))

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, **options: Any) -> None:
        """Add a new adapter, initialized as its config specifies. The first one becomes active.

        Args:
            adapter_name: the name to give it.
            peft_config: its config, which is copied.
            options: PEFT's options that have no effect here.

        Raises:
            AdapterError: the name is taken, or invalid: it is empty or ``__base__``, has a dot or a slash, or is an
                attribute of modules.
            UnsupportedModelError: the base model does not support the method.
            ConfigError: the config does not fit the base model, or an option is unknown.
        """
        check_options(options)
        adapter = self._new_adapter(adapter_name, peft_config)
        adapter.config.initialize(adapter.module, self.backbone)
        self._register(adapter_name, adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the active one, the first of the others becomes active, if there are any.

        Raises:
            AdapterError: no such adapter.
        """
        self.adapter(adapter_name)
        others = [name for name in self.peft_config if name != adapter_name]
        if self.active_adapter == adapter_name:
            if others:
                self.set_adapter(others[0])
            else:
                self.active_adapter = ""
        for part in (self.peft_config, self.chat_templates, self.prompt_encoder, self.heads):
            del part[adapter_name]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters, active or not. In a batch of several, each gets the gradients of its own rows.

        Raises:
            AdapterError: no such adapter.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.adapter(name)
            self.prompt_encoder[name].requires_grad_(requires_grad)
            self.heads[name].requires_grad_(requires_grad)
        self.gradient_watch = GradientWatch()

    def _new_adapter(self, name: str, config: PeftConfig, *, is_saved: bool = False) -> Adapter:
        is_name = name not in ("", BASE) and not {*"./\\"} & {*name} and not hasattr(self.prompt_encoder, name)
        if name in self.peft_config or not is_name:
            reason = "is loaded already" if name in self.peft_config else "is no name: use another, without . / \\"
            raise AdapterError(f"adapter {name!r} {reason}; loaded: {', '.join(self.peft_config) or 'none'}")
        adapter = Adapter.new(config, self.backbone, is_saved=is_saved)
        self_check.ensure(self.backbone, config, type(self).with_adapter)
        return adapter

    @classmethod
    def with_adapter(cls, backbone: Backbone, adapter: Adapter) -> Any:
        """A model with an adapter, named ``probe``, for the self-check of its base model."""
        model: AdapterState = cls.__new__(cls)
        AdapterState.__init__(model, backbone.model, backbone)
        model._register("probe", adapter)
        model.gradient_watch.is_over = True
        return model

    def _check_trainable(self, adapter_name: str) -> None:
        """Check that an adapter that is loaded already can be loaded again for training.

        An inactive adapter can be, unless it is for inference: ``set_adapter`` will train it.

        Raises:
            AdapterError: the adapter is frozen.
        """
        waits = adapter_name != self.active_adapter and not self.peft_config[adapter_name].inference_mode
        parts = (self.prompt_encoder[adapter_name], self.heads[adapter_name])
        if not waits and not any(p.requires_grad for part in parts for p in part.parameters()):
            raise AdapterError(
                f"adapter {adapter_name!r} is there, and frozen",
                f"train it by set_requires_grad({adapter_name!r}), or load it under another name",
            )

    def _register(self, name: str, adapter: Adapter) -> None:
        self.peft_config[name] = adapter.config
        self.chat_templates[name] = adapter.chat_template
        self.prompt_encoder[name] = adapter.module.train(self.training)
        heads = {n.replace(".", "/"): head for n, head in adapter.heads.items()}
        self.heads[name] = nn.ModuleDict(heads).train(self.training)
        if len(self.peft_config) == 1:
            self.set_adapter(name)
        else:
            self.set_requires_grad(name, False)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The state dict of all adapters, and of the base model's parameters that are trained (such as a LoRA's).

        Checkpoints of any training loop therefore hold the adapters and not the base model.
        """
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        trained = {f"{prefix}{n}" for n, p in self.named_parameters() if p.requires_grad}
        for name in [n for n in state if n.startswith(f"{prefix}base_model.") and n not in trained]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` returned.

        Raises:
            AdapterMismatchError: a tensor has another shape or, if ``strict``, is missing or unknown. The model is left
                unchanged.
        """
        full, needed = super().state_dict(), self.state_dict()
        missing, unexpected = [n for n in needed if n not in state_dict], [n for n in state_dict if n not in full]
        misshapen = [n for n, tensor in state_dict.items() if n in full and tensor.shape != full[n].shape]
        if odd := [*misshapen, *([*missing, *unexpected] if strict else ())]:
            raise AdapterMismatchError(
                f"the state has another {odd[0]!r} than the model", "add the same adapters first"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Add what ``state_dict`` leaves out, so that it is not missing when this model is part of another module."""
        full, kept = super().state_dict(prefix=prefix, keep_vars=True), self.state_dict(prefix=prefix)
        state_dict.update({n: x for n, x in full.items() if n not in kept and n not in state_dict})
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def numbers_of(self, state_dict: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Use the tensors of another ``state_dict`` instead of the model's own within the ``with`` block.

        Raises:
            AdapterMismatchError: a tensor is missing, or has another shape.
        """
        if state_dict is None:
            yield
            return
        original = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict({name: state_dict[name] for name in original if name in state_dict})
        try:
            yield
        finally:
            self.load_state_dict(original)


def _single(names: str | Sequence[str]) -> str:
    """A single adapter name, which may be passed in a list.

    Raises:
        AdapterError: the list has several names, or none.
    """
    if isinstance(names, str):
        return names
    if len(names) != 1:
        raise AdapterError(f"one adapter acts on a batch, not {list(names)}", "name it, or each row's by adapter_names")
    return names[0]
