"""Prompt tuning: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.

P trained vectors among the input embeddings, nothing in the layers; in an encoder-decoder on the encoder's side only.
Letters: P virtual tokens, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softtune.backbone import Backbone
from softtune.errors import ConfigError, UnsupportedModelError
from softtune.methods import initialization as init
from softtune.methods.base import OURS, Placement, PromptLearningConfig
from softtune.methods.prompt import Prompt
from softtune.peft_types import PeftType


class PromptTuningInit(str, Enum):
    """How the virtual tokens are initialized."""

    TEXT = "TEXT"
    """The token embeddings of ``prompt_tuning_init_text``."""
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    """A sample of the 5000 most common vocabulary entries: the first ones. Special and unused entries among them, such
    as BERT's first thousand, are left out if ``tokenizer_name_or_path`` names a tokenizer, which is needed to tell
    them."""
    RANDOM = "RANDOM"
    """Uniform in ±0.5."""
    LABELS = "LABELS"
    """The mean embedding of each class label's sub-tokens, then a vocabulary sample."""
    FILE = "FILE"
    """The virtual tokens saved in ``prompt_tuning_init_file``, of another task (SPoT: Vu et al. 2022, arXiv 2110.07904)
    or of P-tuning."""


_NEEDS = {
    PromptTuningInit.TEXT: "prompt_tuning_init_text",
    PromptTuningInit.LABELS: "prompt_tuning_init_labels",
    PromptTuningInit.FILE: "prompt_tuning_init_file",
}
_OURS = ("prompt_tuning_init_labels", "prompt_tuning_init_file")
"""Fields of ``_NEEDS`` that PEFT lacks. Setting an unused one is an error, whereas PEFT ignores its own."""


@dataclass(kw_only=True, eq=False)
class PromptTuningConfig(PromptLearningConfig):
    """Config of prompt tuning.

    Raises:
        ConfigError: a value is out of range, or the chosen initialization lacks its text, labels or file, or does not
            use one that is given.
    """

    peft_type: PeftType = PeftType.PROMPT_TUNING
    learning_rate: ClassVar[float] = 3e-2
    takes_placed_tokens: ClassVar[bool] = True
    prompt_tuning_init: PromptTuningInit = PromptTuningInit.SAMPLE_VOCAB
    """How the virtual tokens are initialized. PEFT's default is RANDOM, which the paper finds worse on small models."""
    prompt_tuning_init_text: str | None = None
    """The text for TEXT; its tokens are cut or repeated to ``num_virtual_tokens``."""
    prompt_tuning_init_labels: list[str] | None = field(default=None, metadata=OURS)
    """The class labels for LABELS, as text."""
    prompt_tuning_init_file: str | None = field(default=None, metadata=OURS)
    """The adapter folder, hub name or safetensors file for FILE."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer for the text or labels, by default the base model's; for a vocabulary sample, by default none."""
    tokenizer_kwargs: dict[str, Any] | None = None
    """Arguments for ``AutoTokenizer.from_pretrained``."""
    placement: Placement = field(default="prefix", metadata=OURS)
    """Whether the virtual tokens precede or follow the text."""

    ways: ClassVar[tuple[str, ...]] = ("placement",)

    def __post_init__(self) -> None:
        super().__post_init__()
        start, needed = self.prompt_tuning_init, _NEEDS.get(self.prompt_tuning_init)
        if needed and not getattr(self, needed):
            raise ConfigError(f"prompt_tuning_init = {start.value} needs {needed}", "set it")
        if start is not PromptTuningInit.TEXT and not self.inference_mode:
            reason = f"for prompt_tuning_init = TEXT, and left out: {start.value} has no use for it"
            self._leave_out(reason, prompt_tuning_init_text=None)
        unused = [name for name in _OURS if name != needed and getattr(self, name)]
        if self.tokenizer_kwargs and start not in (PromptTuningInit.TEXT, PromptTuningInit.LABELS):
            unused.append("tokenizer_kwargs")
        if unused:
            raise ConfigError(f"prompt_tuning_init = {start.value} has no use for {unused[0]}", "drop one of them")

    def build(self, backbone: Backbone) -> PromptEmbedding:
        """See ``PeftConfig.build``."""
        settle_input(self, backbone)
        return PromptEmbedding(self)

    def initialize(self, module: PromptEmbedding, backbone: Backbone) -> None:
        """See ``PeftConfig.initialize``.

        Raises:
            CheckpointError: the prompt of FILE is missing, damaged or of another shape.
            AdapterMismatchError: it is of another base model.
            ConfigError: the text or a label has no tokens, or no tokenizer.
        """
        module.start_from(self._start(backbone))

    def _start(self, backbone: Backbone) -> Tensor:
        size, dim = self.num_virtual_tokens, backbone.embedding.embedding_dim
        match self.prompt_tuning_init:
            case PromptTuningInit.RANDOM:
                return init.uniform(size, dim)
            case PromptTuningInit.SAMPLE_VOCAB:
                tokenizer = self._tokenizer(backbone) if self.tokenizer_name_or_path else None
                return init.word_vectors(backbone, init.vocabulary_ids(backbone, size, tokenizer))
            case PromptTuningInit.TEXT:
                (ids,) = init.text_ids(self.prompt_tuning_init_text or "", self._tokenizer(backbone))
                return init.word_vectors(backbone, init.fill(ids, size))
            case PromptTuningInit.LABELS:
                labels = self.prompt_tuning_init_labels or []
                return init.label_vectors(backbone, labels, size, self._tokenizer(backbone))
            case PromptTuningInit.FILE:
                return init.from_file(self.prompt_tuning_init_file or "", (size, dim), backbone)

    def _tokenizer(self, backbone: Backbone) -> PreTrainedTokenizerBase:
        return init.load_tokenizer(self.tokenizer_name_or_path or backbone.model.name_or_path, self.tokenizer_kwargs)

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        return self.placement == "prefix" and backbone.has_plain_words

    @classmethod
    def implied_by_peft(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """See ``PeftConfig.implied_by_peft``: PEFT reads the text for TEXT only."""
        return {} if values.get("prompt_tuning_init") == "TEXT" else {"prompt_tuning_init_text": None}


class PromptEmbedding(nn.Module):
    """The trained virtual tokens.

    Args:
        config: ``num_virtual_tokens``, ``token_dim`` and ``placement``.
        word_embeddings: unused, for PEFT's signature; ``PromptTuningConfig.initialize`` sets the initial values.
    """

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        assert config.token_dim
        self.after_text = config.placement == "suffix"
        self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Vectors [..., D] of virtual tokens [...]; [P, D] of all of them by default."""
        vectors: Tensor = self.embedding.weight if indices is None else self.embedding(indices)
        return vectors

    def states_of_words(self, input_ids: Tensor, backbone: Backbone) -> Tensor:
        """[P, D] input embeddings of token ids [P]."""
        return init.word_vectors(backbone, input_ids)

    def start_from(self, vectors: Tensor) -> None:
        """Initialize the virtual tokens with the vectors [P, D]."""
        self.embedding.weight.data.copy_(vectors)

    def prompt(self) -> Prompt:
        vectors = self()
        return Prompt(num_virtual_tokens=len(vectors), vectors=vectors, after_text=self.after_text)

    def inference_state(self) -> dict[str, Tensor]:
        return {init.PROMPT_KEY: self.embedding.weight.detach()}


def check_vectors(backbone: Backbone) -> None:
    """Check that vectors can take the place of token embeddings.

    Raises:
        UnsupportedModelError: the base model reads more of its token ids than their embeddings.
    """
    if not backbone.takes_vectors:
        raise UnsupportedModelError(
            f"{type(backbone.model).__name__} reads more off its words than their vectors",
            "use PrefixTuningConfig, PTuningV2Config or BitFitConfig",
        )


def settle_input(config: PromptLearningConfig, backbone: Backbone) -> None:
    """Fill in PEFT's size fields for virtual tokens at the input.

    Raises:
        UnsupportedModelError: vectors cannot take the place of token embeddings.
    """
    check_vectors(backbone)
    text = backbone.text_config
    config.settle(
        token_dim=backbone.embedding.embedding_dim,
        num_attention_heads=getattr(text, "num_attention_heads", None),
        num_layers=getattr(text, "num_hidden_layers", None),
    )
    config.num_transformer_submodules = config.num_transformer_submodules or 1
