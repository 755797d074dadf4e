"""Uploads the folders of finished runs to the Hugging Face hub.

The login and the repositories are checked before training begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from softtune.errors import ConfigError, TrainingError
from softtune.formatting import in_one_line
from softtune.training import ranks
from softtune.training.folder import LOGS
from softtune.training.recipe import CHECKPOINTS, Recipe
from softtune.training.report import Report


def create_repositories(recipes: Sequence[Recipe]) -> dict[str, str]:
    """Create the repositories of the recipes that are pushed, where there are none.

    Args:
        recipes: the recipes, of which some, or none, have ``push_to_hub``.

    Returns:
        The names of the repositories, by the recipe's output.

    Raises:
        ConfigError: there is no login, the hub cannot be reached or refuses a name, or two recipes have the same.
    """
    pushed = [recipe for recipe in recipes if recipe.push_to_hub]
    names = Counter(_name(recipe) for recipe in pushed)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"{twice[0]} is the repository of {names[twice[0]]} recipes", "give each a hub_model_id")
    if pushed:
        with _in_one_line("the hub does not know you", "run hf auth login, or set HF_TOKEN"):
            HfApi().whoami()
    return {recipe.output: _create(recipe) for recipe in pushed}


def pushed(report: Report, repository: str) -> Report | TrainingError:
    """Upload a finished run's folder, by the main process.

    Args:
        report: the run's report.
        repository: the repository's name.

    Returns:
        The report with the repository's name, or an error that says how to upload the folder later.
    """
    try:
        ranks.on_main_process(lambda: _push(report.folder, repository))
    except TrainingError as error:
        return error
    return replace(report, repository=repository)


def _push(folder: Path, repository: str) -> None:
    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload what softtune trained",
            ignore_patterns=[f"{LOGS}/**", f"{CHECKPOINTS}/**"],
        )
    except Exception as error:  # the hub's HTTP client, and so its types, change with the hub's version
        what = f"the adapter is saved in {folder}, and not pushed ({in_one_line(error)})"
        raise TrainingError(what, f"upload it by hf upload {repository} {folder}") from error


def _name(recipe: Recipe) -> str:
    """The name of a recipe's repository; without an owner it is one's own."""
    return recipe.hub_model_id or Path(recipe.output).resolve().name


def _create(recipe: Recipe) -> str:
    """Create a recipe's repository, and return its name with its owner."""
    name = _name(recipe)
    with _in_one_line(f"{name} cannot be written on the hub", "name another repository by hub_model_id"):
        return str(HfApi().create_repo(name, private=recipe.hub_private_repo, exist_ok=True).repo_id)


@contextmanager
def _in_one_line(what: str, remedy: str) -> Iterator[None]:
    """Raise the hub's errors as a ``ConfigError`` in one line."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ConfigError("push_to_hub needs a login to the hub", "run hf auth login, or set HF_TOKEN") from error
    except Exception as error:  # of any of the HTTP client's types, too
        raise ConfigError(f"{what} ({in_one_line(error)})", remedy) from error
