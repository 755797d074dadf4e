"""PeftModel: one base model and its adapters.

One class serves every task, since a task is data and a head. The classes for single tasks are names by which pipelines
and Trainers recognize the task. The base model stays as it was loaded: an adapter is applied only while a call of
``forward`` or ``generate`` runs, and in layers that gradient checkpointing recomputes for that call.

Internal: import from ``softtune``.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softtune import checkpoint, compat
from softtune.adapter import Adapter
from softtune.adapter_context import (
    BatchAdapters,
    apply_adapters,
    check_cache_provenance,
    check_frozen_layer_cache,
    tag_cache,
)
from softtune.backbone import Backbone
from softtune.backbone.prepacked_weights import prepacked_weights
from softtune.backbone.sharding import is_partitioned, is_sharded, set_root
from softtune.compat import PushToHubMixin
from softtune.errors import AdapterError, ConfigError, DataError, UnsupportedModelError
from softtune.injection.frozen_layer_cache import FrozenLayerCache
from softtune.injection.provenance import BASE
from softtune.injection.tensor_store import TensorStore
from softtune.inputs import Inputs
from softtune.methods import PeftConfig
from softtune.options import LOADING_OPTIONS, check_options
from softtune.own_loss import has_own_loss, own_loss
from softtune.peft_names import PeftNames
from softtune.peft_types import TaskType
from softtune.views import peft_class_of, with_parameters_of


class LoadResult(NamedTuple):
    """Result of ``load_adapter``, with PEFT's field names."""

    missing_keys: Sequence[str] = ()
    unexpected_keys: Sequence[str] = ()


class PeftModel(PushToHubMixin, PeftNames):
    """A frozen base model with adapters. Attributes that it lacks are looked up on the base model.

    Args:
        model: the base model, whose parameters are frozen. A model with PEFT's LoRA stays as it is, with the LoRA
            frozen or trained along.
        peft_config: the first adapter's config; without one there is no adapter yet.
        adapter_name: the first adapter's name.
        options: PEFT's options that have no effect here.

    Raises:
        UnsupportedModelError: the base model does not support the method.
        ConfigError: the config does not fit the base model, or an option is unknown.
        AdapterError: the model has adapters already.
    """

    def __new__(cls, model: Any = None, *args: Any, **options: Any) -> PeftModel:
        """Create an instance whose ``forward`` has the base model's parameters in its signature.

        Trainers select the columns of a dataset by this signature.
        """
        cls = _without_base(cls)
        shown = _with_base_signature(cls, type(_base_of(model))) if isinstance(model, nn.Module) else cls  # type: ignore[arg-type]
        return super().__new__(shown)

    def __init__(
        self, model: Any, peft_config: PeftConfig | None = None, adapter_name: str = "default", **options: Any
    ) -> None:
        check_options(options)
        if isinstance(model, PeftModel):
            raise AdapterError("the model has adapters already", "add another with add_adapter")
        base = _base_of(model)
        backbone = Backbone.shared(base)
        super().__init__(base if base is not model else base.requires_grad_(False), backbone)
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    _layer_cache: FrozenLayerCache | None = None

    @property
    def __class__(self) -> type:
        """PEFT's class where PEFT is loaded: Trainers, accelerate and TRL recognize models with adapters by it."""
        return peft_class_of(type(self))

    @__class__.setter
    def __class__(self, shown: type) -> None:
        """Take a class that was made of the shown one, as FSDP2's ``fully_shard`` does to a module.

        Raises:
            UnsupportedModelError: the weights are not there yet, and would not come by the adapters' ``state_dict``.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            raise UnsupportedModelError(
                "a model with adapters cannot be sharded before its weights are there",
                "switch cpu_ram_efficient_loading off, or shard the base model as it is loaded",
            )
        bases = tuple(type(self) if base is self.__class__ else base for base in shown.__bases__)
        object.__dict__["__class__"].__set__(self, type(shown.__name__, bases, dict(vars(shown))))
        set_root(self.backbone.model, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (_without_base(type(self)), vars(type(self)).get("shown")), self.__dict__

    # Adapters: load and save

    @classmethod
    def from_adapters(cls, model: PreTrainedModel, adapters: Mapping[str, Adapter]) -> PeftModel:
        """A base model with adapters that it shares with other models over it: all train the same parameters."""
        shared = cls(model)
        for name, adapter in adapters.items():
            shared._register(name, adapter)
        shared.set_requires_grad(list(adapters))
        return shared

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **options: Any,
    ) -> PeftModel:
        """Load a saved adapter onto a base model, for inference or further training.

        Args:
            model: the base model that the adapter was trained on.
            model_id: the adapter's folder or hub repository.
            adapter_name: the name to give it.
            is_trainable: continue training from exactly where the adapter was saved.
            config: use this config instead of the saved one; it becomes the adapter's, with the base model's sizes.
            options: where on the hub to look (``subfolder``, ``revision``, ``cache_dir``, ``token``); ``allow_pickle``
                to read PEFT's ``adapter_model.bin``, tensors only; PEFT's options that have no effect here.

        Raises:
            CheckpointError: the folder or a file in it is missing or damaged, or it is pickled and that is not allowed.
            AdapterMismatchError: the adapter was trained on another base model.
            ConfigError: an option is unknown, or the adapter is passed in the model's place.
        """
        if isinstance(model, (str, os.PathLike)):
            raise ConfigError("the base model comes first", "PeftModel.from_pretrained(model, folder)")
        if config is None:
            hub = check_options(options, LOADING_OPTIONS)
            hub.pop("allow_pickle", None)
            config = PeftConfig.from_pretrained(model_id, **hub)
        loaded = (class_for(config) if cls is PeftModel else cls)(model)
        loaded.load_adapter(model_id, adapter_name, is_trainable, config=config, **options)
        return loaded.train(is_trainable)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        config: PeftConfig | None = None,
        **options: Any,
    ) -> LoadResult:
        """Load a saved adapter, as ``from_pretrained`` does. The first one becomes active.

        If an adapter of this name is loaded already, the saved values are copied into it, and it stays trained or
        frozen as before: its tensors stay the same objects, so that an optimizer continues with them.

        Returns:
            PEFT's result with empty lists, since an adapter that does not fit is an error.

        Raises:
            AdapterError: ``is_trainable`` is set for an adapter that is loaded already and frozen.
            AdapterMismatchError: the adapter that is loaded already has another config, or see ``from_pretrained``.
            CheckpointError, ConfigError: see ``from_pretrained``.
        """
        check_options({"ephemeral_gpu_offload": ephemeral_gpu_offload, "key_mapping": key_mapping})
        hub = check_options(options, LOADING_OPTIONS)
        allow_pickle = hub.pop("allow_pickle", False)
        config = PeftConfig.from_pretrained(model_id, **hub) if config is None else config
        checkpoint.check_base_model(model_id, self.backbone, allow_pickle=allow_pickle, **hub)
        if adapter_name in self.peft_config:
            if is_trainable:
                self._check_trainable(adapter_name)
            adapter = self.adapter(adapter_name)
            adapter.check_config(config)
            checkpoint.load(model_id, adapter, allow_pickle=allow_pickle, **hub)
            self.chat_templates[adapter_name] = adapter.chat_template
            return LoadResult()
        new_config = dataclasses.replace(config, inference_mode=not is_trainable)
        adapter = self._new_adapter(adapter_name, new_config, is_saved=True)
        checkpoint.load(model_id, adapter, allow_pickle=allow_pickle, **hub)
        if all(config is not other for other in self.peft_config.values()):
            vars(config).update(vars(adapter.config))
            adapter.config = config
        self._register(adapter_name, adapter)
        if is_trainable:
            self.set_requires_grad(adapter_name)
        return LoadResult()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Save adapters in PEFT's format: ``default`` into the folder itself, others into subfolders of their names.

        Args:
            save_directory: the folder; created if missing.
            safe_serialization: if False, pickled weights are written beside the safetensors, for old readers, with a
                warning that the safetensors are read first.
            selected_adapters: names of the adapters to save; by default all.
            is_main_process: if False, nothing is saved, since another process saves.
            state_dict: take the tensors from this ``state_dict()`` instead of from the model; those of a sharded model
                are gathered from it in any case, for which every process must call this.
            options: options of PEFT and transformers that have no effect here.

        Raises:
            AdapterError: there is no adapter, or none of a selected name.
            CheckpointError: ``save_directory`` is a file.
            ConfigError: an option is unknown.
            AdapterMismatchError: a tensor of ``state_dict`` is missing, or has another shape.
            UnsupportedModelError: ``state_dict`` is given for a model that ZeRO-3 shards.
        """
        conversion = {"path_initial_model_for_weight_conversion": path_initial_model_for_weight_conversion}
        check_options({"save_embedding_layers": save_embedding_layers, **conversion})
        check_options(options, ("max_shard_size", "save_function"))
        if not safe_serialization:
            warnings.warn("weights are saved as safetensors too, which are read before the pickled ones", stacklevel=2)
        names = selected_adapters or list(self.peft_config)
        if not names:
            raise AdapterError("there is no adapter to save", "add one by add_adapter")
        if state_dict is not None and is_partitioned(self):
            raise UnsupportedModelError(
                "what ZeRO-3 shards is saved by all processes together, and the Trainer's own saving is by one",
                "set save_strategy='no', and call save_pretrained(folder, is_main_process=...) in each process",
            )
        # Sharded numbers are those of the model, which every process must read.
        with self.numbers_of(state_dict if is_main_process and not is_sharded(self) else None):
            for name in names:
                folder = Path(save_directory) if name == "default" else Path(save_directory, name)
                settings = {"also_pickled": not safe_serialization, "is_main_process": is_main_process}
                checkpoint.save(folder, self.adapter(name), self.backbone, **settings)

    @property
    def keeps_logits(self) -> bool:
        """Whether the base model can compute the logits of some tokens only (``logits_to_keep``)."""
        return "logits_to_keep" in inspect.signature(self.backbone.model.forward).parameters

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
        task_ids: Tensor | Sequence[int] | None = None,
        input_type_mask: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model's ``forward`` with the active adapter. Outputs align with the caller's tokens.

        In training there is no cache unless ``use_cache=True`` is passed. Without a cache, the layers skip padding
        where the model allows it; its hidden states are zero.

        Args:
            input_ids: [B, T], without virtual tokens.
            attention_mask: [B, T], padded left or right.
            inputs_embeds: [B, T, D] instead of ``input_ids``.
            labels: as the base model takes them; virtual tokens need none.
            prompt_positions: [B, P] column before which each virtual token is inserted, ascending, T for the end; as a
                template's ``encode`` returns them. By default virtual tokens precede the text. Those of a suffix or
                infix precede the first token that a language model has a label for, else they follow the text.
            adapter_names: B names, one for each row, whose outputs are the same as with that adapter alone.
                ``"__base__"`` is the base model without an adapter. ``"a+b"`` is the prefix of ``a`` with that of ``b``
                behind it, as ``compose_cartridge_adapters`` composes them, unless an adapter has this name; prompt
                tuning and P-tuning count as prefixes where they are keys and values. By default all rows have the
                active adapter.
            return_dict: False for a tuple.
            task_ids: [B] each row's task, from 0, where its adapter has several (MPT); a batch may mix them.
            input_type_mask: [B, T] types of the input's tokens for CPT's loss, as its ``cpt_tokens_type_mask``; by
                default the labels say which are predicted.
            prefix_mask: [B, P] 1 for each virtual token of the prefix that a row sees and 0 for those that are hidden
                from it, in all layers. Positions stay as they are. In a batch of several adapters P is that of the
                longest prefix, and the last columns are those of a shorter one.
            kwargs: further arguments of the base model's ``forward``; with ``logits_to_keep`` the loss covers the
                labels of the kept logits only.

        Raises:
            DataError: the input is empty, masks, positions or labels do not fit it, positions exceed the model's
                maximum, or ``prefix_mask`` is for a prompt that is no prefix.
            UnsupportedModelError: the prompt did not reach the layers, virtual tokens are to be hidden in a model that
                takes a prefix as a cache, ``torch`` makes a graph that cannot be right, or
                an adapter is trained on quantised layers without a gradient.
            AdapterError: ``adapter_names`` or ``task_ids`` has an unknown one, another number of rows or adapters of
                several kinds of tasks, an adapter has several tasks and there are no ``task_ids``, rows with labels
                have CPT and others do not, ``input_type_mask`` or ``task_ids`` is given for no adapter of its kind, or
                one of several in a row has more than a prefix in front of the text.
            AdapterMismatchError: the prefixes of a row are for different layers or positions.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        kwargs = compat.renamed(kwargs, self.backbone.model.forward)
        kwargs |= {name: value for name, value in given.items() if value is not None}
        inputs = Inputs.from_call(kwargs, prompt_positions, self.backbone, prefix_mask)
        batch = self._batch_adapters(adapter_names, task_ids, inputs)
        keep = kwargs.get("logits_to_keep", 0)
        if labels is not None and labels.dim() == 2:
            kwargs["labels"] = labels[:, -keep:] if isinstance(keep, int) else labels[:, keep]
        is_own = has_own_loss(batch, inputs, input_type_mask)
        num_items = kwargs.pop("num_items_in_batch", None) if is_own else None
        if is_own:
            del kwargs["labels"]
        check_cache_provenance(kwargs, batch)
        trained = self._trained(batch)
        if trained:
            self.backbone.check_gradients()
        with apply_adapters(self.backbone, batch, inputs, self._layer_cache):
            output = self.backbone.model(return_dict=True, **kwargs)
        if is_own:
            terms = {"kept": keep, "input_type_mask": input_type_mask, "num_items": num_items}
            loss = own_loss(self.backbone, batch, inputs, output.logits, **terms)
            output = type(output)(**{**output, "loss": loss})
        tag_cache(output, batch)
        self._watch(output, batch, trained)
        return output if return_dict is not False else output.to_tuple()

    def generate(
        self,
        *args: Any,
        prompt_positions: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | Sequence[int] | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base model's ``generate`` with the active adapter. Outputs contain no virtual tokens.

        Args:
            args: positional arguments of the base model's ``generate``.
            prompt_positions: see ``forward``; columns of the input.
            adapter_names: see ``forward``; one for each row of the input.
            task_ids: see ``forward``; one for each row of the input.
            prefix_mask: see ``forward``; one row for each of the input.
            kwargs: keyword arguments of the base model's ``generate``.

        Raises:
            DataError, AdapterError, UnsupportedModelError: see ``forward``.
        """
        base: Any = self.backbone.model
        generate = base.generate
        kwargs = compat.renamed(kwargs, base.prepare_inputs_for_generation)
        call = {**dict(zip(("inputs",), args, strict=False)), **kwargs}
        inputs = Inputs.from_call(call, prompt_positions, self.backbone, prefix_mask)
        batch = self._batch_adapters(adapter_names, task_ids, inputs)
        check_cache_provenance(kwargs, batch)
        with apply_adapters(self.backbone, batch, inputs) as injection:
            if injection is not None:
                injection.check_parts(kwargs)
            generated = generate(*args, **kwargs)
        tag_cache(generated, batch)
        return generated

    def _trained(self, batch: BatchAdapters) -> dict[str, Tensor]:
        """The trained tensors of a batch's adapters; none where no backward pass can follow or a graph is made."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return {}
        return {f"{name}.{key}": p for name, adapter in batch.by_name.items() for key, p in adapter.trained.items()}

    def _watch(self, output: Any, batch: BatchAdapters, trained: Mapping[str, Tensor]) -> None:
        """Warn after the first backward pass if trained tensors of the batch's adapters got no gradient."""
        if self.gradient_watch.is_over or not trained:
            return
        adapters = batch.by_name

        def cut_off(idle: Sequence[str]) -> list[str]:
            names = {name: [key.removeprefix(f"{name}.") for key in idle] for name in adapters}
            return [f"{name}.{key}" for name, adapter in adapters.items() for key in adapter.cut_off(names[name])]

        fields = [value if isinstance(value, tuple) else (value,) for value in output.values()]
        tensors = [x for field in fields for x in field if isinstance(x, Tensor)]
        self.gradient_watch.attach(tensors, trained, cut_off, in_training=self.training)

    def trunk_cache(
        self, memory: float = 1024, disk: float = 0, folder: str | os.PathLike[str] | None = None
    ) -> AbstractContextManager[FrozenLayerCache]:
        """Cache each text's hidden states below the lowest layer with a prefix, within a ``with`` block.

            model = get_peft_model(base, PrefixTuningConfig(layers="last:10"))
            with model.trunk_cache(memory=512):
                ...  # epochs of any training loop

        No prompt reaches these layers, so that a text's states [T, D] there are the same in every epoch and are
        computed only once: later epochs begin above them. Losses and gradients are the same as without the cache. A
        batch of several adapters begins below the lowest prefix of all. Calls without gradients run all layers, and so
        do those with BitFit adapters, with ``inputs_embeds``, positions, token types or a KV cache of their own, and
        those that request every layer's output. Leave the block before the base model's weights change.

        Args:
            memory: megabytes (10⁶ bytes) of states to keep in memory; a text of T tokens takes T · D · 4 bytes in fp32.
            disk: megabytes to keep in a temporary file when memory is full. Texts beyond both limits, or beyond the
                disk's free space, are computed every time.
            folder: the folder of that file; by default the system's folder for temporary files.

        Returns:
            A context manager to enter once. It yields the cache, whose ``hits`` and ``misses`` count rows.

        Raises:
            ConfigError: a size is negative or both are 0, there is no such folder, or every adapter acts from the
                first layer on.
            UnsupportedModelError: the base model is not a decoder that can skip layers, has dropout, or is trained in
                these layers.
        """
        layer_cache = FrozenLayerCache(self.backbone, TensorStore(memory, disk, folder))
        check_frozen_layer_cache(layer_cache, [self.adapter(name) for name in self.peft_config])
        return self._keeping(layer_cache)

    def prepacked_weights(self, *, gradients: bool = False) -> AbstractContextManager[None]:
        """Compute the base model's frozen linear layers from copies of their weights, within a ``with`` block.

            with model.prepacked_weights():
                model.generate(...)

        The copies have the layout of the CPU's kernels, so that texts of a few tokens at once are written faster. They
        take as much memory as the weights; the base model's own tensors stay as they are. Layers on other devices, in
        float16, quantised, or trained have no copies. Leave the block before the base model's weights change, and go
        backward in it.

        Args:
            gradients: copy the weights for the backward pass too, which takes as much memory again.

        Raises:
            AdapterError: weights have changed in the block, otherwise than in place through ``.data``; raised by the
                call that meets them.
        """
        return prepacked_weights(self.backbone.model, gradients=gradients)

    @contextmanager
    def _keeping(self, layer_cache: FrozenLayerCache) -> Iterator[FrozenLayerCache]:
        before, self._layer_cache = self._layer_cache, layer_cache
        try:
            yield layer_cache
        finally:
            self._layer_cache = before
            layer_cache.store.close()

    def _batch_adapters(
        self, adapter_names: Sequence[str] | None, task_ids: Tensor | Sequence[int] | None, inputs: Inputs
    ) -> BatchAdapters:
        """The adapters of a batch: those of ``adapter_names``, by default the active one."""
        rows = None if inputs.text is None else len(inputs.text)
        if adapter_names is not None and rows not in (None, len(adapter_names)):
            raise AdapterError(f"adapter_names has {len(adapter_names)} names, the batch {rows} rows", "give one a row")
        if task_ids is not None and rows is not None and (found := torch.as_tensor(task_ids).shape) != (rows,):
            raise DataError(f"task_ids {list(found)} do not fit {rows} rows", "give one for each")
        names = self.active_adapters or [BASE] if adapter_names is None else adapter_names
        return BatchAdapters.from_names(names, self.adapter, task_ids)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = vars(self).get("_modules", {}).get("base_model")
            if base is None:
                raise
            return getattr(base, name)


class PeftModelForCausalLM(PeftModel):
    """``PeftModel`` for causal language modeling."""


class PeftModelForSeq2SeqLM(PeftModel):
    """``PeftModel`` for sequence-to-sequence language modeling."""


class PeftModelForSequenceClassification(PeftModel):
    """``PeftModel`` for sequence classification."""


class PeftModelForTokenClassification(PeftModel):
    """``PeftModel`` for token classification."""


class PeftModelForQuestionAnswering(PeftModel):
    """``PeftModel`` for extractive question answering."""


class PeftModelForFeatureExtraction(PeftModel):
    """``PeftModel`` for feature extraction: its outputs are hidden states."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
"""The ``PeftModel`` class for each task."""


def class_for(config: PeftConfig) -> type[PeftModel]:
    """The ``PeftModel`` class for an adapter with this config."""
    return PeftModel if config.task_type is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]


def _base_of(model: Any) -> Any:
    """The base model itself, unwrapped from a model with PEFT's LoRA."""
    return model if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", lambda: model)()


def _without_base(model_class: type[PeftModel]) -> type[PeftModel]:
    """The class from which ``_with_base_signature`` made this one, or the class itself."""
    return model_class.__bases__[0] if "shown" in vars(model_class) else model_class


@cache
def _with_base_signature(model_class: type[PeftModel], base: type) -> type[PeftModel]:
    """A subclass whose ``forward`` has the parameters of a base model class in its signature."""
    if not issubclass(base, PreTrainedModel):
        return model_class

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return model_class.forward(self, *args, **kwargs)

    forward.__doc__ = model_class.forward.__doc__
    forward.__signature__ = with_parameters_of(model_class.forward, base.forward)  # type: ignore[attr-defined]
    members = {"forward": forward, "shown": base, "__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (model_class,), members)


def _blank(model_class: type[PeftModel], base: type | None) -> PeftModel:
    """An empty instance for pickle and copy: ``object.__reduce__`` would restore one of ``__class__``."""
    shown = model_class if base is None else _with_base_signature(model_class, base)  # type: ignore[arg-type]
    return object.__new__(shown)
