"""``softtune import``: convert the pickled weights of an adapter that an old PEFT saved to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softtune import checkpoint, storage
from softtune.cli.console import console, quiet
from softtune.errors import CheckpointError
from softtune.methods import PeftConfig
from softtune.methods.base import CONFIG_NAME, OWN_CONFIG_NAME
from softtune.methods.initialization import WEIGHTS_NAME


def command(
    source: Annotated[str, typer.Argument(help="The adapter's folder, or its name on the hub.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write an adapter's pickled weights as safetensors. Of the pickled file nothing but tensors is read."""
    quiet()
    PeftConfig.from_pretrained(source)  # fails if softtune does not have the method
    weights = checkpoint.weights(source, allow_pickle=True)
    config = storage.locate(source, CONFIG_NAME)
    if config is None or config.parent.resolve() == target.resolve():
        raise CheckpointError(f"{target} holds the adapter itself", "name another folder")
    if storage.locate(source, WEIGHTS_NAME) or storage.locate(source, OWN_CONFIG_NAME):
        raise CheckpointError(f"{source} has safetensors already", "load it as it is")
    if target.exists():
        raise CheckpointError(f"{target} is there already", "name another folder")
    with storage.staged(target) as stage:
        storage.write_json(stage / CONFIG_NAME, PeftConfig.from_json_file(config))
        checkpoint.write(stage / WEIGHTS_NAME, weights)
    tensors = "tensor" if len(weights) == 1 else "tensors"
    console.print(f"{target}: {len(weights)} {tensors}, {sum(tensor.numel() for tensor in weights.values()):,} numbers")
