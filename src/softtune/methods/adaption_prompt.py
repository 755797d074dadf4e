"""LLaMA-Adapter: Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
arXiv 2303.16199.

P trained vectors go through a layer's own projections of keys and values. The layer's queries attend to them by a
softmax of their own, and a gate, zero at first, scales what is added to the output of the text's own attention
(section 3.2): training starts from the base model's outputs. The paper has a gate for each head, as Diep et al. 2025,
"On Zero-Initialized Attention", arXiv 2502.03029, analyse it; PEFT has one for each layer. Letters: P virtual tokens,
D hidden size, H key/value heads, Q query heads, K and V sizes of a key and a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from softtune.backbone import AttentionLayer, Backbone, Place
from softtune.backbone.roles import KEY, VALUE, BiasSlot
from softtune.backbone.sharding import is_sharded
from softtune.errors import AdapterMismatchError, ConfigError, UnsupportedModelError
from softtune.methods.base import OURS, PeftConfig, PositiveInt
from softtune.methods.kv_layout import check_wrapper
from softtune.methods.prompt import GatedKeyValue, Prompt
from softtune.methods.targets import KEY_PREFIX
from softtune.peft_types import PeftType

PEFTS_MODELS = ("llama", "mistral")
"""Model types of which PEFT computes what the paper says."""


@dataclass(kw_only=True, eq=False)
class AdaptionPromptConfig(PeftConfig):
    """Config of LLaMA-Adapter.

    Raises:
        ConfigError: a value is out of range.
    """

    peft_type: PeftType = PeftType.ADAPTION_PROMPT
    learning_rate: ClassVar[float] = 1e-2
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = True
    tensor_names: ClassVar[tuple[str, ...]] = ("adaption_prompt", "adaption_gate")
    ways: ClassVar[tuple[str, ...]] = ("gate",)
    target_modules: str | None = None
    """Name of the attention module within a layer; by default all that the model has."""
    adapter_len: PositiveInt = 10
    """P, the number of virtual tokens of a layer, 10 as in the paper. PEFT has no default."""
    adapter_layers: PositiveInt | None = None
    """Number of layers that get virtual tokens, counted from the top; by default all. PEFT has no default."""
    modules_to_save: list[str] | None = field(default=None, metadata=OURS)
    """Further modules of the base model to train and save, which PEFT's config of this method lacks."""
    gate: Literal["layer", "head"] = field(default="layer", metadata=OURS)
    """Whether a layer has one gate, as in PEFT, or one for each query head, as in the paper."""

    def build(self, backbone: Backbone) -> AdaptionPrompt:
        """See ``PeftConfig.build``.

        Raises:
            ConfigError: there are not so many layers, or no such modules.
            UnsupportedModelError: the attention cannot be changed, its keys or values are no projections of the hidden
                states, or the base model is sharded.
        """
        check_wrapper(backbone)
        _check_whole(backbone)
        names = _names(backbone)
        layers = self._layers([(a, names[a.place]) for a in backbone.attention_layers])
        slots = backbone.role_slots((KEY, VALUE))
        projections = [Projection.from_layer(backbone, layer, names[layer.place], slots) for layer in layers]
        heads = [layer.query_heads if self.gate == "head" else 1 for layer in layers]
        is_pefts = self.is_readable_by_peft(backbone)
        if is_pefts:
            self.target_modules, self.adapter_layers = _last(projections[0].name), len(layers)
        return AdaptionPrompt(backbone, projections, heads, self.adapter_len, is_pefts=is_pefts)

    def _layers(self, named: Sequence[tuple[AttentionLayer, str]]) -> list[AttentionLayer]:
        """The chosen ones of the attention layers, which come with their modules' paths: the top ones at each site."""
        layers = [a for a, name in named if self.target_modules in (None, _last(name))]
        if not layers:
            raise ConfigError(f"target_modules = {self.target_modules!r} names no attention module", "leave it out")
        chosen = []
        for site in dict.fromkeys(layer.site for layer in layers):
            at_site = [layer for layer in layers if layer.site is site]
            count = self.adapter_layers or len(at_site)
            if count > len(at_site):
                raise ConfigError(f"adapter_layers = {count}, there are {len(at_site)}", "choose fewer")
            chosen += at_site[len(at_site) - count :]
        return chosen

    def initialize(self, module: AdaptionPrompt, backbone: Backbone) -> None:
        """See ``PeftConfig.initialize``: vectors from N(0, 1), as in the paper's code; the gates are zero."""
        for vectors in module.vectors:
            nn.init.normal_(vectors)

    def is_readable_by_peft(self, backbone: Backbone) -> bool:
        return backbone.text_config.model_type in PEFTS_MODELS and self.gate == "layer"

    def to_saved(self, state: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
        """See ``PeftConfig.to_saved``: under PEFT's names where PEFT computes the same, else under other ones."""
        return {f"{_key_prefix(module)}{name}": tensor for name, tensor in state.items()}

    def from_saved(self, state: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
        """See ``PeftConfig.from_saved``.

        Raises:
            AdapterMismatchError: PEFT saved it for a model for which it computes something else.
        """
        if not module.is_pefts and any(name.startswith(KEY_PREFIX) for name in state):
            raise AdapterMismatchError(
                "PEFT adds this adapter's prompt behind the output projection of attention, not in front of it",
                "train it anew",
            )
        return {name.removeprefix(_key_prefix(module)): tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class Projection:
    """The frozen projections of one attention layer's keys and values."""

    name: str
    """The attention module's path in the base model."""
    layer: AttentionLayer
    size: int
    """D, the size of what they project."""
    modules: tuple[nn.Module, nn.Module]
    slots: tuple[BiasSlot, BiasSlot]
    """The outputs that are keys and values."""

    @classmethod
    def from_layer(cls, backbone: Backbone, layer: AttentionLayer, name: str, slots: Sequence[BiasSlot]) -> Projection:
        """Find the projections of a layer.

        Args:
            backbone: the base model.
            layer: the layer.
            name: its attention module's path.
            slots: the outputs of all modules that compute keys or values.

        Raises:
            UnsupportedModelError: its keys or values are no projections of the hidden states.
        """
        own = {slot.role: slot for slot in slots if slot.module.startswith(f"{name}.")}
        widths = {KEY: layer.heads * layer.key_size, VALUE: layer.heads * layer.value_size}
        if any(role not in own or own[role].width != width for role, width in widths.items()):
            raise UnsupportedModelError(
                f"keys and values of {type(backbone.model).__name__} are no projections of its hidden states",
                "use PrefixTuningConfig",
            )
        found = own[KEY], own[VALUE]
        key, value = (backbone.model.get_submodule(slot.module) for slot in found)
        size = backbone.slot(found[0].module, is_input=True).width
        return cls(name, layer, size, (key, value), found)

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, P, K] and values [H, P, V] of vectors [P, D]."""
        key, value = (self._heads(*pair, vectors) for pair in zip(self.modules, self.slots, strict=True))
        return key, value

    def _heads(self, module: nn.Module, slot: BiasSlot, vectors: Tensor) -> Tensor:
        weight: Any = module.weight
        dtype = weight.dtype if weight.is_floating_point() else vectors.dtype
        output: Tensor = module(vectors[None].to(dtype))[0]
        index = slot.index_on(output.device)
        output = output if index is None else output.index_select(-1, index)
        return output.view(len(vectors), self.layer.heads, -1).transpose(0, 1)


class AdaptionPrompt(nn.Module):
    """The trained vectors and gates.

    Args:
        backbone: the base model.
        projections: the frozen projections of each layer that gets virtual tokens.
        gates: the number of gates of each layer.
        adapter_len: P.
        is_pefts: whether PEFT computes the same.
    """

    def __init__(
        self,
        backbone: Backbone,
        projections: Sequence[Projection],
        gates: Sequence[int],
        adapter_len: int,
        *,
        is_pefts: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projections = list(projections)
        self.is_pefts = is_pefts
        self.vectors = nn.ParameterList(torch.zeros(adapter_len, p.size) for p in projections)
        self.gates = nn.ParameterList(torch.zeros(count) for count in gates)

    def prompt(self) -> Prompt:
        """See ``Method.prompt``.

        Raises:
            UnsupportedModelError: the base model's weights are sharded, so that the projections lack theirs here.
        """
        _check_whole(self.backbone)
        gated: dict[Place, GatedKeyValue] = {}
        for projection, vectors, gate in zip(self.projections, self.vectors, self.gates, strict=True):
            gated[projection.layer.place] = GatedKeyValue(*projection(vectors), gate)
        return Prompt(gated=gated)

    def inference_state(self) -> dict[str, Tensor]:
        state = {}
        for projection, vectors, gate in zip(self.projections, self.vectors, self.gates, strict=True):
            state[f"{projection.name}.adaption_prompt"] = vectors.detach()[None]
            state[f"{projection.name}.adaption_gate"] = gate.detach()
        return state


def _key_prefix(module: AdaptionPrompt) -> str:
    """What stands in front of the names of a module's tensors in files."""
    return KEY_PREFIX if module.is_pefts else "softtune."


def _check_whole(backbone: Backbone) -> None:
    """Check that a base model's projections can be called outside of their layers.

    Raises:
        UnsupportedModelError: its weights are sharded, and a layer's are gathered for its own ``forward`` alone.
    """
    if is_sharded(backbone.model):
        raise UnsupportedModelError(
            "LLaMA-Adapter calls projections of the base model, whose weights are sharded, outside of their layers",
            "use PrefixTuningConfig, or leave fsdp out",
        )


def _names(backbone: Backbone) -> dict[Place, str]:
    """The paths of the attention modules in the base model."""
    names = {module: name for name, module in backbone.model.named_modules()}
    return {layer.place: names[layer.module] for layer in backbone.attention_layers if layer.module is not None}


def _last(name: str) -> str:
    """The last part of a module's path."""
    return name.rpartition(".")[2]
