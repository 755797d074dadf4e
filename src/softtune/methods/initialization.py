"""Initializers of prompts: random vectors, common words of the vocabulary, a text, class labels or a file.

Real words beat random vectors, and words of the task beat unrelated ones, above all with little data (Li & Liang 2021,
section 7.4; Lester et al. 2021, section 3.2). Every initializer returns the requested shape.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softtune import storage
from softtune.backbone import Backbone, model_session
from softtune.errors import AdapterMismatchError, CheckpointError, ConfigError
from softtune.methods.base import OWN_CONFIG_NAME
from softtune.methods.base_model_sample import may_be_base

WEIGHTS_NAME = "adapter_model.safetensors"
PROMPT_KEY = "prompt_embeddings"
OWN_KEY = "softtune.prompt_embeddings"
"""The prompt's key in a file that PEFT would misread: without the usual key, PEFT raises an error instead."""
COMMON_WORDS = 5000
"""Number of vocabulary entries to sample from: the first ones, which tokenizers give to the most common words."""
_UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]")
"""Names of the unused vocabulary entries of BERT and Gemma."""


def uniform(size: int, dim: int) -> Tensor:
    """[size, dim] drawn uniformly from ±0.5, as the random prompts of Lester et al. 2021."""
    return torch.rand(size, dim) - 0.5


def vocabulary_ids(backbone: Backbone, size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> Tensor:
    """[size] distinct token ids drawn from the most common vocabulary entries; repeated where there are too few.

    With a tokenizer, special and unused entries are left out.
    """
    entries = range(backbone.embedding.num_embeddings)
    known = entries if tokenizer is None else _word_ids(tokenizer)
    common = [i for i in known if i in entries][:COMMON_WORDS]
    return fill([common[i] for i in torch.randperm(len(common)).tolist()], size)


def _word_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the entries that can occur in a text, ascending: neither special nor unused."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    return sorted(i for token, i in tokenizer.get_vocab().items() if i not in special and not _UNUSED.fullmatch(token))


def load_tokenizer(name: str | None, options: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Raises:
        ConfigError: it cannot be loaded, or ``options`` have ``trust_remote_code``.
    """
    from transformers import AutoTokenizer

    options = options or {}
    if options.get("trust_remote_code"):
        raise ConfigError(
            "tokenizer_kwargs has trust_remote_code, which would let a downloaded config run code", "leave it out"
        )
    if name and not (storage.is_path(name) or storage.is_cached_or_reachable(name, "tokenizer_config.json")):
        raise ConfigError(f"no tokenizer at {name!r}, and the hub cannot be reached", "set tokenizer_name_or_path")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name or "", **options)
    except (OSError, ValueError) as error:
        where = f"at {name!r}" if name else "named by the base model"
        raise ConfigError(f"no tokenizer {where}", "set tokenizer_name_or_path to a folder or hub name") from error
    return tokenizer


def text_ids(text: str | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of one text, or of several, without padding.

    Raises:
        ConfigError: a text has no tokens.
    """
    texts = [text] if isinstance(text, str) else list(text)
    # Labels occur within a text. A standalone text gets the tokenizer's special tokens, as in PEFT.
    ids: list[list[int]] = [tokenizer(t, add_special_tokens=isinstance(text, str))["input_ids"] for t in texts]
    if not all(ids):
        raise ConfigError(
            f"the initial text {texts[[bool(i) for i in ids].index(False)]!r} has no tokens", "write some words"
        )
    return ids


def fill(ids: Sequence[int], size: int) -> Tensor:
    """[size] token ids: cut where there are more, repeated from the start where there are fewer."""
    return torch.tensor([ids[i % len(ids)] for i in range(size)], dtype=torch.long)


def word_vectors(backbone: Backbone, ids: Tensor) -> Tensor:
    """[P, D] input embeddings of token ids [P], in fp32."""
    with model_session(backbone.model), torch.no_grad():
        return backbone.stacks[0].embed(ids.to(backbone.device)).float().clone()


def label_vectors(backbone: Backbone, labels: Sequence[str], size: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[size, D] mean embedding of each label's sub-tokens, then vocabulary samples for the rest.

    Raises:
        ConfigError: a label has no tokens.
    """
    ids_of_labels = text_ids(labels, tokenizer)
    means = torch.stack([word_vectors(backbone, torch.tensor(ids)).mean(0) for ids in ids_of_labels])[:size]
    rest = word_vectors(backbone, vocabulary_ids(backbone, size, tokenizer))[: size - len(means)]
    return torch.cat([means, rest.to(means.device)])


class SavedPrompt(NamedTuple):
    """The prompt of a saved adapter, in the layout of its file."""

    prompt: Tensor
    """[P, D] or [P, W], in fp32."""
    is_own: bool
    """Whether it is in a layout of softtune's that PEFT cannot read."""
    config: dict[str, Any] | None
    """The fields that PEFT lacks, where they are not at their defaults; None where there is no config of softtune's."""


def read_prompt(path: str | os.PathLike[str], backbone: Backbone) -> SavedPrompt:
    """Read the prompt of a saved adapter from its folder, hub name or safetensors file.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds no prompt.
        AdapterMismatchError: the adapter was trained on another base model.
    """
    tensors = tensors_in(path)
    prompt = tensors.get(PROMPT_KEY, tensors.get(OWN_KEY))
    if prompt is None:
        raise CheckpointError(f"{path} holds no prompt", "name a folder or file with a saved prompt")
    notes = notes_of_base(path, backbone)
    return SavedPrompt(prompt.float(), PROMPT_KEY not in tensors, None if notes is None else notes.get("config", {}))


def notes_of_base(path: str | os.PathLike[str], backbone: Backbone) -> dict[str, Any] | None:
    """What softtune's config beside a saved adapter's tensors says; None where there is none, as beside PEFT's.

    Args:
        path: the adapter's folder, hub name or safetensors file.
        backbone: the base model that it should be of.

    Raises:
        CheckpointError: the config is damaged.
        AdapterMismatchError: the adapter was trained on another base model.
    """
    is_file = str(path).endswith(".safetensors")
    beside = storage.local(path).parent if is_file else path
    is_lone = is_file and not (storage.local(path).parent / OWN_CONFIG_NAME).is_file()
    notes_path = None if is_lone else storage.locate(beside, OWN_CONFIG_NAME, is_optional=True)
    notes = storage.read_json(notes_path) if notes_path else None
    if not may_be_base(notes or {}, backbone):
        raise AdapterMismatchError(
            f"the adapter in {path} was trained on another base model, with other word embeddings",
            "start from an adapter of this one",
        )
    return notes


def check_shape(prompt: Tensor, shape: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Check the shape of a prompt that was read from a file.

    Raises:
        CheckpointError: it is another than the config's.
    """
    if prompt.shape != torch.Size(shape):
        raise CheckpointError(
            f"{path} holds the shape {tuple(prompt.shape)}, the config asks for {tuple(shape)}",
            "change num_virtual_tokens or the file",
        )


def from_file(path: str | os.PathLike[str], shape: tuple[int, int], backbone: Backbone) -> Tensor:
    """[P, D] the virtual tokens of a saved adapter; see ``read_prompt``.

    Raises:
        CheckpointError: they cannot be read, or have another shape.
        AdapterMismatchError: the adapter was trained on another base model.
    """
    prompt = read_prompt(path, backbone).prompt
    check_shape(prompt, shape, path)
    return prompt


def tensors_in(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a saved adapter, from its folder, hub name or safetensors file; none where a folder has none.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is pickled.
    """
    if str(path).endswith((".bin", ".pt", ".pth", ".ckpt")):
        raise CheckpointError(
            f"{path} is pickled, which can run code", "convert its folder by softtune import FOLDER NEW"
        )
    file = storage.local(path) if str(path).endswith(".safetensors") else storage.locate(path, WEIGHTS_NAME)
    try:
        return load_file(file) if file else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"no prompt can be read from {path}", "name an adapter's folder or safetensors file"
        ) from error


def fit_last_layer(network: nn.Sequential, inputs: Tensor, target: Tensor) -> None:
    """Set the last linear layer of ``network`` so that it maps ``inputs`` [P, D] to ``target`` [P, W].

    Solves a least squares problem instead of Li & Liang's 500 Adam steps: faster, and exact where the hidden layer is
    at least P wide.
    """
    last = network[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        hidden = network[:-1](inputs).cpu().double()  # gelsd, the solver for deficient ranks, runs on the CPU only
        last.bias.copy_(target.mean(0))
        solution = torch.linalg.lstsq(hidden, (target - last.bias).cpu().double(), driver="gelsd").solution
        last.weight.copy_(solution.T)
