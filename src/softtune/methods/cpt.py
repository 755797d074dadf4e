"""CPT: Blau et al. 2024, "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods", arXiv
2410.17222.

The virtual tokens are a text of demonstrations. Its token embeddings are frozen, and each has a trained change, which
projected gradient descent keeps within a ball. Every token has a type, which is the residue by 4 of a positive number:
1 input template, 2 input, 3 output template, 0 label; demonstrations of several examples go on counting. Labels are not
changed, but predicted: they are part of the loss, as are those of the input. Letters: B rows, T tokens, P virtual
tokens, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from softtune.backbone import Backbone
from softtune.errors import ConfigError, UnsupportedModelError
from softtune.methods import initialization as init
from softtune.methods.base import PositiveInt, PromptLearningConfig
from softtune.methods.prompt import IGNORED, Prompt, Supervision
from softtune.methods.prompt_tuning import settle_input
from softtune.peft_types import PeftType, TaskType

KINDS = 4
"""Number of token types that repeat."""
INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE, LABEL = 1, 2, 3, 0
"""Kinds of tokens: their type's residue by ``KINDS``. A type of 0 has no kind."""
REFERENCE_DIM = 2048
"""The embedding size for which the radii are given; those of others grow with its root."""
UNCHANGED = 1e-10
"""The radius for tokens that are not trained, as in PEFT."""
SLACK = 1e-6
"""Share by which a change may exceed its radius, which rounding needs: what was projected is not projected again."""

Count = Annotated[int, Field(ge=0)]
Radius = Annotated[float, Field(ge=0)]


@dataclass(kw_only=True, eq=False)
class CPTConfig(PromptLearningConfig):
    """Config of context-aware prompt tuning, for causal language models.

    Raises:
        ConfigError: a value is out of range, the task is another, or there is not one type for each token.
    """

    peft_type: PeftType = PeftType.CPT
    learning_rate: ClassVar[float] = 1e-3
    has_own_loss: ClassVar[bool] = True
    is_for_any_rows: ClassVar[bool] = False
    num_virtual_tokens: PositiveInt | None = None  # type: ignore[assignment]
    """P: the number of ``cpt_token_ids``, which another value does not change."""
    cpt_token_ids: list[Count] | None = None
    """The demonstrations' token ids; by default ``[0]``."""
    cpt_mask: list[int] | None = None
    """Without effect, here as in PEFT; by default ones."""
    cpt_tokens_type_mask: list[Count] | None = None
    """Each token's type; by default ones."""
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    """Whether all labels count alike, or those of an example by ``opt_loss_decay_factor`` less than the next one's."""
    opt_loss_decay_factor: float = 1.0
    """What a label's weight is multiplied with for each example behind it."""
    opt_projection_epsilon: Radius = 0.1
    """Radius of the ball of an input token's change, where embeddings have 2048 numbers."""
    opt_projection_format_epsilon: Radius = 0.1
    """The same for a token of a template."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer that the ids are of, as a note."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type is not TaskType.CAUSAL_LM:
            raise ConfigError("CPTConfig only supports task_type = CAUSAL_LM", "set it, or use PromptTuningConfig")
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        size = len(self.cpt_token_ids)
        ones = [1] * size
        self.cpt_mask, self.cpt_tokens_type_mask = self.cpt_mask or ones, self.cpt_tokens_type_mask or ones
        if not 0 < size == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ConfigError(
                "cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length, of at least 1",
                f"they have {size}, {len(self.cpt_mask)} and {len(self.cpt_tokens_type_mask)}",
            )
        if not self.inference_mode:
            self._leave_out("without effect, and left out", cpt_mask=ones)
        if self.num_virtual_tokens not in (None, size):
            self._leave_out("left out, since there are as many as cpt_token_ids", num_virtual_tokens=size)
        self.num_virtual_tokens = size

    def probing(self) -> CPTConfig:
        """See ``PeftConfig.probing``."""
        return CPTConfig(task_type=self.task_type, cpt_token_ids=[1, 2], cpt_tokens_type_mask=[1, 2])

    def build(self, backbone: Backbone) -> CPTEmbedding:
        """See ``PeftConfig.build``.

        Raises:
            UnsupportedModelError: the base model is no causal language model, or takes no vectors.
            ConfigError: a token id is beyond its vocabulary.
        """
        if not backbone.continues_text:
            raise UnsupportedModelError(
                f"{type(backbone.model).__name__} is no causal language model, which CPT is for",
                "use PromptTuningConfig",
            )
        settle_input(self, backbone)
        ids = self.cpt_token_ids or []
        if max(ids) >= backbone.embedding.num_embeddings:
            raise ConfigError(
                f"cpt_token_ids has {max(ids)}, the vocabulary {backbone.embedding.num_embeddings} entries",
                "take them from the base model's tokenizer",
            )
        module = CPTEmbedding(self)
        if not self.inference_mode:
            module.embedding.weight.data = init.word_vectors(backbone, torch.tensor(ids))
        return module

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        return backbone.has_plain_words

    def recovered(self, module: CPTEmbedding, inference_state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``PeftConfig.recovered``: the tokens' embeddings are known, so that the rest is the change."""
        words = module.embedding.weight
        change = inference_state[init.PROMPT_KEY].to(words) - words
        return {"embedding.weight": words, "delta_embedding.weight": change}


class CPTEmbedding(nn.Module):
    """Frozen token embeddings and their trained changes.

    Each time that the prompt is made in training, the changes are projected in place, as projected gradient descent
    does behind each step; doing it twice changes nothing. Elsewhere the prompt is projected, and the changes stay.

    Args:
        config: the tokens and their types, ``token_dim`` and the ``opt_*`` fields; in inference mode there are no
            changes.
        word_embeddings: unused, for PEFT's signature; ``CPTConfig.build`` looks the token embeddings up.
    """

    radius: Tensor
    is_trained: Tensor

    def __init__(self, config: CPTConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        ids, types, dim = config.cpt_token_ids, config.cpt_tokens_type_mask, config.token_dim
        assert ids
        assert types
        assert dim
        self.decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
        self.token_ids, self.types = tuple(ids), tuple(types)
        self.embedding: nn.Embedding | _Frozen = _Frozen(len(ids), dim)
        self.delta_embedding: nn.Embedding | None = None
        if config.inference_mode:
            self.embedding = nn.Embedding(len(ids), dim)
            return
        kinds = [kind % KINDS if kind else LABEL for kind in types]  # what has no kind is no more trained than a label
        scale = (dim / REFERENCE_DIM) ** 0.5
        formats, inputs = config.opt_projection_format_epsilon * scale, config.opt_projection_epsilon * scale
        radii = {INPUT_TEMPLATE: formats, OUTPUT_TEMPLATE: formats, INPUT: inputs}
        self.register_buffer("radius", _column([radii.get(kind, UNCHANGED) for kind in kinds]), persistent=False)
        self.register_buffer("is_trained", _column([float(kind in radii) for kind in kinds]), persistent=False)
        self.delta_embedding = nn.Embedding(len(ids), dim)
        nn.init.zeros_(self.delta_embedding.weight)

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Vectors [..., D] of virtual tokens [...]; [P, D] of all of them by default."""
        vectors = self.embedding.weight
        if self.delta_embedding is not None:
            vectors = vectors + self._change(self.delta_embedding.weight)
        return vectors if indices is None else vectors[indices]

    def _change(self, delta: Tensor) -> Tensor:
        """[P, D] changes within their balls. Gradients reach those of trained tokens as if nothing were projected."""
        projected = self.projected(delta.detach())
        if self.training:
            delta.data.copy_(projected)
        return projected + self.is_trained * (delta - delta.detach())

    def projected(self, delta: Tensor) -> Tensor:
        """[P, D] the changes, those that are longer than their radius cut to it."""
        norm = delta.norm(dim=1, keepdim=True)
        return torch.where(norm > self.radius * (1 + SLACK), delta * (self.radius / norm), delta)

    def prompt(self) -> Prompt:
        vectors = self()
        return Prompt(num_virtual_tokens=len(vectors), vectors=vectors)

    def inference_state(self) -> dict[str, Tensor]:
        return {init.PROMPT_KEY: self().detach()}

    def supervision(self, labels: Tensor, input_type_mask: Tensor | None) -> Supervision:
        """Which tokens the loss is over, and their weights.

        Args:
            labels: [B, T] the input's.
            input_type_mask: [B, T] types of the input, which go on counting behind the prompt's; by default all are
                labels of one example.
        """
        types = torch.full_like(labels, KINDS) if input_type_mask is None else input_type_mask
        own = torch.tensor(self.types, device=labels.device)
        ids = torch.tensor(self.token_ids, device=labels.device)
        own[0] = 0  # nothing predicts it
        behind, examples = _examples_behind(_labels_of(types))
        own_behind, _ = _examples_behind(_labels_of(own)[None])
        return Supervision(
            labels=labels.masked_fill(_labels_of(types) == 0, IGNORED),
            weights=self.decay**behind,
            prompt_labels=ids.masked_fill(_labels_of(own) == 0, IGNORED),
            prompt_weights=self.decay ** (own_behind + examples),
        )


class _Frozen(nn.Module):
    """Vectors [P, D] that no ``requires_grad_`` trains, by the name that an embedding's have."""

    weight: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(size, dim))


def _column(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers)[:, None]


def _labels_of(types: Tensor) -> Tensor:
    """The types of labels, and 0 for all others."""
    return torch.where(types % KINDS == LABEL, types.clamp(min=0), 0)


def _examples_behind(labels: Tensor) -> tuple[Tensor, Tensor]:
    """For label types [B, T], the number of greater ones in the same row [B, T]; and how many each row has [B, 1]."""
    kinds = labels.unique()  # ascending
    kinds = kinds[kinds > 0]
    has = (labels[:, :, None] == kinds).any(dim=1).long()
    total = has.sum(dim=1, keepdim=True)
    up_to = torch.cat([torch.zeros_like(total), has.cumsum(dim=1)], dim=1)
    return total - up_to.gather(1, torch.searchsorted(kinds, labels, right=True)), total
