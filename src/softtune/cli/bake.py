"""``softtune bake``: export adapters for a separate vLLM server that has softtune's connector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from softtune.backbone import Backbone
from softtune.cli.console import console, quiet
from softtune.cli.flags import with_load_flags
from softtune.data import Template
from softtune.data.encoding import has_places_within
from softtune.errors import ConfigError
from softtune.pretrained import LoadOptions, load_base_model
from softtune.serving.vllm.compatibility import bake_folder
from softtune.serving.vllm.prompts import NAME
from softtune.training.recipe import Recipe


@with_load_flags
def command(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of adapters.")],
    model: Annotated[str, typer.Option(help="Base model: a folder, a hub name or smollm2-135m.")],
    to: Annotated[Path, typer.Option(help="The folder that vLLM's connector is told.")],
    *,
    load: Mapping[str, Any],
) -> None:
    """Write adapters as keys and values, for softtune's connector in a vLLM of one's own.

    vLLM keeps what it has read: a changed adapter needs another name.
    """
    quiet()
    for adapter in adapters:
        if not NAME.fullmatch(adapter.name):
            raise ConfigError(f"{adapter.name!r} cannot name it there", "use letters, digits, '_', '-', '.' and '@'")
        if (to / adapter.name).exists():
            raise ConfigError(f"{to / adapter.name} is there already", "give the adapter's folder another name")
    base, tokenizer = load_base_model(model, options=LoadOptions(**load))
    for adapter in adapters:
        recipe = Recipe.found_in(adapter)
        if recipe is not None and has_places_within(Template(recipe.template), tokenizer):
            raise ConfigError(f"{adapter} has virtual tokens within its text", "serve it by softtune serve")
        virtual = bake_folder(Backbone.shared(base), adapter, to / adapter.name)
        console.print(f"{adapter.name}: texts begin with {virtual} placeholders", soft_wrap=True)
