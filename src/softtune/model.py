"""PeftModel: one base model and its adapters. It does every task, since a task is data and a head; its classes for
single tasks are names by which pipelines and Trainers know what a model is for.

The base model stays as it was loaded; an adapter acts only while a call of ``forward`` or ``generate`` runs, and in
layers that gradient checkpointing runs again for that call.
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
from softtune.acting import Cast, acting, check_trunk, claim, sign
from softtune.adapter import Adapter
from softtune.backbone import Backbone
from softtune.backbone.interface import install
from softtune.compat import PushToHubMixin
from softtune.errors import AdapterError, ConfigError
from softtune.injection.owners import BASE
from softtune.injection.store import Store
from softtune.injection.trunk import Trunk
from softtune.inputs import Inputs
from softtune.methods import PeftConfig, TaskType
from softtune.options import LOADING_OPTIONS, check_options
from softtune.peft_names import PeftNames
from softtune.views import peft_class_of, with_parameters_of


class LoadResult(NamedTuple):
    """What ``load_adapter`` returns, by PEFT's names."""

    missing_keys: Sequence[str] = ()
    unexpected_keys: Sequence[str] = ()


class PeftModel(PushToHubMixin, PeftNames):
    """A frozen base model with adapters. Attributes that it lacks are the base model's.

    Args:
        model: the base model. Its parameters are frozen and its attention is routed through softtune, which without an
            adapter changes no bit of its outputs. A model with PEFT's LoRA in it stays as it is, frozen or trained
            along.
        peft_config: the first adapter's config; without one there is no adapter yet.
        adapter_name: the first adapter's name.
        options: those of PEFT that have no effect here.

    Raises:
        UnsupportedModelError: the base model cannot take the method.
        ConfigError: the config does not fit the base model, or an unknown option.
    """

    def __new__(cls, model: Any = None, *args: Any, **options: Any) -> PeftModel:
        """An instance whose ``forward`` has the base model's parameters in its signature, for those who choose columns
        by it."""
        cls = _without_base(cls)
        shown = _with_base_signature(cls, type(_base_of(model))) if isinstance(model, nn.Module) else cls  # type: ignore[arg-type]
        return super().__new__(shown)

    def __init__(
        self, model: Any, peft_config: PeftConfig | None = None, adapter_name: str = "default", **options: Any
    ) -> None:
        check_options(options)
        if isinstance(model, PeftModel):
            raise AdapterError("the model has adapters already: add another with add_adapter")
        base = _base_of(model)
        backbone = Backbone(base)
        super().__init__(base if base is not model else base.requires_grad_(False), backbone)
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)

    _trunk: Trunk | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """PEFT's class where PEFT is loaded: Trainers, accelerate and TRL know models with adapters by it alone."""
        return peft_class_of(type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (_without_base(type(self)), vars(type(self)).get("shown")), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.backbone.takes_wrapper:
            install(self.backbone.model)

    # Adapters: load and save

    @classmethod
    def of(cls, model: PreTrainedModel, adapters: Mapping[str, Adapter]) -> PeftModel:
        """A base model with adapters that other models over it have too: all of them train the same numbers."""
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
        """A base model with a saved adapter, ready for inference or, on request, for more training.

        Args:
            model: the base model that the adapter was trained on.
            model_id: the adapter's folder or hub repository.
            adapter_name: the name to give it.
            is_trainable: go on training from exactly where the adapter was saved.
            config: use this config instead of the saved one; it becomes the adapter's, with the base model's sizes.
            options: where on the hub to look (``subfolder``, ``revision``, ``cache_dir``, ``token``); ``allow_pickle``
                to read PEFT's ``adapter_model.bin``, as tensors alone; those of PEFT that have no effect here.

        Raises:
            CheckpointError: the folder or a file in it is missing or damaged, or it is pickled and that is not allowed.
            AdapterMismatchError: the adapter was trained on another base model.
            ConfigError: an unknown option, or the adapter stands in the model's place.
        """
        if isinstance(model, (str, os.PathLike)):
            raise ConfigError("the base model comes first: PeftModel.from_pretrained(model, folder)")
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
        """Add a saved adapter, as ``from_pretrained`` does, with its errors. The first one becomes active.

        An adapter that is there already takes over the saved numbers, and is trained or not as before: its tensors
        stay the same objects, so that an optimizer goes on with them.

        Returns:
            PEFT's result, whose lists are empty, since an adapter that does not fit is an error.

        Raises:
            AdapterError: ``is_trainable`` is asked of an adapter that is there, and frozen.
            AdapterMismatchError: the adapter that is there has another config.
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
            return LoadResult()
        own = dataclasses.replace(config, inference_mode=not is_trainable)
        adapter = self._new_adapter(adapter_name, own, is_saved=True)
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
        """Write adapters in PEFT's format: ``default`` into the folder itself, others into folders of their names.

        Args:
            save_directory: the folder; made where there is none.
            safe_serialization: where False, pickled weights are written beside the safetensors, for old readers; a
                warning says that they are not read here.
            selected_adapters: names of the adapters to save; by default all.
            is_main_process: False where another process saves.
            state_dict: take the numbers from this ``state_dict()`` instead of from the model.
            options: those of PEFT and transformers that have no effect here.

        Raises:
            AdapterError: a name is not loaded.
            CheckpointError: ``save_directory`` is a file.
            ConfigError: an unknown option.
        """
        conversion = {"path_initial_model_for_weight_conversion": path_initial_model_for_weight_conversion}
        check_options({"save_embedding_layers": save_embedding_layers, **conversion})
        check_options(options, ("max_shard_size", "save_function"))
        if not safe_serialization:
            warnings.warn("weights are saved as safetensors too, which are read before the pickled ones", stacklevel=2)
        if not is_main_process:
            return
        names = selected_adapters or list(self.peft_config)
        if not names:
            raise AdapterError("there is no adapter to save: add one by add_adapter")
        with self.numbers_of(state_dict):
            for name in names:
                folder = Path(save_directory) if name == "default" else Path(save_directory, name)
                checkpoint.save(folder, self.adapter(name), self.backbone, also_pickled=not safe_serialization)

    @property
    def keeps_logits(self) -> bool:
        """Whether the base model can compute the logits of some tokens alone (``logits_to_keep``)."""
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
        **kwargs: Any,
    ) -> Any:
        """The base model's forward with the active adapter. Outputs line up with the caller's tokens.

        In training there is no cache unless ``use_cache=True`` asks for one. Without a cache, padding is left out of
        the layers' work where the model allows it; its hidden states are zero.

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
            DataError: the input is empty, mask, positions or labels do not fit it, or positions exceed the model's.
            UnsupportedModelError: the prompt did not arrive, or ``torch`` makes a graph that cannot be right.
            AdapterError: ``adapter_names`` has an unknown name, another number of rows, or adapters of several tasks.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        kwargs = compat.renamed(kwargs, self.backbone.model.forward)
        kwargs |= {name: value for name, value in given.items() if value is not None}
        inputs = Inputs.of(kwargs, prompt_positions, self.backbone)
        cast = self._cast(adapter_names, inputs)
        keep = kwargs.get("logits_to_keep", 0)
        if labels is not None and labels.dim() == 2:
            kwargs["labels"] = labels[:, -keep:] if isinstance(keep, int) else labels[:, keep]
        claim(kwargs, cast)
        with acting(self.backbone, cast, inputs, self._trunk):
            output = self.backbone.model(return_dict=True, **kwargs)
        sign(output, cast)
        self._watch(output, cast)
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

        Raises:
            DataError, AdapterError, UnsupportedModelError: see ``forward``.
        """
        base: Any = self.backbone.model
        generate = base.generate
        kwargs = compat.renamed(kwargs, base.prepare_inputs_for_generation)
        call = {**dict(zip(("inputs",), args, strict=False)), **kwargs}
        inputs = Inputs.of(call, prompt_positions, self.backbone)
        cast = self._cast(adapter_names, inputs)
        claim(kwargs, cast)
        with acting(self.backbone, cast, inputs) as injection:
            if injection is not None:
                injection.check_parts(kwargs)
            generated = generate(*args, **kwargs)
        sign(generated, cast)
        return generated

    def _watch(self, output: Any, cast: Cast) -> None:
        """Warn after the first backward pass where what acts in a forward gets no gradient."""
        if self.gradient_watch.is_over or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        adapters = {name: adapter for name, adapter in cast.adapters.items() if adapter is not None}
        trained = {f"{name}.{key}": p for name, adapter in adapters.items() for key, p in adapter.trained.items()}
        if not trained:
            return

        def cut_off(idle: Sequence[str]) -> list[str]:
            names = {name: [key.removeprefix(f"{name}.") for key in idle] for name in adapters}
            return [f"{name}.{key}" for name, adapter in adapters.items() for key in adapter.cut_off(names[name])]

        fields = [value if isinstance(value, tuple) else (value,) for value in output.values()]
        tensors = [x for field in fields for x in field if isinstance(x, Tensor)]
        self.gradient_watch.attach(tensors, trained, cut_off, in_training=self.training)

    def trunk_cache(
        self, memory: float = 1024, disk: float = 0, folder: str | os.PathLike[str] | None = None
    ) -> AbstractContextManager[Trunk]:
        """Compute the layers below the lowest prefix once for each text, for the length of a ``with`` block.

            model = get_peft_model(base, PrefixTuningConfig(layers="last:10"))
            with model.trunk_cache(memory=512):
                ...  # epochs of any training loop

        No prompt reaches these layers, so that a text's states [T, D] there are the same in every epoch: later epochs
        begin above them. Losses and gradients are those without. Rows of several adapters begin below the lowest prefix
        of all. Calls without gradients run all layers, and so do those with BitFit adapters, vectors instead of words,
        positions, token types or a cache of their own, and those that ask for every layer's output. Leave the block
        before the base model's own numbers change.

        Args:
            memory: megabytes (10⁶ bytes) of states to keep in memory; a text of T tokens takes T · D · 4 bytes in fp32.
            disk: megabytes to keep in a temporary file when that is full. Texts beyond both bounds, or beyond what the
                disk takes, are computed every time.
            folder: where that file is; by default where the system has its temporary files.

        Returns:
            What ``with`` enters once; ``hits`` and ``misses`` of what it then gives count rows.

        Raises:
            ConfigError: a size is negative or both are 0, there is no such folder, or every adapter acts from the
                first layer on.
            UnsupportedModelError: the base model is no decoder that can leave layers out, has dropout, or is trained
                in these layers.
        """
        trunk = Trunk(self.backbone, Store(memory, disk, folder))
        check_trunk(trunk, [self.adapter(name) for name in self.peft_config])
        return self._keeping(trunk)

    @contextmanager
    def _keeping(self, trunk: Trunk) -> Iterator[Trunk]:
        before, self._trunk = self._trunk, trunk
        try:
            yield trunk
        finally:
            self._trunk = before
            trunk.store.close()

    def _cast(self, adapter_names: Sequence[str] | None, inputs: Inputs) -> Cast:
        """The adapters that act on a batch, and which of them each row has."""
        if adapter_names is None:
            return Cast.of(self.active_adapters or [BASE], self.adapter)
        if inputs.text is not None and len(inputs.text) != len(adapter_names):
            raise AdapterError(
                f"adapter_names has {len(adapter_names)} names, the batch {len(inputs.text)} rows: give one a row"
            )
        return Cast.of(adapter_names, self.adapter)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = vars(self).get("_modules", {}).get("base_model")
            if base is None:
                raise
            return getattr(base, name)


class PeftModelForCausalLM(PeftModel):
    """A model that continues texts."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A model that answers texts by texts."""


class PeftModelForSequenceClassification(PeftModel):
    """A model that labels texts."""


class PeftModelForTokenClassification(PeftModel):
    """A model that labels the tokens of texts."""


class PeftModelForQuestionAnswering(PeftModel):
    """A model that finds answers in texts."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose states are what is wanted of it."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
"""The class for each task."""


def class_for(config: PeftConfig) -> type[PeftModel]:
    """The class of models with an adapter of this config."""
    return PeftModel if config.task_type is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]


def _base_of(model: Any) -> Any:
    """The base model itself, also of a model with PEFT's LoRA."""
    return model if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", lambda: model)()


def _without_base(own: type[PeftModel]) -> type[PeftModel]:
    """A class of models, whatever base models ``_with_base_signature`` has made it for."""
    return own.__bases__[0] if "shown" in vars(own) else own


@cache
def _with_base_signature(own: type[PeftModel], base: type) -> type[PeftModel]:
    """A class of models over a class of base models."""
    if not issubclass(base, PreTrainedModel):
        return own

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return own.forward(self, *args, **kwargs)

    forward.__doc__ = own.forward.__doc__
    forward.__signature__ = with_parameters_of(own.forward, base.forward)  # type: ignore[attr-defined]
    members = {"forward": forward, "shown": base, "__module__": own.__module__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), members)


def _blank(own: type[PeftModel], base: type | None) -> PeftModel:
    """What pickle and copy fill: ``object.__reduce__`` would make one of ``__class__``."""
    shown = own if base is None else _with_base_signature(own, base)  # type: ignore[arg-type]
    return object.__new__(shown)
