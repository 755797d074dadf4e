"""Adapter folders in PEFT's format, and the training state beside them.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` (what inference needs; PEFT reads both),
``softtune_config.json`` (fields that PEFT lacks, what the base model was loaded in, the chat template of training, and
a sample by which the base model is recognized),
``training_state.safetensors`` where training needs more tensors than inference, and a model card. Weights are
safetensors only: a pickled file is refused unread, unless the caller passes ``allow_pickle=True``.

Internal.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from softtune import storage
from softtune.adapter import Adapter, tensors_of
from softtune.backbone import Backbone
from softtune.backbone.sharding import is_partitioned, is_sharded, unpartitioned, unsharded
from softtune.card import CARD_NAME, model_card
from softtune.errors import AdapterMismatchError, CheckpointError
from softtune.formatting import in_one_line
from softtune.load_options import own_quantization
from softtune.methods.base import CONFIG_NAME, OWN_CONFIG_NAME, PeftConfig
from softtune.methods.base_model_sample import may_be_base, sample_notes
from softtune.methods.initialization import OWN_KEY, PROMPT_KEY, WEIGHTS_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_NAME = "training_state.safetensors"
PICKLED_NAME = "adapter_model.bin"
DTYPE_KEY, QUANTIZATION_KEY = "base_model_dtype", "base_model_quantization"
"""What the base model was loaded in when the adapter was trained; folders from before have neither."""
CHAT_TEMPLATE_KEY = "chat_template"
"""The chat template that the adapter was trained with; left out where it was trained without."""


def save(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    backbone: Backbone,
    *,
    also_pickled: bool = False,
    is_main_process: bool = True,
) -> None:
    """Save an adapter to a folder; each file is written whole or not at all.

    Args:
        folder: the folder; created if missing.
        adapter: the adapter.
        backbone: its base model.
        also_pickled: write ``adapter_model.bin`` beside the safetensors, for old readers of PEFT's format.
        is_main_process: if False, nothing is saved, since another process saves. Where the base model is sharded, all
            processes must call this, since all must read it.

    Raises:
        CheckpointError: ``folder`` is a file.
    """
    if is_main_process:
        with unsharded(backbone.model):
            _save(Path(folder), _unsharded(adapter, backbone), backbone, also_pickled=also_pickled)
    elif is_sharded(backbone.model):
        with unsharded(backbone.model), TemporaryDirectory() as nowhere:
            _save(Path(nowhere), _unsharded(adapter, backbone), backbone, also_pickled=also_pickled)


def _unsharded(adapter: Adapter, backbone: Backbone) -> Adapter:
    """An adapter with all its numbers: a copy of one that ZeRO-3 shards, whose modules would shard themselves again."""
    modules = [adapter.module, *adapter.heads.values()]
    if not any(map(is_partitioned, modules)):
        return adapter
    with unpartitioned(*modules, *map(backbone.model.get_submodule, adapter.heads)):
        copied = Adapter.new(adapter.config, backbone, is_saved=True)
        for module, source in zip((copied.module, *copied.heads.values()), modules, strict=True):
            _copy(tensors_of(module), tensors_of(source))
    copied.chat_template = adapter.chat_template
    return copied


def _save(folder: Path, adapter: Adapter, backbone: Backbone, *, also_pickled: bool) -> None:
    config = dataclasses.replace(adapter.config, inference_mode=True, modules_to_save=list(adapter.heads) or None)
    config.base_model_name_or_path = _name_of_base(config, backbone)
    if config.task_type is None:
        model_class = type(backbone.model)
        config.auto_mapping = {"base_model_class": model_class.__name__, "parent_library": model_class.__module__}
    with storage.staged(folder) as stage:
        state = export(adapter, backbone)
        write(stage / WEIGHTS_NAME, state)
        if also_pickled:
            torch.save({name: tensor.cpu() for name, tensor in state.items()}, stage / PICKLED_NAME)
        if adapter.is_reparameterised:
            write(stage / STATE_NAME, adapter.training_state())
        model_card(folder / CARD_NAME, config, backbone, adapter.num_trained).save(stage / CARD_NAME)
        template = {} if adapter.chat_template is None else {CHAT_TEMPLATE_KEY: adapter.chat_template}
        config.write(stage, {**sample_notes(backbone), **_precision(backbone), **template})
    gone = {STATE_NAME: not adapter.is_reparameterised, PICKLED_NAME: not also_pickled}
    for name in (name for name, is_gone in gone.items() if is_gone):
        (folder / name).unlink(missing_ok=True)  # left by another adapter that was saved here before


def _precision(backbone: Backbone) -> dict[str, str | None]:
    """What a base model is loaded in, under the keys of softtune's config."""
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    return {DTYPE_KEY: dtype, QUANTIZATION_KEY: own_quantization(backbone.model.config)}


def _warn_of_precision(folder: str | os.PathLike[str], notes: Mapping[str, Any], backbone: Backbone) -> None:
    """Warn if an adapter was trained on a base model in another dtype, or quantised otherwise."""
    now = _precision(backbone)
    then = {key: notes.get(key, now[key]) for key in now}
    if then != now:
        was, is_now = (" and ".join(filter(None, [each[QUANTIZATION_KEY], each[DTYPE_KEY]])) for each in (then, now))
        says = f"the adapter in {folder} was trained on its base model in {was}, which is in {is_now} now"
        warnings.warn(f"{says}: expect somewhat other outputs", stacklevel=4)


def warn_of_chat_template(folder: str | os.PathLike[str], adapter: Adapter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if an adapter was trained with another chat template than a tokenizer's."""
    if adapter.chat_template is None:
        return
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template != adapter.chat_template:
        says = f"the adapter in {folder} was trained with another chat template than the tokenizer's"
        warnings.warn(f"{says}: expect other outputs", stacklevel=3)


def _name_of_base(config: PeftConfig, backbone: Backbone) -> str | None:
    """The base model's name from the config or the model, or instead of a path its public name if it has one."""
    path = backbone.model.name_or_path or None
    name = config.base_model_name_or_path or path
    return getattr(backbone.model, "public_name", name) if name == path else name


def export(adapter: Adapter, backbone: Backbone) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors``, under PEFT's names.

    These are the inference state, such as the computed prompt or the trained tensors of single modules, and the heads.
    """
    state = adapter.inference_state()
    if PROMPT_KEY in state and not adapter.config.is_readable_by_peft(backbone):
        state = {OWN_KEY: state.pop(PROMPT_KEY), **state}
    return {**adapter.config.to_saved(state, adapter.module), **adapter.head_state()}


def load(folder: str | os.PathLike[str], adapter: Adapter, *, allow_pickle: bool = False, **hub: Any) -> None:
    """Load an adapter's tensors from a folder or hub repository.

    Args:
        folder: the folder or repository.
        adapter: the adapter to fill.
        allow_pickle: read pickled weights too; see ``weights``.
        hub: where on the hub to look.

    Raises:
        CheckpointError: weights are missing, damaged or pickled, or the adapter has an encoder and the folder holds no
            training state.
        AdapterMismatchError: the tensors do not fit the base model.
    """
    saved = weights(folder, allow_pickle=allow_pickle, **hub)
    state = storage.locate(folder, STATE_NAME, **hub) if adapter.is_reparameterised else None
    fill(adapter, saved, read(state) if state else None)
    notes = storage.locate(folder, OWN_CONFIG_NAME, is_optional=True, **hub)
    adapter.chat_template = storage.read_json(notes).get(CHAT_TEMPLATE_KEY) if notes else None


def weights(folder: str | os.PathLike[str], *, allow_pickle: bool = False, **hub: Any) -> dict[str, Tensor]:
    """Read the tensors of ``adapter_model.safetensors``, or of PEFT's ``adapter_model.bin`` where that is allowed.

    Raises:
        CheckpointError: there is neither, or it is damaged, holds more than tensors, or is pickled and not allowed.
    """
    path = storage.locate(folder, WEIGHTS_NAME, **hub)
    if path is not None:
        return read(path)
    pickled = storage.locate(folder, PICKLED_NAME, **hub)
    if pickled and allow_pickle:
        return read_pickled(pickled)
    if pickled:
        raise CheckpointError(
            f"{folder} has pickled weights ({PICKLED_NAME}), which can run code",
            "if you trust who wrote them, convert them by softtune import FOLDER NEW, or load them by "
            "allow_pickle=True, which reads tensors alone",
        )
    raise CheckpointError(f"{folder} has no {WEIGHTS_NAME}", "copy the whole adapter folder")


def fill(adapter: Adapter, state: Mapping[str, Tensor], training_state: Mapping[str, Tensor] | None = None) -> None:
    """Copy the tensors that ``export`` returned, or PEFT saved, into an adapter.

    Args:
        adapter: the adapter to fill.
        state: the inference state, as it is saved, and the heads.
        training_state: the module's own tensors, if it, or a part of it, computes the prompt through an encoder.

    Raises:
        AdapterMismatchError: names or shapes do not fit.
        CheckpointError: the adapter has an encoder and there is no training state for it.
    """
    inference_state, heads = adapter.split(state)
    _check(adapter.head_state(), heads)
    if _differ_where_tied(adapter.head_state(), heads):
        adapter.untie()  # PEFT has trained them separately
    inference_state = adapter.config.from_saved(inference_state, adapter.module)
    if OWN_KEY in inference_state:
        inference_state[PROMPT_KEY] = inference_state.pop(OWN_KEY)
    elif PROMPT_KEY in inference_state:
        prompt = adapter.config.from_peft(inference_state.pop(PROMPT_KEY), adapter.module)
        inference_state = {PROMPT_KEY: prompt, **adapter.config.others_from_peft(inference_state)}
    _check(adapter.inference_state(), inference_state)
    if not adapter.is_reparameterised:
        adapter.load_inference_state(inference_state)
    elif training_state is not None:
        _copy(adapter.training_state(), training_state)
    elif recovered := adapter.config.recovered(adapter.module, inference_state):
        _copy(adapter.training_state(), recovered)
    else:
        raise CheckpointError(
            "these weights hold the baked prompt but not the encoder behind it", "load them with is_trainable=False"
        )
    _copy(adapter.head_state(), heads)


def _differ_where_tied(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> bool:
    """Whether two targets share memory while their sources differ."""
    first: dict[int, str] = {}
    pairs = [(name, first.setdefault(target.data_ptr(), name)) for name, target in targets.items()]
    return any(name != other and not torch.equal(sources[name], sources[other]) for name, other in pairs)


def check_base_model(
    folder: str | os.PathLike[str], backbone: Backbone, *, allow_pickle: bool = False, **hub: Any
) -> None:
    """Check that a saved adapter was trained on this base model, and that its folder is complete.

    Warns if the base model was in another dtype then, or quantised otherwise.

    Raises:
        CheckpointError: the folder has no weights, or lacks softtune's config although the weights need it.
        AdapterMismatchError: the word embeddings differ in rows that both models have.
    """
    path = storage.locate(folder, OWN_CONFIG_NAME, is_optional=True, **hub)
    if path is None and OWN_KEY in weights(folder, allow_pickle=allow_pickle, **hub):
        raise CheckpointError(f"{folder} has no {OWN_CONFIG_NAME}, and its prompt needs it", "copy the whole folder")
    notes = storage.read_json(path) if path else {}
    _warn_of_precision(folder, notes, backbone)
    if not may_be_base(notes, backbone):
        path = storage.locate(folder, CONFIG_NAME, **hub)
        name = storage.read_json(path).get("base_model_name_or_path") if path else None
        is_same = name == backbone.model.name_or_path
        raise AdapterMismatchError(
            f"the adapter in {folder} was trained on another base model, with other word embeddings: load "
            + (f"{name} as it was then" if is_same else name or "that one")
        )


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error})", "restore it from a good copy") from error


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickled file, with ``weights_only=True``.

    Raises:
        CheckpointError: it is damaged, or holds anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = in_one_line(error)
        raise CheckpointError(f"{path} is damaged or holds more than tensors ({reason})", "leave it alone") from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{path} holds no tensors by name", "use an adapter that PEFT saved")
    return state


def _copy(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    _check(targets, sources)
    for name, tensor in sources.items():
        targets[name].data.copy_(tensor)


def _check(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    if odd := sorted(targets.keys() ^ sources.keys()):
        missing = sorted(targets.keys() - sources.keys())
        odd, side = (missing, "lacks") if missing else (odd, "also has")
        raise AdapterMismatchError(f"the adapter {side} {odd[0]!r}", "load it on the base model that it was trained on")
    for name, tensor in sources.items():
        if tensor.shape[1:] == targets[name].shape[1:] and len(tensor) != len(targets[name]) and name == PROMPT_KEY:
            raise AdapterMismatchError(
                f"{name} has the shape {list(tensor.shape)} and the config says {len(targets[name])} virtual tokens",
                "restore the folder from a good copy",
            )
        if tensor.shape != targets[name].shape:
            raise AdapterMismatchError(
                f"{name} has the shape {list(tensor.shape)}, the base model needs {list(targets[name].shape)}",
                "load the adapter on the base model that it was trained on",
            )


def write(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file."""
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, path, metadata={"format": "pt"})
