"""PEFT's function that composes saved cartridges. Internal: import from ``softtune``."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softtune import checkpoint, storage
from softtune.errors import AdapterError, AdapterMismatchError, CheckpointError
from softtune.methods import CartridgeConfig, PeftConfig
from softtune.methods.base import OWN_CONFIG_NAME
from softtune.methods.base_model_sample import may_share_base
from softtune.methods.initialization import OWN_KEY, PROMPT_KEY, WEIGHTS_NAME

MUST_AGREE = (
    "task_type",
    "token_dim",
    "num_layers",
    "num_attention_heads",
    "num_transformer_submodules",
    "layers",
    "sites",
    "shift_positions",
)
"""Fields of the config that cartridges to compose have in common."""


class _Saved(NamedTuple):
    """A saved cartridge."""

    folder: Path
    config: CartridgeConfig
    notes: dict[str, Any]
    """What softtune's config says beside the config's fields; empty in a folder of PEFT's."""
    key: str
    """The key of its prefix, which says in whose layout it is."""
    prefix: Tensor
    """[P, W]"""


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Save several cartridges one behind the other, as one that has all their texts.

    Keys are as they were trained: each part keeps its own positions 0 .. P_i - 1, and the text starts at the sum of all
    P_i, as in ``kv_layout.composed``. Where the composed cartridge is trained on, the frozen tokens are those of the
    first one.

    Args:
        adapter_paths: the folders of at least two cartridges of one base model.
        output_path: the folder to save to; created if missing.
        safe_serialization: if False, pickled weights are written beside the safetensors, for old readers, with a
            warning that the safetensors are read first.

    Raises:
        AdapterError: there are fewer than two folders, or one holds another method's adapter or a trained head.
        AdapterMismatchError: the cartridges are for different base models, tasks or layers.
        CheckpointError: a folder cannot be read, or ``output_path`` not be written.
    """
    if len(adapter_paths) < 2:
        raise AdapterError(f"{len(adapter_paths)} cartridges cannot be composed", "name at least two folders")
    first, *others = cartridges = [_read(Path(path)) for path in adapter_paths]
    for other in others:
        _check(first, other)
    if not safe_serialization:
        warnings.warn("weights are saved as safetensors too, which are read before the pickled ones", stacklevel=2)
    prefix = torch.cat([cartridge.prefix for cartridge in cartridges])
    config = dataclasses.replace(
        first.config,
        num_virtual_tokens=len(prefix),
        init_weights=None,
        init_text=None,
        init_file=None,
        tokenizer_name_or_path=None,
    )
    with storage.staged(output_path) as stage:
        checkpoint.write(stage / WEIGHTS_NAME, {first.key: prefix})
        if not safe_serialization:
            torch.save({first.key: prefix}, stage / checkpoint.PICKLED_NAME)
        config.write(stage, _common_notes(cartridges))


def _read(folder: Path) -> _Saved:
    """Read a cartridge's folder.

    Raises:
        AdapterError: it holds another method's adapter, or a trained head.
        CheckpointError: it cannot be read, or its prefix is missing or has another length than its config says.
    """
    config = PeftConfig.from_pretrained(folder)
    if type(config) is not CartridgeConfig:
        method = config.peft_type.value if config.peft_type else type(config).__name__
        raise AdapterError(f"{folder} holds an adapter of {method}", "name cartridges alone")
    state = checkpoint.weights(folder)
    if heads := sorted(name for name in state if name not in (PROMPT_KEY, OWN_KEY)):
        raise AdapterError(
            f"{folder} holds {heads[0]} beside its prefix, and heads cannot be composed",
            "name cartridges without trained modules",
        )
    if not state:
        raise CheckpointError(f"{folder} holds no prefix", "restore the folder from a good copy")
    key, prefix = next(iter(state.items()))
    if len(prefix) != config.num_virtual_tokens:
        raise CheckpointError(
            f"{folder} holds {len(prefix)} virtual tokens and its config says {config.num_virtual_tokens}",
            "restore the folder from a good copy",
        )
    notes_path = storage.locate(folder, OWN_CONFIG_NAME, is_optional=True)
    notes = storage.read_json(notes_path) if notes_path else {}
    notes.pop("config", None)
    return _Saved(folder, config, notes, key, prefix)


def _check(first: _Saved, other: _Saved) -> None:
    """Check that two cartridges can stand one behind the other.

    Raises:
        AdapterMismatchError: they are for different base models, tasks or layers, or in different layouts.
    """
    both = f"{first.folder} and {other.folder}"
    if not may_share_base(first.notes, other.notes):
        raise AdapterMismatchError(
            f"{both} were trained on different base models, with other word embeddings", "compose those of one"
        )
    for name in MUST_AGREE:
        own, theirs = getattr(first.config, name), getattr(other.config, name)
        if own != theirs:
            raise AdapterMismatchError(f"{both} differ in {name}: {own!r} and {theirs!r}", "compose those of one kind")
    if first.key != other.key or first.prefix.shape[1:] != other.prefix.shape[1:]:
        raise AdapterMismatchError(
            f"{both} hold prefixes for different layers, or in the layouts of PEFT and of softtune",
            "load each on the base model and save it again",
        )


def _common_notes(cartridges: Sequence[_Saved]) -> dict[str, Any]:
    """The notes of the first cartridge that has any, without the chat template where others have another."""
    notes = next((dict(cartridge.notes) for cartridge in cartridges if cartridge.notes), {})
    template = checkpoint.CHAT_TEMPLATE_KEY
    if any(cartridge.notes.get(template) != notes.get(template) for cartridge in cartridges):
        notes.pop(template, None)
    return notes
