"""The model card in an adapter's folder: what the adapter is and how to load it, with metadata for the hub.

Internal.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from softtune.backbone import Backbone
from softtune.methods import PeftConfig

CARD_NAME = "README.md"
BEGIN, END = "<!-- softtune writes what is between here -->", "<!-- and here -->"
RESULTS_BEGIN, RESULTS_END = "<!-- softtune train writes what is between here -->", "<!-- and there -->"


def model_card(existing: Path, config: PeftConfig, backbone: Backbone, num_trained: int | None = None) -> ModelCard:
    """Create or update an adapter's model card. Text that others wrote into an existing card is kept.

    Args:
        existing: path of the card, which may exist already.
        config: the adapter's config, as it is saved.
        backbone: the base model.
        num_trained: how many values a method without virtual tokens trains.
    """
    card = ModelCard.load(existing) if existing.is_file() else ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n")
    data: Any = card.data
    data.library_name = "peft"
    data.base_model = config.base_model_name_or_path or ""
    data.tags = sorted({*(data.tags or []), f"base_model:adapter:{data.base_model}"})
    if config.task_type == "CAUSAL_LM":
        data.pipeline_tag = data.pipeline_tag or "text-generation"
    card.text = _with_block(card.text, BEGIN, _description(config, backbone, num_trained), END)
    return card


def with_results(existing: Path, text: str, name: str, results: Sequence[EvalResult]) -> ModelCard:
    """An adapter's model card with the results of its training, in Markdown and as the metadata that the hub shows.

    Args:
        existing: path of the card.
        text: the results in Markdown.
        name: the adapter's name, for the metadata.
        results: one for each metric; the metadata stays as it is without any.
    """
    card: ModelCard = ModelCard.load(existing)
    data: Any = card.data
    if results:
        data.model_name, data.eval_results = name, [*results]
    card.text = _with_block(card.text, RESULTS_BEGIN, text, RESULTS_END)
    return card


def _with_block(text: str, begin: str, block: str, end: str) -> str:
    """A card's text with a block between two markers in place of what was there, or at its end."""
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    parts = (before.strip(), f"{begin}\n{block}\n{end}", after.strip())
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def _description(config: PeftConfig, backbone: Backbone, num_trained: int | None) -> str:
    """Markdown that describes the adapter's config, and how to load it."""
    assert config.peft_type is not None
    tokens = getattr(config, "num_virtual_tokens", None)
    size = f", {tokens} virtual tokens" if tokens else f", {num_trained:,} trained values" if num_trained else ""
    facts = {
        "Base model": config.base_model_name_or_path or "not named",
        "Method": " ".join([config.peft_type.value, *_parts(config)]) + size,
        "Task": config.task_type.value if config.task_type else type(backbone.model).__name__,
        "Trained with": f"softtune {metadata.version('softtune')}",
    }
    also = "reads it too" if config.is_readable_by_peft(backbone) else "does not compute the same from it"
    return "\n".join(
        [
            f"# {config.peft_type.value} adapter",
            "",
            "Trained on a frozen base model, which it needs:",
            "",
            *(f"- {name}: {fact}" for name, fact in facts.items()),
            "",
            "```python",
            *_loading(config, backbone),
            "```",
            "",
            f"PEFT's `PeftModel` {also}.",
        ]
    )


def _parts(config: PeftConfig) -> list[str]:
    """The methods that a combined adapter has, in brackets; none of others."""
    names = [part.peft_type.value for part in getattr(config, "parts", ())]
    return [f"({' + '.join(names)})"] if names else []


def _loading(config: PeftConfig, backbone: Backbone) -> list[str]:
    """The lines of Python that load an adapter from its folder."""
    name, source = type(backbone.model).__name__, config.base_model_name_or_path or "the base model"
    head = f", num_labels={backbone.model.config.num_labels}" if config.task_type and config.task_type.has_head else ""
    return [
        f"from transformers import {name}",
        "from softtune import PeftModel",
        "",
        f'base = {name}.from_pretrained("{source}"{head})',
        'model = PeftModel.from_pretrained(base, "the folder of this file")',
    ]
