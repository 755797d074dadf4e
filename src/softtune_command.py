"""The entry point of the command ``softtune``.

It stands beside the package, whose imports take seconds: the overview of the commands needs none of them, and a command
is imported when it is called.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

COMMANDS = {
    "train": "Train an adapter by a recipe, or those of several recipes at once, and show what came of it.",
    "predict": "Answer records with a trained adapter; measure the answers where the records have labels.",
    "generate": "Write the text that follows each record, one a line.",
    "inspect": "Show an adapter's config and sizes, and the words nearest to its virtual tokens, or norms by layer.",
    "check": "Check what softtune promises on a base model: padding and caches change nothing, all is trained.",
    "import": "Write an adapter's pickled weights as safetensors. Of the pickled file nothing but tensors is read.",
    "compare": "Compare methods and baselines on the task of a recipe: quality, trained parameters, time and memory.",
    "sweep": "Run a recipe at many points: every combination of some fields' values, or as many as a search tries.",
    "serve": "Serve adapters on one base model over HTTP: OpenAI's API, labels and tags, and a page to try them.",
    "bake": "Write adapters as keys and values, for softtune's connector in a vLLM of one's own.",
    "report": "Write the page of a comparison or a sweep, or of an adapter, with its losses and traits.",
}
"""The commands with the first paragraph of their help texts."""


class _Imported(TyperCommand):
    """A command that is imported when it is called."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return _import(str(self.name)).make_context(info_name, args, parent, **extra)


def _import(name: str) -> Any:
    """Import a command of the package; Ctrl-C ends the imports with one line."""
    try:
        from softtune.cli import load

        return load(name)
    except KeyboardInterrupt:
        print("softtune: stopped", file=sys.stderr)
        sys.exit(130)
    except ImportError as error:
        if error.name != "transformers" or "softtune" not in str(error):
            raise
        print(f"softtune: {error}", file=sys.stderr)  # transformers is too old
        sys.exit(2)


main = typer.Typer(
    help="Soft-prompt tuning of frozen Hugging Face transformers.",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@main.callback()
def _show_version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        print(metadata.version("softtune"))
        raise typer.Exit


for _name, _help in COMMANDS.items():
    main.command(_name, cls=_Imported, help=_help)(lambda: None)
