"""What configs of prefixes share: which layers get one, what it starts from, and how PEFT's are read.

A prefix starts from random numbers, zeros, the keys and values of a text or of common words, or another adapter's
prefix (SPoT: Vu et al. 2022, "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer", arXiv 2110.07904).
Letters: P virtual tokens, D embedding size, W values of one virtual token over all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from softtune.backbone import Backbone, Site
from softtune.errors import AdapterMismatchError, ConfigError
from softtune.methods import initialization as init
from softtune.methods.base import OURS, Probability, PromptLearningConfig
from softtune.methods.kv_layout import Layers, choose_layers, from_peft_layout, is_even, joined_prefix, split_prefix

Start = Literal["random", "zero", "vocabulary", "text", "file"]
_NEEDS: dict[Start, tuple[str, str]] = {
    "text": ("init_text", "write the words to start from"),
    "file": ("init_file", "name the adapter to start from"),
}
"""The field that a start reads, and what to do where it is missing."""


@dataclass(kw_only=True, eq=False)
class KeyValueConfig(PromptLearningConfig):
    """Base of the configs of methods that train keys and values in front of the layers' own.

    Raises:
        ConfigError: a value is out of range, or two of them contradict each other.
    """

    init_weights: Start | None = field(default=None, metadata=OURS)
    """Initialize from N(0, 1), with zeros, with the keys and values of common words or of ``init_text``, or with the
    prefix in ``init_file``. By default: the text or file if given, else common words."""
    init_text: str | None = field(default=None, metadata=OURS)
    """The text whose keys and values initialize the prefix."""
    init_file: str | None = field(default=None, metadata=OURS)
    """The adapter folder, hub name or safetensors file whose prefix, of as many virtual tokens on the same base model,
    initializes this one."""
    tokenizer_name_or_path: str | None = field(default=None, metadata=OURS)
    """Tokenizer of ``init_text``; by default the base model's."""
    layers: Layers = field(default=None, metadata=OURS)
    """Layers that get a prefix: their numbers, ``"first:N"`` or ``"last:N"``; by default all."""
    sites: list[Site] | None = field(default=None, metadata=OURS)
    """Attention sites that get a prefix of their own: encoder, decoder, cross; by default all that the model has."""
    token_dropout: Probability = field(default=0.0, metadata=OURS)
    """Probability with which a row of a training batch does not see a virtual token (arXiv 2507.04221)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for start, (source, remedy) in _NEEDS.items():
            is_given = getattr(self, source) is not None
            if self.init_weights == start and not is_given:
                raise ConfigError(f"init_weights = {start!r} needs {source}", remedy)
            if is_given and self.init_weights not in (None, start):
                raise ConfigError(f"init_weights = {self.init_weights!r} has no use for {source}", "drop one of them")
        if self.init_text is not None and self.init_file is not None:
            raise ConfigError("init_text and init_file are two starts", "drop one of them")
        if self.tokenizer_name_or_path is not None and self.init_text is None and not self.inference_mode:
            raise ConfigError("tokenizer_name_or_path is for init_text", "write one, or drop the tokenizer")

    @property
    def default_start(self) -> Start:
        """What the prefix starts from where no field says it."""
        return "vocabulary"

    def initialize(self, module: Any, backbone: Backbone) -> None:
        """See ``PeftConfig.initialize``.

        Raises:
            ConfigError: ``init_text`` has no tokens, or no tokenizer.
            CheckpointError: the prefix of ``init_file`` is missing, damaged or of another shape.
            AdapterMismatchError: it is of another base model, or for other layers.
        """
        given: Start | None = "text" if self.init_text else "file" if self.init_file else None
        start = self.init_weights or given or self.default_start
        if start == "zero":
            module.start_from(torch.zeros_like(module().detach()))
        elif start == "file":
            module.start_from(self._saved_states(module, backbone))
        elif start != "random":
            module.start_from(module.states_of_words(self._initial_ids(backbone), backbone))

    def _initial_ids(self, backbone: Backbone) -> Tensor:
        """[P] token ids to initialize from: those of ``init_text``, or of common words."""
        if self.init_text is None:
            return init.vocabulary_ids(backbone, self.num_virtual_tokens)
        tokenizer = init.load_tokenizer(self.tokenizer_name_or_path or backbone.model.name_or_path)
        return init.fill(init.text_ids(self.init_text, tokenizer)[0], self.num_virtual_tokens)

    def _saved_states(self, module: Any, backbone: Backbone) -> Tensor:
        """[P, W] the prefix of ``init_file``; [P, D] where the module's virtual tokens are at the input.

        Where the file has a prefix for more layers than this one, each layer starts from its own.
        """
        path, shape = self.init_file or "", module().shape
        prompt, is_own, fields = init.read_prompt(path, backbone)
        layers = list(getattr(module, "layers", ()))
        reached = layers
        if layers and not is_own:
            prompt, reached = from_peft_layout(prompt, self, layers)
        elif layers and fields is not None:
            sites = None if (names := fields.get("sites")) is None else [Site(name) for name in names]
            reached = choose_layers(backbone, fields.get("layers"), sites)
            if set(layers) <= set(reached) and prompt.shape[1:] == (sum(layer.width for layer in reached),):
                prompt, reached = joined_prefix(split_prefix(prompt, reached), layers), layers
        if reached != layers:
            raise AdapterMismatchError(
                f"the prefix in {path} is for other layers than this one", "set layers and sites as they are there"
            )
        init.check_shape(prompt, shape, path)
        return prompt


@dataclass(kw_only=True, eq=False)
class PeftPrefixConfig(KeyValueConfig):
    """Base of the configs of prefixes that PEFT has too."""

    shift_positions: bool = field(default=True, metadata=OURS)
    """Let the text start at position P, as in the paper and PEFT, instead of at 0."""

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        plain = self.shift_positions and self.layers is None and not backbone.is_encoder_decoder
        return plain and is_even(backbone)

    def from_peft(self, prompt: Tensor, module: Any) -> Tensor:
        """See ``PeftConfig.from_peft`` and ``from_peft_layout``.

        Where the first layer of a decoder gets no prefix, texts start at position 0.

        Raises:
            AdapterMismatchError: the config has other sites.
        """
        flat, layers = from_peft_layout(prompt, self, module.layers)
        if len(layers) < len(module.layers):
            self.layers = [layer.index for layer in layers]
            # transformers counts positions by the first layer's cache.
            self.shift_positions = self.shift_positions and layers[0] is module.layers[0]
            module.limit_to(layers, self)
        return flat

    @classmethod
    def implied_by_peft(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``PeftConfig.implied_by_peft``: in an encoder-decoder, only the decoder's self-attention has a prefix."""
        return {"sites": [Site.DECODER]} if values.get("num_transformer_submodules") == 2 else {}
