"""The one file with the names that transformers may change.

Arguments, classes, modules and private attributes change from one minor version to the next, and a wrong name often
fails silently, as a keyword argument that nothing reads. So the rest of softtune uses one name for a thing, that of the
newest version in ``ARGUMENTS``, and this file translates it to the name in the installed version or in a model's file.

Knows nothing about adapters.

Internal.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from accelerate.utils import patch_environment
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.hub import PushToHubMixin

from softtune.errors import DataError, UnsupportedModelError
from softtune.installed_transformers import INSTALLED, OLDEST

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "ARGUMENTS",
    "INSTALLED",
    "OLDEST",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GradientCheckpointingLayer",
    "PushToHubMixin",
    "StaticLayer",
    "StaticSlidingWindowLayer",
]


TESTED = Path(__file__).with_name("tested.json")
"""The tested model classes, as written by the support matrix."""


@cache
def tested() -> dict[str, list[str]]:
    """Tested model classes by version of transformers."""
    versions: dict[str, list[str]] = json.loads(TESTED.read_text(encoding="utf-8"))
    return versions


def is_tested(model: PreTrainedModel) -> bool:
    """Whether the support matrix covers a model's class in the installed transformers."""
    return class_name(type(model), model.config) in tested().get(str(INSTALLED), ())


def class_name(model_class: type, config: Any) -> str:
    """The name of a model class.

    It includes the module where that is not transformers', and the model types where the class combines any two models.
    FSDP2's subclass counts as the class itself.
    """
    model_class = next(c for c in model_class.__mro__ if not c.__module__.startswith("torch.distributed."))
    name = (
        model_class.__name__
        if model_class.__module__.startswith("transformers.")
        else f"{model_class.__module__}.{model_class.__qualname__}"
    )
    if config.model_type != "encoder-decoder":
        return name
    return f"{name} of {config.encoder.model_type} and {config.decoder.model_type}"


class Name(NamedTuple):
    """A name that some versions of transformers use for a thing."""

    name: str
    since: str = OLDEST
    until: str = ""
    """The first version without it; empty where none is known."""

    @property
    def holds(self) -> bool:
        """Whether the installed version uses it."""
        return Version(self.since) <= INSTALLED and not (self.until and Version(self.until) <= INSTALLED)


ARGUMENTS: dict[str, tuple[Name, ...]] = {
    # A model without attention has recurrent states instead of keys and values; RWKV's are a list.
    "cache": (
        Name("cache", since="5.24"),
        Name("past_key_values", until="6.0"),
        Name("cache_params", until="6.0"),
        Name("state"),
    ),
    # The number of cached tokens, as position tables take it.
    "cache_length": (Name("cache_length", since="5.24"), Name("past_key_values_length", until="5.24")),
    # The Trainer's argument, the model's two methods and the first of their arguments.
    "activation_checkpointing": (
        Name("activation_checkpointing", since="5.23"),
        Name("gradient_checkpointing", until="6.0"),
    ),
}
"""The names of an argument in transformers and in models' files, the newest first, by softtune's name for it."""

_CANONICAL = {spelling.name: name for name, spellings in ARGUMENTS.items() for spelling in spellings}


def spelled(name: str, parameters: Collection[str] | None = None) -> str:
    """The name of an argument in a function with these parameters, or by default in the installed transformers.

    The function's parameters come first, since a model's file may be older than transformers.
    """
    spellings = ARGUMENTS.get(name, (Name(name),))
    if parameters is not None and (matching := [s.name for s in spellings if s.name in parameters]):
        return matching[0]
    return next(s.name for s in spellings if s.holds)


def canonical(call: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a call's arguments to softtune's names.

    Raises:
        DataError: an argument is given under two names.
    """
    arguments: dict[str, Any] = {}
    for given, value in call.items():
        name = _CANONICAL.get(given, given)
        if arguments.get(name) is not None and value is not None:
            raise DataError(f"the call has {name} under two names, {given} too", "give one")
        if arguments.get(name) is None:
            arguments[name] = value
    return arguments


def renamed(call: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Translate a call's arguments to the names that a function takes.

    Raises:
        DataError: an argument is given under two names.
    """
    call = canonical(call)
    if ARGUMENTS.keys().isdisjoint(call):
        return call
    parameters = inspect.signature(function).parameters
    return {spelled(name, parameters): value for name, value in call.items()}


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache in a call's arguments or in an output's fields; None where there is none."""
    fields = {**call}  # an output also accepts old names for its cache, with a warning
    return next((fields[s.name] for s in ARGUMENTS["cache"] if fields.get(s.name) is not None), None)


def set_cache(output: Any, cache: Any) -> None:
    """Put a cache into an output that has one."""
    setattr(output, next(s.name for s in ARGUMENTS["cache"] if s.name in {**output}), cache)


def takes_cache(parameters: Collection[str]) -> bool:
    """Whether a function with these parameters takes a cache."""
    return any(s.name in parameters for s in ARGUMENTS["cache"])


def create_masks(config: Any, vectors: Tensor) -> Any:
    """Create a model's masks for inputs without padding: None, a mask, or a dict with one for each kind of layer."""
    nothing: Any = {spelled("cache"): None}
    return create_masks_for_generate(config, vectors, attention_mask=None, **nothing)


# Attention


def has_interface(model: nn.Module) -> bool:
    """Whether a model uses the attention interface, so that its attention function can be set."""
    return isinstance(model, PreTrainedModel) and bool(model._can_set_attn_implementation())


def configs_of(model: nn.Module) -> list[Any]:
    """The configs of a model's modules and the configs inside them: each names the attention function of its layers."""
    found = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    waiting = list(found.values())
    while waiting:
        config = waiting.pop()
        inside = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
        new = {id(part): part for part in inside if part is not None and id(part) not in found}
        found |= new
        waiting += new.values()
    return list(found.values())


def attention_name(config: Any) -> str | None:
    """The name of the attention function in a config; None where it has none."""
    return getattr(config, "_attn_implementation", None)


def set_attention_name(config: Any, name: str) -> None:
    """Set the attention function of a config, but not of the configs inside it."""
    alone = "_attn_implementation_internal"
    setattr(config, alone if alone in vars(config) else "_attn_implementation", name)


def with_attention_name(name: str) -> dict[str, str]:
    """A dict of the attribute that names a config's attention function."""
    return {"_attn_implementation": name}


def eager_function(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of a module's model file, with the model's own soft caps and sinks."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


DISENTANGLED = (
    "hidden_states",
    "attention_mask",
    "output_attentions",
    "query_states",
    "relative_pos",
    "rel_embeddings",
)
"""The parameters of DeBERTa's attention."""


def is_disentangled(module: nn.Module) -> bool:
    """Whether a module is DeBERTa's attention with the parameters in ``DISENTANGLED``, without talking heads."""
    files = ("transformers.models.deberta.", "transformers.models.deberta_v2.")
    is_own = type(module).__name__ == "DisentangledSelfAttention" and type(module).__module__.startswith(files)
    is_known = is_own and tuple(inspect.signature(type(module).forward).parameters)[1:] == DISENTANGLED
    return is_known and not getattr(module, "talking_head", False)


# Activation checkpointing

CHECKPOINTS = "gradient_checkpointing"
"""A module's flag: whether it is recomputed in the backward pass."""
CHECKPOINT = "_gradient_checkpointing_func"
"""A module's attribute: the function that runs it, torch's ``checkpoint`` with its settings once enabled."""
KEEPS_CACHE = "_can_checkpoint_with_cache"
"""A layer's flag: whether it may use a cache while it is checkpointed."""


def can_checkpoint(model: Any) -> bool:
    """Whether a model supports gradient checkpointing."""
    return bool(model.supports_gradient_checkpointing)


def enable_checkpointing(model: Any, **settings: Any) -> None:
    """Enable gradient checkpointing of a model's layers, with settings of torch's ``checkpoint``."""
    name = spelled("activation_checkpointing")
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": settings or None})


def disable_checkpointing(model: Any) -> None:
    """Disable gradient checkpointing, and the gradients of the input embeddings that enabling it requires."""
    getattr(model, f"{spelled('activation_checkpointing')}_disable")()
    model.disable_input_require_grads()


# Peculiarities of single model files

_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "positions_embed", "pos_encoding")
"""Endings of the names of position tables."""


def position_table(stack: Any) -> nn.Module | None:
    """The position embedding of BART and its relatives, which counts positions itself and takes an offset."""
    return getattr(stack, "embed_positions", None)


def has_position_table(stack: Any) -> bool:
    """Whether a stack looks positions up in a table."""
    modules = [(n, m) for n, m in stack.named_modules() if isinstance(m, nn.Embedding)]
    names = [n for n, _ in (*modules, *stack.named_buffers())]  # GPT-J keeps its sines in a buffer
    return any(n.endswith(_POSITION_TABLES) for n in (*names, *vars(stack)))  # CTRL's is a plain attribute


def table_size(stack: Any) -> int | None:
    """The number of positions in a stack's table, with those before the first token's; None where there is no table."""
    if hasattr(stack, "build_mpt_alibi_tensor"):  # MPT has linear biases, but of a fixed length
        return int(stack.config.max_seq_len)
    return getattr(stack.config, "max_position_embeddings", None) if has_position_table(stack) else None


def first_position(stack: Any) -> int:
    """The position of the first real token: in RoBERTa and its relatives the one after the padding's."""
    table = getattr(getattr(stack, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def hidden_dropout(config: Any) -> float:
    """A config's dropout probability of hidden states, from whichever field the model's family has for it."""
    names = ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "dropout_rate", "dropout")
    return next((float(getattr(config, name)) for name in names if hasattr(config, name)), 0.0)


@contextmanager
def causal_loss(model: Any, change: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Iterator[None]:
    """Change the function that computes a model's loss within the block, if it is that of causal language models."""
    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        yield
        return
    own = vars(model).get("_loss_function")
    model.loss_function = change(ForCausalLMLoss)
    try:
        yield
    finally:
        if own is None:
            del model._loss_function
        else:
            model.loss_function = own


def keeps_states(stack: Any) -> bool:
    """Whether layers store their states in themselves and reset them only at position 0, as RecurrentGemma's do."""
    return hasattr(stack, "_setup_cache")


def has_picture_in_cache(stack: nn.Module) -> bool:
    """Whether a stack takes whatever its cache holds for an image and widens masks by it, as Git's does."""
    return any(hasattr(module, "image_patch_tokens") for module in stack.modules())


def has_relative_bias(module: nn.Module) -> bool:
    """Whether an attention module of T5 or its relatives has a table of relative position biases."""
    return bool(getattr(module, "has_relative_attention_bias", False)) and hasattr(module, "_relative_position_bucket")


def relative_bias(owner: Any, distance: Tensor, *, bidirectional: bool) -> Tensor:
    """The bias [..., heads] that the owner of such a table adds to the scores of keys at a distance."""
    bucket = owner._relative_position_bucket
    settings = {
        "bidirectional": bidirectional,
        "num_buckets": owner.relative_attention_num_buckets,
        "max_distance": owner.relative_attention_max_distance,
    }
    knows = "num_buckets" not in inspect.signature(bucket).parameters  # UMT5's
    bias: Tensor = owner.relative_attention_bias(bucket(distance, **({} if knows else settings)))
    return bias


# The Trainer

_TRAINER_HOOKS = {
    "save_adapter": "_save",
    "load_adapter": "_load_from_checkpoint",
    "load_best": "_load_best_model",
}
"""Private Trainer methods that softtune's Trainer overrides, by softtune's names for them."""

T = TypeVar("T", bound=type)


def trainer_hooks(trainer: T) -> T:
    """Class decorator: override the Trainer's private methods by this class's methods in ``_TRAINER_HOOKS``.

    Raises:
        UnsupportedModelError: the installed transformers has no such method, so the override would have no effect.
    """
    for public, private in _TRAINER_HOOKS.items():
        _check_has(trainer.__base__, private)
        setattr(trainer, private, vars(trainer)[public])
    return trainer


def _check_has(trainer: Any, method: str) -> None:
    """Check that a Trainer's class has a private method.

    Raises:
        UnsupportedModelError: it has not.
    """
    if not hasattr(trainer, method):
        raise UnsupportedModelError(
            f"the Trainer of transformers {INSTALLED} has no {method}",
            "install a version that softtune was tested with, see docs/support.md",
        )


def set_train_sampler(trainer: Any, sampler: Callable[..., Any]) -> None:
    """Let a Trainer take its training rows by the sampler that a function of the data set returns.

    Raises:
        UnsupportedModelError: the installed transformers has no such method, so the sampler would have no effect.
    """
    _check_has(type(trainer), "_get_train_sampler")
    trainer._get_train_sampler = sampler


def length_grouped_indices(lengths: list[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """The Trainer's order of rows in which neighbours have similar lengths, the longest row first."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    indices: list[int] = get_length_grouped_indices(lengths, batch_size, generator=generator)
    return indices


def prepared_inputs(trainer: Any, batch: Mapping[str, Any]) -> Any:
    """Prepare a batch as a Trainer's own step does, on its device."""
    return trainer._prepare_inputs(batch)


def save_checkpoint(trainer: Any) -> None:
    """Save a checkpoint of a Trainer's current step."""
    trainer._save_checkpoint(trainer.model, trial=None)


def training_arguments_on(device: torch.device, **settings: Any) -> TrainingArguments:
    """The arguments of a Trainer that computes on this device, or under torchrun on the process's own.

    By itself a Trainer takes the first GPU, and shares its batches among all that it sees.
    """
    from transformers import TrainingArguments

    with patch_environment(**({"ACCELERATE_TORCH_DEVICE": str(device)} if device.index else {})):
        arguments = TrainingArguments(use_cpu=device.type == "cpu", **settings)
    if device.type != "cpu" and arguments.world_size == 1:
        arguments._n_gpu = 1
        if device.index:
            vars(arguments)["_setup_devices"] = device  # a cached property, always of the first GPU
            torch.get_device_module(device).set_device(device)
    return arguments


@contextmanager
def sharded_models_allowed(arguments: TrainingArguments) -> Iterator[None]:
    """Let a Trainer that is made in the block take a base model that transformers has sharded.

    It refuses to, since it could not save the optimiser's state of sharded parameters; those that are trained here are
    not sharded.
    """
    before, arguments.save_only_model = arguments.save_only_model, True
    try:
        yield
    finally:
        arguments.save_only_model = before


def sharded_over(processes: int) -> Any:
    """The argument ``distributed_config`` of ``from_pretrained`` that shards a model over so many processes."""
    from transformers.distributed import configuration_utils

    return configuration_utils.DistributedConfig(fsdp_size=processes)


def console_callbacks() -> list[type]:
    """The Trainer callbacks that print."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    return [PrinterCallback, ProgressCallback]


def tracking_callback(name: str) -> type:
    """The Trainer callback for ``tensorboard`` or ``wandb``."""
    from transformers.integrations import integration_utils

    names = {"tensorboard": "TensorBoardCallback", "wandb": "WandbCallback"}
    callback: type = getattr(integration_utils, names[name])
    return callback
