"""The inference form of an adapter: what requests need of it, in one file that loads in milliseconds.

An MLP or LSTM is dropped, and virtual tokens in front of a decoder's text become their keys and values, which don't
depend on what follows. Letters: P virtual tokens, D hidden size, W numbers of one virtual token in all layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from softtune import checkpoint, self_check
from softtune.adapter import Adapter
from softtune.adapter_context import computed_prompt
from softtune.backbone import AttentionLayer, Backbone, Place, model_session
from softtune.backbone.roles import BiasSlot
from softtune.errors import UnsupportedModelError
from softtune.methods import PeftConfig
from softtune.methods.kv_layout import composed, joined_prefix, split_prefix
from softtune.methods.prompt import GatedKeyValue, Prompt
from softtune.model import PeftModel

PROMPT_NAME = "prompt.safetensors"
GATED = ("key", "value", "gate")
"""Names of the parts of a ``GatedKeyValue`` in the file."""
ADDITION, SCALING, INPUT_SCALING = "addition.", "scaling.", "input_scaling."
"""What the keys of tensors begin with that belong to slots."""


def load_adapter(backbone: Backbone, folder: Path) -> Adapter:
    """Load a saved adapter for inference.

    Raises:
        CheckpointError: a file is missing, damaged or pickled.
        AdapterMismatchError: it was trained on another base model.
        UnsupportedModelError: it has prompts for several tasks, or the base model cannot take its method.
        ConfigError: its config has a key that softtune does not know.
    """
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = True
    if (config.num_prompt_tasks or 1) > 1:
        raise UnsupportedModelError(
            f"{folder} has prompts for {config.num_prompt_tasks} tasks, and a request names an adapter alone",
            "make each an adapter of its own by softtune.add_task_adapter, and save that",
        )
    checkpoint.check_base_model(folder, backbone)
    self_check.ensure(backbone, config, PeftModel.with_adapter)
    adapter = Adapter.new(config, backbone)
    checkpoint.load(folder, adapter)
    for part in (adapter.module, *adapter.heads.values()):
        part.eval().requires_grad_(False)
    return adapter


@torch.no_grad()
def export_prompt(backbone: Backbone, adapter: Adapter, *, as_kv: bool = True) -> Prompt:
    """Compute what an adapter contributes to a decoder's requests.

    Args:
        backbone: the base model.
        adapter: the adapter.
        as_kv: whether leading virtual tokens become keys and values; False where they stand within the text.

    Raises:
        UnsupportedModelError: it trains whole modules, which requests for other adapters share; or it combines vectors
            in front of the text with other parts, and layers have windows, which would end them.
    """
    if adapter.heads:
        raise UnsupportedModelError(
            f"the adapter has a {next(iter(adapter.heads))} of its own, beside which no other adapter writes",
            "train it without modules_to_save",
        )
    with model_session(backbone.model):
        prompt = computed_prompt(backbone, adapter, as_kv=as_kv)
    if as_kv and prompt.vectors is not None and not prompt.after_text and backbone.has_local_layers:
        raise UnsupportedModelError(
            f"virtual tokens beside other parts would leave the sight of layers of {type(backbone.model).__name__}",
            "leave the part with vectors out, a prefix stays in sight",
        )
    return prompt


def save_prompt(prompt: Prompt, backbone: Backbone, folder: Path) -> None:
    """Write an exported prompt into a folder."""
    layers = _layers(prompt, backbone)
    tensors = {f"memory.{_name(place)}": memory for place, memory in prompt.memories.items()}
    for place, gated in prompt.gated.items():
        tensors |= {f"gated.{_name(place)}.{part}": tensor for part, tensor in zip(GATED, gated, strict=True)}
    tensors |= {f"{ADDITION}{slot.name}": added for slot, added in prompt.additions}
    tensors |= {f"{_scaling_key(slot)}{slot.name}": factor for slot, factor in prompt.scalings}
    if prompt.vectors is not None:
        tensors["vectors"] = prompt.vectors
    if layers:
        tensors["prefix"] = joined_prefix(prompt.prefixes, layers)
    facts = {
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "layers": [backbone.attention_layers.index(layer) for layer in layers],
        "after_text": prompt.after_text,
        "shifts_positions": prompt.shifts_positions,
    }
    numbers = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(numbers, folder / PROMPT_NAME, {"prompt": json.dumps(facts)})


def load_prompt(folder: Path, backbone: Backbone, *, with_prefix: bool = True) -> Prompt:
    """Load an exported prompt from a folder; without its prefix where another component loads keys and values."""
    with safe_open(folder / PROMPT_NAME, "pt", device=str(backbone.device)) as opened:
        facts = json.loads(opened.metadata()["prompt"])
        names = [name for name in opened.keys() if with_prefix or name != "prefix"]  # noqa: SIM118
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in names}
    layers = [backbone.attention_layers[number] for number in facts["layers"]] if with_prefix else []
    acting = backbone.attention_layers if any(name.startswith(("memory.", "gated.")) for name in tensors) else []
    return Prompt(
        num_virtual_tokens=facts["num_virtual_tokens"],
        vectors=tensors.get("vectors"),
        prefixes=split_prefix(tensors["prefix"], layers) if layers else {},
        memories={a.place: tensors[key] for a in acting if (key := f"memory.{_name(a.place)}") in tensors},
        gated={
            a.place: GatedKeyValue(*(tensors[f"gated.{_name(a.place)}.{part}"] for part in GATED))
            for a in acting
            if f"gated.{_name(a.place)}.gate" in tensors
        },
        additions=_at_slots(tensors, ADDITION, backbone),
        scalings=_at_slots(tensors, SCALING, backbone) + _at_slots(tensors, INPUT_SCALING, backbone),
        after_text=facts["after_text"],
        shifts_positions=facts["shifts_positions"],
    )


def compose_prompts(folders: Sequence[Path], backbone: Backbone, folder: Path) -> None:
    """Write the exported prompts of several folders into another one, one prefix behind the other.

    Raises:
        AdapterError, AdapterMismatchError: see ``kv_layout.composed``.
    """
    save_prompt(composed([load_prompt(part, backbone) for part in folders]), backbone, folder)


def _name(place: Place) -> str:
    """An attention layer's name in the file."""
    site, index = place
    return f"{site.value}.{index}"


def _scaling_key(slot: BiasSlot) -> str:
    return INPUT_SCALING if slot.is_input else SCALING


def _at_slots(tensors: Mapping[str, Tensor], kind: str, backbone: Backbone) -> list[tuple[BiasSlot, Tensor]]:
    """The tensors whose keys begin with ``kind``, with the slots that the keys name."""
    names = {name: name.removeprefix(kind) for name in tensors if name.startswith(kind)}
    return [(backbone.slot(name, is_input=kind == INPUT_SCALING), tensors[key]) for key, name in names.items()]


def _layers(prompt: Prompt, backbone: Backbone) -> Sequence[AttentionLayer]:
    """The attention layers that have the prompt's prefix."""
    return [layer for layer in backbone.attention_layers if layer.place in prompt.prefixes]
