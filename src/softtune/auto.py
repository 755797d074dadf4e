"""PEFT's ``AutoPeftModel`` classes, which load a saved adapter together with its base model.

Internal: import from ``softtune``.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import transformers
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from softtune import storage
from softtune.errors import ConfigError
from softtune.methods import PeftConfig
from softtune.model import PeftModel
from softtune.options import LOADING_OPTIONS
from softtune.peft_types import TaskType
from softtune.pretrained import MODEL_CLASSES, locate_base_model, name_here

BASE_CLASSES: dict[TaskType, Any] = {**MODEL_CLASSES, TaskType.FEATURE_EXTRACTION: AutoModel}
TOKENIZER_CONFIG = "tokenizer_config.json"


class AutoPeftModel:
    """Loads a saved adapter and the base model that its config names."""

    task: ClassVar[TaskType | None] = None
    """The adapters' task; without it, the config names the base model's class."""

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} makes no models of its own: use {type(self).__name__}.from_pretrained")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **options: Any,
    ) -> PeftModel:
        """Load a saved adapter and its base model; see ``PeftModel.from_pretrained``.

        If the tokenizer that is saved with the adapter has more tokens than the base model, the base model's embedding
        is resized.

        Args:
            pretrained_model_name_or_path: the adapter's folder or hub repository.
            adapter_name: the name to give it.
            is_trainable: continue training from exactly where the adapter was saved.
            config: use this config instead of the saved one.
            revision: the adapter's revision on the hub.
            import_allowlist: unused, for PEFT's signature: classes are imported from transformers only.
            options: where on the hub to look; ``allow_pickle``; all others are for the base model's
                ``from_pretrained``.

        Raises:
            CheckpointError, AdapterMismatchError: see ``PeftModel.from_pretrained``.
            ConfigError: the adapter is for another task, or its config names no base model.
        """
        loading = {name: options.pop(name) for name in LOADING_OPTIONS if name in options} | {"revision": revision}
        hub = {name: value for name, value in loading.items() if name != "allow_pickle"}
        shared = {name: value for name, value in hub.items() if name not in ("subfolder", "revision")}
        saved = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        base = cls._load_base(saved, **shared, **options)
        _fit_tokenizer(base, pretrained_model_name_or_path, options.get("trust_remote_code", False), **hub)
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **loading
        )

    @classmethod
    def _load_base(cls, config: PeftConfig, **options: Any) -> PreTrainedModel:
        if config.task_type is not None and config.task_type is not cls.task:
            task = config.task_type.value
            raise ConfigError(f"{cls.__name__} is not for adapters with task_type {task}", "use the class of that task")
        named = (config.auto_mapping or {}).get("base_model_class", "")
        base_class = BASE_CLASSES[cls.task] if cls.task else getattr(transformers, named, None)
        if config.base_model_name_or_path is None or base_class is None:
            missing = "base_model_name_or_path" if base_class is not None else "auto_mapping of transformers"
            raise ConfigError(f"the adapter's config has no {missing}", "load the base model, and use PeftModel")
        source = locate_base_model(name_here(config.base_model_name_or_path))
        model: PreTrainedModel = base_class.from_pretrained(source, revision=config.revision, **options)
        return model


class AutoPeftModelForCausalLM(AutoPeftModel):
    """See ``AutoPeftModel``."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """See ``AutoPeftModel``."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """See ``AutoPeftModel``."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """See ``AutoPeftModel``."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """See ``AutoPeftModel``."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """See ``AutoPeftModel``."""

    task = TaskType.FEATURE_EXTRACTION


def _fit_tokenizer(base: PreTrainedModel, folder: str | os.PathLike[str], trust_remote_code: bool, **hub: Any) -> None:
    """Resize the base model's embedding if the tokenizer saved with an adapter has more tokens."""
    path = storage.locate(folder, TOKENIZER_CONFIG, **hub)
    if path is None:
        return
    source, where = (path.parent, {}) if storage.is_path(str(folder)) else (folder, hub)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
    embedding: Any = base.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        base.resize_token_embeddings(len(tokenizer))
