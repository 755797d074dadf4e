"""PeftModel: one base model and its adapters. One class for every task, since a task is data and a head.

The base model stays as it was loaded; an adapter acts only while a call of ``forward`` or ``generate`` runs (BitFit's
bias changes stay attached while their adapter is the active one).
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils.hub import PushToHubMixin

from softtune import checkpoint
from softtune.adapter import Adapter
from softtune.backbone import Backbone, is_checkpointing
from softtune.errors import AdapterError, CheckpointError, ConfigError, UnsupportedModelError
from softtune.injection import Injection
from softtune.injection.ahead import run_ahead
from softtune.injection.layout import row_ends, row_starts
from softtune.injection.modules import add_biases, replace_modules
from softtune.methods import PeftConfig
from softtune.methods.base import Prompt
from softtune.methods.bitfit import BiasChanges
from softtune.methods.initialization import PROMPT_KEY
from softtune.storage import HUB_OPTIONS

BASE = "__base__"
"""PEFT's name for no adapter, in ``adapter_names``."""


class PeftModel(PushToHubMixin, nn.Module):
    """A frozen base model with adapters. Attributes that it lacks are the base model's.

    Args:
        model: the base model. Its parameters are frozen and its attention is routed through softtune, which without an
            adapter changes no bit of its outputs.
        peft_config: the first adapter's config; without one there is no adapter yet.
        adapter_name: the first adapter's name.

    Raises:
        UnsupportedModelError: the base model cannot take the method.
        ConfigError: the config does not fit the base model.
    """

    def __init__(
        self, model: PreTrainedModel, peft_config: PeftConfig | None = None, adapter_name: str = "default"
    ) -> None:
        super().__init__()
        self.backbone = Backbone(model)
        self.base_model = model.requires_grad_(False)
        self.prompt_encoder = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapter = adapter_name
        self._bias_handles: list[RemovableHandle] = []
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    # Adapters: add, load, save, choose, remove

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **hub: Any,
    ) -> PeftModel:
        """A base model with a saved adapter, ready for inference or, on request, for more training.

        Args:
            model: the base model that the adapter was trained on.
            model_id: the adapter's folder or hub repository.
            adapter_name: the name to give it.
            is_trainable: go on training from exactly where the adapter was saved.
            config: use this config instead of the saved one.
            hub: where on the hub to look (``subfolder``, ``revision``, ``cache_dir``, ``token``).

        Raises:
            CheckpointError: the folder or a file in it is missing, damaged or pickled.
            AdapterMismatchError: the adapter was trained on another base model.
        """
        loaded = cls(model)
        loaded.load_adapter(model_id, adapter_name, is_trainable, config, **hub)
        return loaded.train(is_trainable)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig) -> None:
        """Add a new adapter, at the start that its config asks for. The first one becomes active.

        Raises:
            AdapterError: there is an adapter of that name, or the name has a dot.
            UnsupportedModelError: the base model cannot take the method.
        """
        adapter = self._new_adapter(adapter_name, peft_config)
        adapter.config.initialize(adapter.module, self.backbone)
        self._register(adapter_name, adapter)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **hub: Any,
    ) -> None:
        """Add a saved adapter, as ``from_pretrained`` does. The first one becomes active."""
        if unknown := set(hub) - set(HUB_OPTIONS):
            raise ConfigError(f"no option is named {min(unknown)!r}: use one of {', '.join(HUB_OPTIONS)}")
        config = copy.deepcopy(config) if config is not None else PeftConfig.from_pretrained(model_id, **hub)
        config.inference_mode = not is_trainable
        checkpoint.check_base_model(model_id, self.backbone, **hub)
        adapter = self._new_adapter(adapter_name, config)
        checkpoint.load(model_id, adapter, trainable=is_trainable, **hub)
        self._register(adapter_name, adapter)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write adapters in PEFT's format: ``default`` into the folder itself, others into folders of their names.

        Args:
            save_directory: the folder; made where there is none.
            safe_serialization: only True; weights are always safetensors.
            selected_adapters: names of the adapters to save; by default all.
            is_main_process: False where another process saves.

        Raises:
            AdapterError: a name is not loaded.
            CheckpointError: ``save_directory`` is a file, or pickled weights are asked for.
        """
        if not safe_serialization:
            raise CheckpointError("weights are saved as safetensors only: leave out safe_serialization=False")
        if not is_main_process:
            return
        for name in selected_adapters or list(self.peft_config):
            folder = Path(save_directory) if name == "default" else Path(save_directory, name)
            checkpoint.save(folder, self.adapter(name), self.backbone)

    def set_adapter(self, adapter_name: str) -> None:
        """Let this adapter act, and train it unless it was loaded for inference.

        Raises:
            AdapterError: no such adapter.
        """
        self.adapter(adapter_name)
        self.active_adapter = adapter_name
        for name, config in self.peft_config.items():
            trained = name == adapter_name and not config.inference_mode
            self.prompt_encoder[name].requires_grad_(trained)
            self.heads[name].requires_grad_(trained)
        self._attach_biases(self.active_adapters, None)

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

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, to the last bit, for the length of the block."""
        active, self.active_adapter = self.active_adapter, ""
        self._attach_biases([], None)
        try:
            yield
        finally:
            self.active_adapter = active
            self._attach_biases(self.active_adapters, None)

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

    @property
    def keeps_logits(self) -> bool:
        """Whether the base model can compute the logits of some tokens alone (``logits_to_keep``)."""
        return "logits_to_keep" in inspect.signature(self.base_model.forward).parameters

    def get_base_model(self) -> PreTrainedModel:
        """The base model, which works without adapters as it did before."""
        return self.base_model

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters too, or no longer: in a batch of several, each gets the gradients of its own rows.

        Raises:
            AdapterError: no such adapter.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.adapter(name)
            self.prompt_encoder[name].requires_grad_(requires_grad)
            self.heads[name].requires_grad_(requires_grad)

    # Running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_positions: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward with the active adapter. Outputs line up with the caller's tokens.

        In training there is no cache unless ``use_cache=True`` asks for one. Without a cache, columns that are padding
        in every row are left out of the layers' work: their hidden states are zero.

        Args:
            input_ids: [B, T], without virtual tokens.
            attention_mask: [B, T], padded left or right.
            inputs_embeds: [B, T, D] instead of ``input_ids``.
            labels: as the base model takes them; virtual tokens need none.
            prompt_positions: [B, P] the column before which each virtual token stands, ascending, T at the end; as a
                template's ``encode`` returns them. By default in front of the text or, for a suffix or infix, before
                the first token that a language model's labels ask for, else behind the text.
            adapter_names: B names, one for each row: its outputs are what they would be with that adapter alone.
                ``"__base__"`` is the base model's own. By default all rows have the active adapter.
            return_dict: False for a tuple.
            kwargs: everything else that the base model's forward takes; with ``logits_to_keep`` the loss is over the
                labels of the logits that are kept.

        Raises:
            DataError: positions do not fit the input, or exceed the model's.
            AdapterError: ``adapter_names`` has an unknown name, another number of rows, or adapters of several tasks.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        keep = kwargs.get("logits_to_keep", 0)
        if labels is not None and labels.dim() == 2:
            kwargs["labels"] = labels[:, -keep:] if isinstance(keep, int) else labels[:, keep]
        rows = _rows(input_ids, inputs_embeds)
        with self._acting(adapter_names, rows, prompt_positions, labels, attention_mask):
            output = self.base_model(return_dict=True, **kwargs)
        return output if return_dict is not False else output.to_tuple()

    def generate(
        self,
        *args: Any,
        prompt_positions: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's ``generate`` with the active adapter. Virtual tokens are not part of what it returns.

        Args:
            args: the base model's.
            prompt_positions: see ``forward``; they refer to the input.
            adapter_names: see ``forward``; one for each row of the input.
            kwargs: the base model's.
        """
        rows = _rows(*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
        with self._acting(adapter_names, rows, prompt_positions):
            generate: Any = self.base_model.generate
            return generate(*args, **kwargs)

    def _answer_columns(self, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """[B] the column of each row's first label, or behind its text; None where labels are no tokens of the text."""
        if labels is None or not self.backbone.continues_text:
            return None
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        supervised = labels != -100
        first = supervised.int().argmax(dim=1)
        ends = row_ends(mask, len(labels), labels.shape[1], labels.device)
        return torch.where(supervised.any(dim=1), first.maximum(row_starts(mask, len(labels), labels.device)), ends)

    def _choose(self, adapter_names: Sequence[str] | None, rows: int) -> tuple[list[str], Tensor | None]:
        """The adapters that act on a batch, and which of them each row has; no rows where all have the same."""
        if adapter_names is None:
            return self.active_adapters or [BASE], None
        if len(adapter_names) != rows:
            raise AdapterError(f"adapter_names has {len(adapter_names)} names, the batch {rows} rows: give one a row")
        names = list(dict.fromkeys(adapter_names))
        configs = [self.adapter(name).config for name in names if name != BASE]
        if len(tasks := {config.task_type for config in configs}) > 1:
            raise AdapterError(
                f"adapter_names mixes tasks ({', '.join(sorted(str(t and t.value) for t in tasks))}): "
                "one batch has one head, run them apart"
            )
        index = torch.tensor([names.index(name) for name in adapter_names])
        return names, index if len(names) > 1 else None

    @contextmanager
    def _acting(
        self,
        adapter_names: Sequence[str] | None,
        batch: int,
        columns: Tensor | None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Iterator[None]:
        """Each row's adapter in the base model, for the length of the block."""
        names, rows = self._choose(adapter_names, batch)
        adapters = [self.adapter(name) for name in names if name != BASE]
        with ExitStack() as stack:
            if adapter_names is not None:
                stack.callback(self._attach_biases, self.active_adapters, None)
                self._attach_biases([], None)
            prompts = [Prompt() if name == BASE else self._prompt(name, columns) for name in names]
            if adapter_names is not None:
                self._attach_biases(names, rows)
            if adapters:
                ends = self._answer_columns(labels, mask) if any(p.after_text for p in prompts) else None
                stack.enter_context(Injection(self.backbone, prompts, rows, columns=columns, text_ends=ends))
            heads = [{} if name == BASE else self.adapter(name).heads for name in names]
            for handle in replace_modules(self.base_model, heads, rows):
                stack.callback(handle.remove)
            yield

    def _prompt(self, name: str, columns: Tensor | None) -> Prompt:
        prompt: Prompt = self.adapter(name).module.prompt()
        return prompt if columns is not None else run_ahead(self.backbone, prompt)

    # Parameters

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The adapter's baked prompt on the CPU: [P, W] keys and values, or [P, D] vectors.

        Raises:
            AdapterError: no such adapter, or it has no virtual tokens.
        """
        state = self.adapter(adapter_name).module.baked_state()
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _new_adapter(self, name: str, config: PeftConfig) -> Adapter:
        if name in self.peft_config or not name or "." in name:
            reason = "is loaded already" if name in self.peft_config else "is no name: use one without dots"
            raise AdapterError(f"adapter {name!r} {reason}; loaded: {', '.join(self.peft_config) or 'none'}")
        return Adapter.new(config, self.backbone)

    def _register(self, name: str, adapter: Adapter) -> None:
        self.peft_config[name] = adapter.config
        self.prompt_encoder[name] = adapter.module
        self.heads[name] = nn.ModuleDict({n.replace(".", "/"): head for n, head in adapter.heads.items()})
        self.set_adapter(name if len(self.peft_config) == 1 else self.active_adapter)

    def _attach_biases(self, names: Sequence[str], rows: Tensor | None) -> None:
        """Let the bias changes of these adapters act, and no others."""
        while self._bias_handles:
            self._bias_handles.pop().remove()
        modules = [self.prompt_encoder[name] if name != BASE else None for name in names]
        if rows is not None and is_checkpointing(self.base_model) and any(isinstance(m, BiasChanges) for m in modules):
            raise UnsupportedModelError(
                "gradient checkpointing loses which row has which biases: train rows with BitFit adapters without it"
            )
        additions = [m.additions() if isinstance(m, BiasChanges) else [] for m in modules]
        self._bias_handles = add_biases(self.base_model, additions, rows)


def _rows(*inputs: Any) -> int:
    """B, by the first input that is there; one where the model starts a text by itself."""
    return next((len(x) for x in inputs if x is not None), 1)
