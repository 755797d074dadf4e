"""The report page of a trained adapter: its learning curves, and a figure of its trained parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softtune import storage
from softtune.backbone import Backbone, Site
from softtune.evaluation.inspection import deviations, mean_changes_by_layer, nearest_words, prefix_norms, term_sizes
from softtune.experiments.figures import filled
from softtune.experiments.page import Page, Table
from softtune.experiments.pictures import Picture, Point, curves, heat, places
from softtune.formatting import in_words
from softtune.methods.prompt import KeyValue
from softtune.model import PeftModel
from softtune.pretrained import load_base_model
from softtune.training.folder import HISTORY_NAME
from softtune.training.recipe import Recipe

SMOOTH = 20
"""Approximate number of points of a learning curve; each is the mean of several steps."""


def adapter_page(folder: Path, title: str) -> Page:
    """The report page of an adapter that softtune trained. For an ensemble, it only has the members' learning curves.

    Args:
        folder: the adapter's folder.
        title: title of the page.

    Raises:
        CheckpointError: the folder has no adapter.
        ConfigError: its base model is not found.
    """
    recipe = Recipe.from_adapter(folder)
    facts = {"model": recipe.model, "method": recipe.method.value, "learning rate": f"{recipe.peak_learning_rate:g}"}
    drawn = _learning(folder) + (_traits(folder, recipe) if recipe.ensemble == 1 else [])
    table = Table(head=["", "value"], lines=[[name, value] for name, value in facts.items()])
    return Page(title=title, tables=[table], pictures=drawn)


def _learning(folder: Path) -> list[Picture]:
    """Learning curves of the losses; none where the folder has no history."""
    if not (folder / HISTORY_NAME).is_file():
        return []
    lines: dict[str, list[Point]] = {}
    for name, steps in storage.read_json(folder / HISTORY_NAME).items():
        for kind in ("loss", "validation_loss"):
            points = [Point(step["step"], step[kind]) for step in steps if kind in step]
            if points:
                lines[in_words(kind) + ("" if name == "default" else f" of {name}")] = _smoothed(points)
    return [curves("Loss while training", lines, across="step", up="loss")] if lines else []


def _smoothed(points: list[Point]) -> list[Point]:
    width = max(1, len(points) // SMOOTH)
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [Point(part[-1].x, mean(point.y for point in part)) for part in parts]


def _traits(folder: Path, recipe: Recipe) -> list[Picture]:
    model, tokenizer = _loaded(folder, recipe)
    with torch.no_grad():
        adapter = model.adapter(model.active_adapter).of_task(0)
        prompt = adapter.prompt()
        drawn = []
        if prompt.vectors is not None:
            whose = "" if adapter.task is None else f" They are those of task {adapter.task}."
            drawn.append(_words(model.backbone, prompt.vectors, tokenizer, whose))
        if prompt.prefixes:
            drawn.append(_norms(prompt.prefixes))
        if sizes := term_sizes(prompt):
            drawn.append(_terms(sizes))
        changes, factors = (mean_changes_by_layer(x) for x in (prompt.additions, deviations(prompt.scalings)))
    drawn += [biases(_cells(changes))] if changes else []
    return drawn + ([_factors(_cells(factors))] if factors else [])


def _loaded(folder: Path, recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    options = recipe.inference_load_options()
    base, tokenizer = load_base_model(recipe.model, recipe.task, num_labels=recipe.num_labels, options=options)
    return PeftModel.from_pretrained(base, folder), tokenizer


def _words(backbone: Backbone, vectors: Tensor, tokenizer: PreTrainedTokenizerBase, whose: str) -> Picture:
    """Virtual tokens and their nearest words, projected on the first two principal components of their embeddings."""
    ids, _ = nearest_words(backbone, vectors, 1)
    embeddings = backbone.stacks[0].embed(ids[:, 0])
    both = torch.cat([vectors.float(), embeddings.float()])
    centered = both - both.mean(0)
    plane = (centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:2].T).tolist()
    names = [str(i + 1) for i in range(len(vectors))], [repr(tokenizer.decode([i]))[1:-1] for i in ids[:, 0]]
    virtual, nearest = (
        [(name, *place) for name, place in zip(side, part, strict=True)]
        for side, part in zip(names, (plane[: len(vectors)], plane[len(vectors) :]), strict=True)
    )
    return places(
        "Virtual tokens and their nearest words",
        {"virtual tokens": virtual, "nearest words": [*dict.fromkeys(nearest)]},
        across="first principal component of the embeddings",
        up="second",
        says="Numbers are virtual tokens; words are the vocabulary entries nearest to them by cosine." + whose,
    )


def _norms(prefixes: Mapping[tuple[Site, int], KeyValue]) -> Picture:
    lines: dict[str, list[Point]] = {}
    for (site, layer), (key, value) in prefix_norms(prefixes).items():
        lines.setdefault(f"keys, {site.value}", []).append(Point(layer, key))
        lines.setdefault(f"values, {site.value}", []).append(Point(layer, value))
    return curves("Norms of the prefix by layer", lines, across="layer", up="mean norm over heads and tokens")


def _terms(sizes: Mapping[tuple[Site, int], Mapping[str, float]]) -> Picture:
    lines: dict[str, list[Point]] = {}
    for (site, layer), size in sizes.items():
        for name, value in size.items():
            lines.setdefault(f"{name}, {site.value}", []).append(Point(layer, value))
    return curves("What is added to attention's outputs, by layer", lines, across="layer", up="norm, or absolute gate")


def biases(cells: Mapping[str, Mapping[str, float]]) -> Picture:
    """A heat map of the mean absolute change of the biases, by role and layer."""
    return heat("Mean absolute change of the biases", filled(cells), across="layer", down="", form=".1e")


def _factors(cells: Mapping[str, Mapping[str, float]]) -> Picture:
    """A heat map of the mean distance of the factors from 1, by role and layer."""
    return heat("Mean distance of the factors from 1", filled(cells), across="layer", down="", form=".1e")


def bias_cells(folder: Path) -> dict[str, dict[str, float]]:
    """The mean absolute change of a BitFit adapter's biases, by role and layer.

    Raises:
        CheckpointError: the folder has no adapter.
        ConfigError: its base model is not found.
    """
    model, _ = _loaded(folder, Recipe.from_adapter(folder))
    return _cells(mean_changes_by_layer(model.adapter(model.active_adapter).prompt().additions))


def _cells(changes: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {in_words(role): {str(layer): by_layer[layer] for layer in by_layer} for role, by_layer in changes.items()}
