"""The entry point of the command ``softtune``.

It stands beside the package, whose imports take seconds: the overview of the commands needs none of them, and a command
is imported when it is called. Its annotations are no strings, since typer, which reads them, is imported in a function.

Internal.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated, Any

COMMANDS = {
    "train": "Train an adapter by a recipe, or those of several recipes at once, and show what came of it.",
    "tune": "Train an adapter on a few labelled examples, which it starts from, by a recipe made for them.",
    "predict": "Answer records with a trained adapter; measure the answers where the records have labels.",
    "generate": "Write the text that follows each record, one a line.",
    "inspect": "Show an adapter's config and sizes, and the words nearest to its virtual tokens, or norms by layer.",
    "check": "Check what softtune promises on a base model: padding and caches change nothing, all is trained.",
    "import": "Write an adapter's pickled weights as safetensors. Of the pickled file nothing but tensors is read.",
    "compare": "Compare methods and baselines on the task of a recipe: quality, trained parameters, time and memory.",
    "sweep": "Run a recipe at many points: every combination of some fields' values, or as many as a search tries.",
    "distill": "Distil a text into a cartridge: a trained KV prefix that answers about the text without reading it.",
    "serve": "Serve adapters on one base model over HTTP: OpenAI's API, labels and tags, and a page to try them.",
    "bake": "Write adapters as keys and values, for softtune's connector in a vLLM of one's own.",
    "report": "Write the page of a comparison or a sweep, or of an adapter, with its losses and traits.",
}
"""The commands with the first paragraph of their help texts."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: by default those of the process.
    """
    try:
        app = _app()
    except ModuleNotFoundError:
        with _import_errors_in_one_line():
            from softtune.extras import require

            require("cli")
        raise
    app(arguments)


def _app() -> Any:
    """The commands, each imported when it is called."""
    import typer
    from typer.core import TyperCommand

    class Imported(TyperCommand):
        """A command that is imported when it is called."""

        def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
            return _import(str(self.name)).make_context(info_name, args, parent, **extra)

    app = typer.Typer(
        help="Soft-prompt tuning of frozen Hugging Face transformers.",
        no_args_is_help=True,
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )

    @app.callback()
    def show_version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
        if version:
            print(metadata.version("softtune"))
            raise typer.Exit

    for name, summary in COMMANDS.items():
        app.command(name, cls=Imported, help=summary)(lambda: None)
    return app


def _import(name: str) -> Any:
    """Import a command of the package; Ctrl-C ends the imports with one line."""
    try:
        with _import_errors_in_one_line():
            from softtune.cli import load

            return load(name)
    except KeyboardInterrupt:
        print("softtune: stopped", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _import_errors_in_one_line() -> Iterator[None]:
    """End with exit code 2 and one line on stderr, where the error says what to install."""
    try:
        yield
    except ImportError as error:
        is_old_transformers = error.name == "transformers" and "softtune" in str(error)
        if not is_old_transformers and not hasattr(error, "remedy"):
            raise
        print(f"softtune: {error}", file=sys.stderr)
        sys.exit(2)
