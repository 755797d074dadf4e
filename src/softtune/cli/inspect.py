"""``softtune inspect``: show an adapter's config, its sizes and its virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softtune import checkpoint
from softtune.backbone import Backbone, Site
from softtune.cli.console import console, quiet, show_pairs
from softtune.cli.flags import with_load_flags
from softtune.cli.loading import check_single, load_adapter
from softtune.evaluation.inspection import deviations, mean_changes, nearest_words, prefix_norms, term_sizes
from softtune.formatting import in_units
from softtune.methods import PeftConfig
from softtune.methods.prompt import KeyValue
from softtune.training.recipe import check_finished

BIASES, FACTORS = "Mean absolute change of the biases", "Mean distance of the factors from 1"
NEIGHBOURS = 5
"""Number of nearest vocabulary entries to show for each virtual token."""


@with_load_flags
def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    model: Annotated[str | None, typer.Option(help="Base model, if it is elsewhere now.")] = None,
    *,
    load: Mapping[str, Any],
) -> None:
    """Show an adapter's config and sizes, and the words nearest to its virtual tokens, or norms by layer."""
    quiet()
    check_finished(adapter)
    check_single(adapter)
    config = PeftConfig.from_pretrained(adapter)
    weights = checkpoint.weights(adapter)
    loaded, tokenizer = load_adapter(adapter, model, config, load)
    numbers = sum(tensor.numel() for tensor in weights.values())
    files = sorted(path for path in adapter.glob("*") if path.is_file())
    show_pairs("Config", [(k, str(v)) for k, v in config.to_dict().items() if v is not None])
    show_pairs("Tensors", [(name, " x ".join(map(str, tensor.shape))) for name, tensor in weights.items()])
    show_pairs(f"Files ({numbers:,} parameters)", [(path.name, in_units(path.stat().st_size)) for path in files])
    if (config.num_prompt_tasks or 1) > 1:
        console.print(f"The prompt of task 0, of {config.num_prompt_tasks}:")
    prompt = loaded.adapter(loaded.active_adapter).of_task(0).prompt()
    if prompt.vectors is not None:
        _show_words(loaded.backbone, prompt.vectors, tokenizer)
    if prompt.prefixes:
        _show_norms(prompt.prefixes)
    if sizes := term_sizes(prompt):
        _show_terms(sizes)
    for title, changes in ((BIASES, prompt.additions), (FACTORS, deviations(prompt.scalings))):
        if by_role := mean_changes(changes):
            show_pairs(title, [(role, f"{c:.2e}") for role, c in by_role.items()])


def _show_words(backbone: Backbone, vectors: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    table = Table("virtual token", "norm", "nearest vocabulary entries (cosine)", title="Words", title_justify="left")
    ids, cosines = nearest_words(backbone, vectors.detach(), NEIGHBOURS)
    for i, vector in enumerate(vectors):
        words = [repr(tokenizer.decode([t])) + f" {c:.2f}" for t, c in zip(ids[i], cosines[i], strict=True)]
        table.add_row(str(i), f"{vector.norm():.2f}", "  ".join(words))
    console.print(table)


def _show_norms(prefixes: Mapping[tuple[Site, int], KeyValue]) -> None:
    table = Table("site", "layer", "keys", "values", title="Mean norms of the prefix", title_justify="left")
    for (site, layer), (key, value) in prefix_norms(prefixes).items():
        table.add_row(site.value, str(layer), f"{key:.2f}", f"{value:.2f}")
    console.print(table)


def _show_terms(sizes: Mapping[tuple[Site, int], Mapping[str, float]]) -> None:
    names = [name for name in ("memory", "gate") if any(name in size for size in sizes.values())]
    table = Table("site", "layer", *names, title="What is added to attention's outputs", title_justify="left")
    for (site, layer), size in sizes.items():
        table.add_row(site.value, str(layer), *(f"{size[name]:.2e}" if name in size else "" for name in names))
    console.print(table)
