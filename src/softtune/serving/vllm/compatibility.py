"""Which adapters vLLM can serve: those with a prefix in every layer, or with vectors among the input embeddings."""

from __future__ import annotations

from pathlib import Path

from softtune import storage
from softtune.backbone import Backbone
from softtune.errors import UnsupportedModelError
from softtune.methods.kv_layout import is_even
from softtune.methods.prompt import Prompt
from softtune.serving import prompt_export


def bake_folder(backbone: Backbone, adapter: Path, folder: Path) -> int:
    """Write the prefix (keys and values) of a saved adapter into a new folder.

    Returns:
        P, the number of virtual tokens.

    Raises:
        SofttuneError: the adapter cannot be read, or does not fit the model.
        UnsupportedModelError: it has more than a prefix in front of the text.
    """
    prompt = prompt_export.export_prompt(backbone, prompt_export.load_adapter(backbone, adapter))
    check(prompt, backbone)
    if prompt.vectors is not None:
        raise UnsupportedModelError(f"{adapter} has vectors among the words", "serve it by softtune serve")
    with storage.staged(folder) as stage:
        prompt_export.save_prompt(prompt, backbone, stage)
    return prompt.num_virtual_tokens


def check(prompt: Prompt, backbone: Backbone) -> None:
    """Check that vLLM can serve an exported prompt.

    Raises:
        UnsupportedModelError: it cannot.
    """
    if obstacle := _obstacle(prompt, backbone):
        raise UnsupportedModelError(f"vLLM takes no adapter with {obstacle}", "serve it by the engine transformers")


def _obstacle(prompt: Prompt, backbone: Backbone) -> str | None:
    if prompt.additions:
        return "trained biases"
    if prompt.terms:
        return "terms outside of the softmax of attention"
    if prompt.vectors is not None and prompt.prefixes:
        return "both a prefix and vectors"
    if prompt.scalings:
        return "trained factors"
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
    return "a prefix in layers that see a part of the text" if backbone.has_local_layers else None
