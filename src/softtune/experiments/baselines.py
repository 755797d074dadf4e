"""Baselines to compare soft prompts with: full fine-tuning, the last layers, bottleneck adapters, and PEFT's LoRA.

Each changes the base model itself, so every run loads its own copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from softtune.backbone import Backbone
from softtune.backbone.roles import ATTENTION_OUTPUT, OUTPUT
from softtune.errors import ConfigError, UnsupportedModelError

LAST_LAYERS = 2
BOTTLENECK = 64
"""Features of a bottleneck; Houlsby et al. 2019 try 8 to 256."""
RANK = 8
"""LoRA's default rank, which is PEFT's."""
ALL_LINEAR = "all-linear"
"""LoRA's default targets: PEFT's name for all linear layers but the output's."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A way to fine-tune a base model."""

    prepare: Callable[..., None]
    """Makes parameters of a frozen model trainable, its heads included, and adds the baseline's modules. Takes the
    model, and the options by name."""
    learning_rate: float
    """Peak learning rate."""
    options: tuple[str, ...] = ()
    """Names of the options."""


class Bottleneck(nn.Module):
    """The bottleneck adapter of Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, section 2.1: down
    projection, nonlinearity, up projection, and a residual connection. It is initialized to the identity.

    Args:
        width: features of the input [..., width].
        size: features of the bottleneck.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states: Tensor) -> Tensor:
        """[..., width]"""
        changed: Tensor = self.up(gelu(self.down(states.float()))).to(states.dtype)  # the bottleneck stays in fp32
        return states + changed


def train_all(model: PreTrainedModel) -> None:
    """Full fine-tuning."""
    model.requires_grad_(True)


def train_last_layers(model: PreTrainedModel) -> None:
    """The last two layers of each stack, and the head."""
    backbone = Backbone.shared(model)
    for stack in backbone.stacks:
        for layer in stack.layers[-LAST_LAYERS:]:
            layer.requires_grad_(True)
    _train_heads(backbone)


def train_head(model: PreTrainedModel) -> None:
    """The head alone, on the hidden states of the frozen model.

    Raises:
        UnsupportedModelError: the model has no head of its own.
    """
    backbone = Backbone.shared(model)
    if not backbone.head_names:
        raise UnsupportedModelError(f"{type(model).__name__} has no head to train", "leave this baseline out")
    _train_heads(backbone)


def add_bottlenecks(model: PreTrainedModel) -> None:
    """A bottleneck after the attention and after the feed-forward block of every layer, the norms, and the head.

    Raises:
        UnsupportedModelError: the modules of the model's layers have unknown names.
    """
    backbone = Backbone.shared(model)
    slots = backbone.bias_slots()
    places = [slot for slot in slots if slot.role in (ATTENTION_OUTPUT, OUTPUT)]
    if not places:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layers that bottlenecks are known to fit into", "leave this baseline out"
        )
    for slot in places:
        module = model.get_submodule(slot.module)
        module.add_module("bottleneck", Bottleneck(slot.width, BOTTLENECK).to(model.device))
        module.register_forward_hook(_through_bottleneck)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.requires_grad_(True)
    _train_heads(backbone)


def add_lora(model: PreTrainedModel, *, rank: int = RANK, targets: str | Sequence[str] = ALL_LINEAR) -> None:
    """PEFT's LoRA, and the head: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models.

    Args:
        model: the frozen base model.
        rank: features between the two matrices of a layer.
        targets: PEFT's ``target_modules``: a list of names, a regular expression, or all linear layers.

    Raises:
        ConfigError: PEFT is not installed, or the rank or the targets do not fit the model.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "the baseline lora comes with the package peft", "pip install peft, or leave it out"
        ) from error
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"the baseline lora has rank {rank!r}", "name a whole number of 1 or more")
    heads = Backbone.shared(model).head_names
    names = targets if isinstance(targets, str) else list(targets)
    try:
        peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=names, modules_to_save=heads or None))
    except ValueError as error:
        what = f"the baseline lora with targets {targets!r} does not fit {type(model).__name__}"
        raise ConfigError(what, f"name other modules, or {ALL_LINEAR}") from error


BASELINES = {
    "full": Baseline(prepare=train_all, learning_rate=5e-5),
    "head": Baseline(prepare=train_head, learning_rate=1e-3),
    "last-layers": Baseline(prepare=train_last_layers, learning_rate=1e-4),
    "bottleneck": Baseline(prepare=add_bottlenecks, learning_rate=1e-3),
    "lora": Baseline(prepare=add_lora, learning_rate=1e-3, options=("rank", "targets")),
}


def _through_bottleneck(module: Any, inputs: Any, output: Tensor) -> Tensor:
    changed: Tensor = module.bottleneck(output)
    return changed


def _train_heads(backbone: Backbone) -> None:
    for name in backbone.head_names:
        backbone.model.get_submodule(name).requires_grad_(True)
