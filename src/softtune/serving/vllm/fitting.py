"""Which adapters vLLM can take: keys and values in front of a text in every layer, or vectors among its words."""

from __future__ import annotations

from pathlib import Path

from softtune import storage
from softtune.backbone import Backbone
from softtune.errors import UnsupportedModelError
from softtune.methods.base import Prompt
from softtune.methods.flat import is_even
from softtune.serving import baking


def bake_folder(backbone: Backbone, adapter: Path, folder: Path) -> int:
    """Write the keys and values of a saved adapter into a new folder.

    Returns:
        P, its virtual tokens.

    Raises:
        SofttuneError: the adapter cannot be read, or does not fit the model.
        UnsupportedModelError: it has more than keys and values in front of a text.
    """
    prompt = baking.bake(backbone, baking.load(backbone, adapter))
    check(prompt, backbone)
    if prompt.vectors is not None:
        raise UnsupportedModelError(f"{adapter} has vectors among the words: serve it by softtune serve")
    with storage.staged(folder) as stage:
        baking.save(prompt, backbone, stage)
    return prompt.num_virtual_tokens


def check(prompt: Prompt, backbone: Backbone) -> None:
    """Raise UnsupportedModelError where vLLM cannot give a baked prompt to a text."""
    if obstacle := _obstacle(prompt, backbone):
        raise UnsupportedModelError(f"vLLM takes no adapter with {obstacle}: serve it by the engine transformers")


def _obstacle(prompt: Prompt, backbone: Backbone) -> str | None:
    if prompt.additions:
        return "trained biases"
    if prompt.vectors is not None:
        return None if backbone.has_plain_words else "vectors beside words that the model scales"
    if prompt.after_text:
        return "a prefix behind the text"
    if not prompt.shifts_positions:
        return "a prefix that takes no positions"
    if len(prompt.prefixes) < (backbone.depth or 0):
        return "a prefix in some layers alone"
    if not is_even(backbone):
        return "a prefix in layers that differ in size"
    return "a prefix in layers that see a part of the text" if _is_local(backbone) else None


def _is_local(backbone: Backbone) -> bool:
    """Whether a layer's tokens see the last ones before them alone."""
    kinds = getattr(backbone.text_config, "layer_types", None)
    if kinds is not None:
        return {*kinds} != {"full_attention"}
    return getattr(backbone.text_config, "sliding_window", None) is not None
