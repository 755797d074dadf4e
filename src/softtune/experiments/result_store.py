"""The files of an experiment: one JSON file for each case that has run, and the sweep where there is one.

Knows nothing about models or how anything is run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softtune import storage
from softtune.errors import CheckpointError, ConfigError
from softtune.experiments.outcomes import Entry
from softtune.formatting import shortened
from softtune.load_options import OF_THE_MACHINE
from softtune.training.folder import ENTRIES_NAME
from softtune.training.recipe import Recipe

SWEEP_NAME = "sweep.yaml"
"""File name of a sweep; a comparison has none."""

LONGEST_STEM = 60
"""Characters of a file name that are taken from a case's name."""
LONGEST_VALUE = 60
"""Characters of a value in a message."""


class ResultStore:
    """The folder of a comparison or a sweep.

    A case's file holds its position among the cases, the configuration that it was run by, and its results. The results
    are final unless another run could give others, as after an error that can be fixed.

    Args:
        folder: the experiment's folder, which need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def sweep_file(self) -> Path:
        """The YAML file of the sweep."""
        return self.folder / SWEEP_NAME

    @property
    def has_sweep(self) -> bool:
        """Whether the experiment is a sweep."""
        return self.sweep_file.is_file()

    def run_folder(self, name: str, number: int) -> Path:
        """The folder of one of a case's runs.

        Args:
            name: the case's name.
            number: index of the run among the case's seeds, from 0.
        """
        return self.folder / f"{_stem(name)}-{number + 1}"

    def entries(self) -> list[Entry]:
        """The results of all cases that have run, failures included, in the experiment's order."""
        contents = sorted(map(_read, self._files()), key=lambda content: content["number"])
        return [entry for content in contents for entry in _entries(content)]

    def configurations(self) -> list[dict[str, Any]]:
        """The configurations of the cases whose results are final."""
        return [content["asked"] for content in map(_read, self._files()) if _is_final(content)]

    def results(self, name: str) -> list[Entry]:
        """The results of the case of this name, which has run, failures included."""
        return _entries(_read(self._file(name)))

    def final_results(self, name: str, configuration: Mapping[str, Any]) -> list[Entry] | None:
        """The saved results of a case; None where there are none, or where it failed and may be run again.

        Args:
            name: the case's name.
            configuration: the case's configuration.

        Raises:
            ConfigError: the results are of another configuration.
        """
        if not self._file(name).is_file():
            return None
        content = _read(self._file(name))
        if not _is_final(content):
            return None
        self.check_same(with_defaults(content["asked"]), with_defaults(configuration))
        return _entries(content)

    def save(self, name: str, number: int, configuration: Mapping[str, Any], entries: Sequence[Entry]) -> None:
        """Save the results of a case. Metrics and axes keep their order, since the first ones are the main ones.

        Args:
            name: the case's name.
            number: the case's position among the cases of the experiment.
            configuration: the case's configuration.
            entries: the case's results.
        """
        entry_dicts = [dataclasses.asdict(entry) for entry in entries]
        content = {"number": number, "asked": configuration, "entries": entry_dicts}
        file = self._file(name)
        with storage.staged(file.parent) as stage:
            (stage / file.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def save_sweep(self, text: str) -> None:
        """Save the YAML of the sweep."""
        with storage.staged(self.folder) as stage:
            (stage / SWEEP_NAME).write_text(text, encoding="utf-8")

    def drop_failures(self) -> None:
        """Remove the results of failed cases that may be run again."""
        for file in self._files():
            if not _is_final(_read(file)):
                file.unlink()

    def check_same(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Check that saved results have the requested configuration.

        Args:
            then: the configuration of saved results, or a part of it.
            now: the same of the requested one.

        Raises:
            ConfigError: they differ.
        """
        other = [name for name in now if then.get(name) != now[name]]
        if other == ["rows"]:
            raise ConfigError(f"the data is not what {self.folder} came of", "restore it, or name another output")
        if other and isinstance(now[other[0]], Mapping):
            self.check_same(then.get(other[0]) or {}, now[other[0]])
        if other:
            was, is_now = (shortened(repr(config.get(other[0])), LONGEST_VALUE) for config in (then, now))
            says = f"differs in its {other[0]}, {was} then and {is_now} now"
            raise ConfigError(f"the experiment in {self.folder} {says}", "name another output, or delete it")

    def _files(self) -> list[Path]:
        return [*(self.folder / ENTRIES_NAME).glob("*.json")]

    def _file(self, name: str) -> Path:
        return self.folder / ENTRIES_NAME / f"{_stem(name)}.json"


def _read(file: Path) -> dict[str, Any]:
    content = storage.read_json(file)
    if not {"number", "asked", "entries"} <= content.keys():
        raise CheckpointError(f"{file} is no result of softtune", "move it elsewhere, or name another output")
    return content


def _stem(name: str) -> str:
    """A case's name as a file name: the same where possible, else with a digest that makes it unique."""
    plain = re.sub(r"[^\w.=+-]+", "_", name)
    if plain == name and len(plain) <= LONGEST_STEM:
        return name
    return f"{plain[:LONGEST_STEM]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def with_defaults(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A case's configuration with the defaults of fields that recipes did not have when it was saved."""
    optional = {name: field.default for name, field in Recipe.model_fields.items() if not field.is_required()}
    defaults = {name: default for name, default in optional.items() if name not in OF_THE_MACHINE}
    return {**configuration, "recipe": {**defaults, **configuration.get("recipe", {})}}


def _is_final(content: Mapping[str, Any]) -> bool:
    return all(entry.is_final for entry in _entries(content))


def _entries(content: Mapping[str, Any]) -> list[Entry]:
    return [Entry.from_dict(entry) for entry in content["entries"]]
