"""What transformers may rename: the one file that spells it.

Arguments, classes, modules and private attributes change from one minor version to the next, and a wrong name often
fails in silence, as a keyword argument that nobody reads. So everything else here uses one name for a thing, that of
the newest version in ``ARGUMENTS``, and asks this file for what an installed version or a model's own file calls it.

Knows nothing about adapters.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from packaging.version import Version

OLDEST = "5.17"
"""The oldest transformers that softtune runs with, as in pyproject.toml."""
INSTALLED = Version(version("transformers"))
if Version(OLDEST) > INSTALLED:
    raise ImportError(
        f"softtune needs transformers {OLDEST} or newer, and {INSTALLED} is installed: pip install -U transformers",
        name="transformers",
    )

from torch import Tensor, nn  # noqa: E402  # an old version lacks what is imported below
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # noqa: E402
from transformers.cache_utils import (  # noqa: E402
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate  # noqa: E402
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.utils.hub import PushToHubMixin  # noqa: E402

from softtune.errors import DataError, UnsupportedModelError  # noqa: E402

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "ARGUMENTS",
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
"""What the run of the support matrix has tested."""


@cache
def tested() -> dict[str, list[str]]:
    """Classes of models that were tested, by the version of transformers."""
    versions: dict[str, list[str]] = json.loads(TESTED.read_text(encoding="utf-8"))
    return versions


def is_tested(model: PreTrainedModel) -> bool:
    """Whether the support matrix covers a model's class in the installed transformers."""
    return class_name(type(model), model.config) in tested().get(str(INSTALLED), ())


def class_name(own: type, config: Any) -> str:
    """A class of models by name: with its module where that is not transformers', and with the kinds of models where it
    is made of any two."""
    name = own.__name__ if own.__module__.startswith("transformers.") else f"{own.__module__}.{own.__qualname__}"
    if config.model_type != "encoder-decoder":
        return name
    return f"{name} of {config.encoder.model_type} and {config.decoder.model_type}"


class Name(NamedTuple):
    """What some versions of transformers call a thing."""

    name: str
    since: str = OLDEST
    until: str = ""
    """The first version without it; empty where none is known."""

    @property
    def holds(self) -> bool:
        """Whether the installed version uses it."""
        return Version(self.since) <= INSTALLED and not (self.until and Version(self.until) <= INSTALLED)


ARGUMENTS: dict[str, tuple[Name, ...]] = {
    # A model without attention has states in place of keys and values; RWKV's are a list.
    "cache": (
        Name("cache", since="5.24"),
        Name("past_key_values", until="6.0"),
        Name("cache_params", until="6.0"),
        Name("state"),
    ),
    # How many tokens are cached, to a position table.
    "cache_length": (Name("cache_length", since="5.24"), Name("past_key_values_length", until="5.24")),
    # The Trainer's argument, the model's two methods and the first of their arguments.
    "activation_checkpointing": (
        Name("activation_checkpointing", since="5.23"),
        Name("gradient_checkpointing", until="6.0"),
    ),
}
"""By softtune's name for an argument, what transformers and the files of models call it, the newest first."""

_CANONICAL = {spelling.name: name for name, spellings in ARGUMENTS.items() for spelling in spellings}


def spelled(name: str, parameters: Collection[str] | None = None) -> str:
    """What a function with these parameters calls an argument; by default what the installed transformers does.

    A model's file may be older than transformers: what its function takes comes first.
    """
    spellings = ARGUMENTS.get(name, (Name(name),))
    if parameters is not None and (own := [s.name for s in spellings if s.name in parameters]):
        return own[0]
    return next(s.name for s in spellings if s.holds)


def canonical(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by softtune's names.

    Raises:
        DataError: an argument is given under two names.
    """
    found: dict[str, Any] = {}
    for given, value in call.items():
        name = _CANONICAL.get(given, given)
        if found.get(name) is not None and value is not None:
            raise DataError(f"the call has {name} under two names, {given} too: give one")
        if found.get(name) is None:
            found[name] = value
    return found


def renamed(call: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """A call's arguments as a function calls them. Raises DataError as ``canonical`` does."""
    call = canonical(call)
    if ARGUMENTS.keys().isdisjoint(call):
        return call
    parameters = inspect.signature(function).parameters
    return {spelled(name, parameters): value for name, value in call.items()}


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, or an output's fields; None where there is none."""
    fields = {**call}  # an output finds its cache by old names too, and warns
    return next((fields[s.name] for s in ARGUMENTS["cache"] if fields.get(s.name) is not None), None)


def set_cache(output: Any, cache: Any) -> None:
    """Put a cache into an output that has one."""
    setattr(output, next(s.name for s in ARGUMENTS["cache"] if s.name in {**output}), cache)


def takes_cache(parameters: Collection[str]) -> bool:
    """Whether a function with these parameters goes on from a cache."""
    return any(s.name in parameters for s in ARGUMENTS["cache"])


def create_masks(config: Any, vectors: Tensor) -> Any:
    """What a model makes of no attention mask: None, a mask, or one for each kind of layer by its name."""
    nothing: Any = {spelled("cache"): None}
    return create_masks_for_generate(config, vectors, attention_mask=None, **nothing)


# Attention


def has_interface(model: Any) -> bool:
    """Whether a model's attention function can be chosen."""
    return bool(model._can_set_attn_implementation())


def attention_name(config: Any) -> str | None:
    """The name of the attention function in a config; None where it has none."""
    return getattr(config, "_attn_implementation", None)


def set_attention_name(config: Any, name: str) -> None:
    """Choose the attention function of a config."""
    config._attn_implementation = name


def with_attention_name(name: str) -> dict[str, str]:
    """The attributes that name a config's attention function."""
    return {"_attn_implementation": name}


def eager_function(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of an attention module's file, with the model's own soft caps and sinks."""
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
"""What DeBERTa's attention is called with."""


def is_disentangled(module: nn.Module) -> bool:
    """Whether a module is DeBERTa's attention as softtune knows it, without talking-heads attention."""
    files = ("transformers.models.deberta.", "transformers.models.deberta_v2.")
    is_own = type(module).__name__ == "DisentangledSelfAttention" and type(module).__module__.startswith(files)
    is_known = is_own and tuple(inspect.signature(type(module).forward).parameters)[1:] == DISENTANGLED
    return is_known and not getattr(module, "talking_head", False)


# Activation checkpointing

CHECKPOINTS = "gradient_checkpointing"
"""A module's flag: whether it runs again in the backward pass."""
CHECKPOINT = "_gradient_checkpointing_func"
"""What runs such a module: torch's ``checkpoint``, with its settings once it is enabled."""
KEEPS_CACHE = "_can_checkpoint_with_cache"
"""A layer's flag: whether it may have a cache nevertheless."""


def can_checkpoint(model: Any) -> bool:
    """Whether a model's layers can run again in the backward pass."""
    return bool(model.supports_gradient_checkpointing)


def enable_checkpointing(model: Any, **settings: Any) -> None:
    """Let a model's layers run again in the backward pass, with settings of torch's ``checkpoint``."""
    name = spelled("activation_checkpointing")
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": settings or None})


def disable_checkpointing(model: Any) -> None:
    """Let no layer run again, and words need no gradients, which they do where it is enabled."""
    getattr(model, f"{spelled('activation_checkpointing')}_disable")()
    model.disable_input_require_grads()


# What single model files do in ways of their own

_POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "positions_embed", "pos_encoding")
"""How the names of position tables end."""


def position_table(stack: Any) -> nn.Module | None:
    """The position embedding of BART's kin, which counts for itself and takes an offset."""
    return getattr(stack, "embed_positions", None)


def has_position_table(stack: Any) -> bool:
    """Whether a stack looks positions up in a table."""
    modules = [(n, m) for n, m in stack.named_modules() if isinstance(m, nn.Embedding)]
    names = [n for n, _ in (*modules, *stack.named_buffers())]  # GPT-J keeps its sines in a buffer
    return any(n.endswith(_POSITION_TABLES) for n in (*names, *vars(stack)))  # CTRL its own beside them


def table_size(stack: Any) -> int | None:
    """Positions that a stack has a table for, those before the first token's too; None where there is no table."""
    if hasattr(stack, "build_mpt_alibi_tensor"):  # MPT has linear biases, but of a fixed length
        return int(stack.config.max_seq_len)
    return getattr(stack.config, "max_position_embeddings", None) if has_position_table(stack) else None


def first_position(stack: Any) -> int:
    """The first real token's position: RoBERTa's kin begin behind their padding's."""
    table = getattr(getattr(stack, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def keeps_states(stack: Any) -> bool:
    """Whether layers of RecurrentGemma keep states to themselves, and begin anew where a position is 0 alone."""
    return hasattr(stack, "_setup_cache")


def has_picture_in_cache(stack: nn.Module) -> bool:
    """Whether a stack, Git's, takes what stands in its cache already for a picture, and widens masks by it."""
    return any(hasattr(module, "image_patch_tokens") for module in stack.modules())


def has_relative_bias(module: nn.Module) -> bool:
    """Whether an attention module of T5's kin owns a table of relative position biases."""
    return bool(getattr(module, "has_relative_attention_bias", False)) and hasattr(module, "_relative_position_bucket")


def relative_bias(owner: Any, distance: Tensor, *, bidirectional: bool) -> Tensor:
    """[..., heads] what an owner of such a table adds to scores of keys at a distance."""
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
"""Methods of a Trainer that softtune's takes the place of, by its own names for them."""

T = TypeVar("T", bound=type)


def trainer_hooks(trainer: T) -> T:
    """Let a Trainer call the methods of this class where it calls its private ones.

    Raises:
        UnsupportedModelError: the installed transformers calls none of that name, so that this class would not act.
    """
    for own, private in _TRAINER_HOOKS.items():
        if not hasattr(trainer.__base__, private):
            raise UnsupportedModelError(
                f"the Trainer of transformers {INSTALLED} has no {private}: install a version that softtune was tested "
                "with, see docs/support.md"
            )
        setattr(trainer, private, vars(trainer)[own])
    return trainer


def prepared_inputs(trainer: Any, batch: Mapping[str, Any]) -> Any:
    """A batch as a Trainer's own step has it, on its device."""
    return trainer._prepare_inputs(batch)


def save_checkpoint(trainer: Any) -> None:
    """Write a checkpoint of a Trainer's last step."""
    trainer._save_checkpoint(trainer.model, trial=None)


def console_callbacks() -> list[type]:
    """The callbacks of a Trainer that print."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    return [PrinterCallback, ProgressCallback]


def tracking_callback(name: str) -> type:
    """A Trainer's callback for ``tensorboard`` or ``wandb``."""
    from transformers.integrations import integration_utils

    names = {"tensorboard": "TensorBoardCallback", "wandb": "WandbCallback"}
    callback: type = getattr(integration_utils, names[name])
    return callback
