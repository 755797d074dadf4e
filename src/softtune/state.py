"""The adapters on a base model by name: which of them acts, which are trained, and their numbers as a state dict.

Knows nothing about files, and nothing about what adapters do in a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from softtune.adapter import Adapter
from softtune.errors import AdapterError, AdapterMismatchError
from softtune.methods import PeftConfig
from softtune.methods.initialization import PROMPT_KEY


class AdapterState(nn.Module):
    """A base model and the adapters on it.

    Args:
        base_model: the base model.
        active_adapter: the first adapter's name.
    """

    def __init__(self, base_model: PreTrainedModel, active_adapter: str) -> None:
        super().__init__()
        self.base_model = base_model
        self.prompt_encoder = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapter = active_adapter

    def adapter(self, adapter_name: str) -> Adapter:
        """An adapter by name. Raises AdapterError where there is none."""
        if adapter_name not in self.peft_config:
            loaded = ", ".join(self.peft_config) or "none"
            raise AdapterError(f"no adapter is named {adapter_name!r}: load it first (loaded: {loaded})")
        own_heads = self.heads[adapter_name]
        assert isinstance(own_heads, nn.ModuleDict)
        heads = {name.replace("/", "."): head for name, head in own_heads.items()}
        return Adapter(self.peft_config[adapter_name], self.prompt_encoder[adapter_name], heads)

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter] if self.active_adapter else []

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Let this adapter act, and train it unless it was loaded for inference, or ``inference_mode`` asks for that.

        Raises:
            AdapterError: no such adapter.
        """
        self.adapter(adapter_name)
        self.active_adapter = adapter_name
        for name, config in self.peft_config.items():
            self.set_requires_grad(name, name == adapter_name and not (inference_mode or config.inference_mode))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the active one, the first of the others becomes active.

        Raises:
            AdapterError: no such adapter, or no other one.
        """
        self.adapter(adapter_name)
        others = [name for name in self.peft_config if name != adapter_name]
        if not others:
            raise AdapterError(f"{adapter_name!r} is the only adapter: use get_base_model() to go on without one")
        if self.active_adapter == adapter_name:
            self.set_adapter(others[0])
        del self.peft_config[adapter_name], self.prompt_encoder[adapter_name], self.heads[adapter_name]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters too, or no longer: in a batch of several, each gets the gradients of its own rows.

        Raises:
            AdapterError: no such adapter.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.adapter(name)
            self.prompt_encoder[name].requires_grad_(requires_grad)
            self.heads[name].requires_grad_(requires_grad)

    def _register(self, name: str, adapter: Adapter) -> None:
        self.peft_config[name] = adapter.config
        self.prompt_encoder[name] = adapter.module
        self.heads[name] = nn.ModuleDict({n.replace(".", "/"): head for n, head in adapter.heads.items()})
        if len(self.peft_config) == 1:
            self.set_adapter(name)
        else:
            self.set_requires_grad(name, False)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The adapter's baked prompt on the CPU: [P, W] keys and values, or [P, D] vectors.

        Raises:
            AdapterError: no such adapter, or it has no virtual tokens.
        """
        state = self.adapter(adapter_name).baked_state()
        if PROMPT_KEY not in state:
            raise AdapterError(f"{adapter_name!r} has no virtual tokens: read get_peft_model_state_dict instead")
        prompt: Tensor = state[PROMPT_KEY].cpu()
        return prompt

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers that are trained, and all numbers."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print both counts and the share, in PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """What is trained: all adapters, and of the base model only what is not frozen (a LoRA trained along).

        So checkpoints of any training loop hold the adapters and not the base model.
        """
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        trained = {f"{prefix}{n}" for n, p in self.named_parameters() if p.requires_grad}
        for name in [n for n in state if n.startswith(f"{prefix}base_model.") and n not in trained]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over what ``state_dict`` returned.

        Raises:
            AdapterMismatchError: a tensor has another shape or, where it is ``strict``, is missing or unknown. The
                model is left as it was.
        """
        own, needed = super().state_dict(), self.state_dict()
        missing, unexpected = [n for n in needed if n not in state_dict], [n for n in state_dict if n not in own]
        misshapen = [n for n, tensor in state_dict.items() if n in own and tensor.shape != own[n].shape]
        if odd := [*misshapen, *([*missing, *unexpected] if strict else ())]:
            raise AdapterMismatchError(f"the state has another {odd[0]!r} than the model: add the same adapters first")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys(missing, unexpected)

    @contextmanager
    def numbers_of(self, state_dict: Mapping[str, Tensor] | None) -> Iterator[None]:
        """The numbers of another ``state_dict`` in place of the model's own, for the length of the block.

        Raises:
            AdapterMismatchError: a tensor is missing, or has another shape.
        """
        if state_dict is None:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict({name: state_dict[name] for name in own if name in state_dict})
        try:
            yield
        finally:
            self.load_state_dict(own)
