"""Adapters by name and version: a version lasts as long as its requests, and not longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from softtune.errors import AdapterError, CheckpointError, ConfigError, RequestError
from softtune.methods import PrefixTuningConfig
from softtune.serving import registry as registry_file
from softtune.serving.registry import AdapterInfo, Registry, Version

INFO = AdapterInfo(PrefixTuningConfig(num_virtual_tokens=7), None, None)


class Registered:
    """A registry, and the versions that it has forgotten."""

    def __init__(self, folder: Path) -> None:
        self.forgotten: list[tuple[str, int]] = []
        self.error: Exception | None = None
        self.folder = folder
        self.composing: Callable[[], Any] = lambda: None
        self.registry = Registry(
            self._export,
            folder,
            lambda version: self.forgotten.append((version.name, version.number)),
            "base",
            self._compose,
        )

    def _export(self, folder: Path, export_folder: Path) -> AdapterInfo:
        (export_folder / "exported").write_text(folder.name)
        if self.error is not None:
            raise self.error
        return INFO

    def _compose(self, parts: Sequence[Version], folder: Path) -> AdapterInfo:
        self.composing()
        (folder / "exported").write_text("+".join((part.folder / "exported").read_text() for part in parts))
        if self.error is not None:
            raise self.error
        return INFO

    @property
    def served(self) -> list[tuple[str, int]]:
        return [(version.name, version.number) for version in self.registry.versions]

    @property
    def folders(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def own(tmp_path: Path) -> Registered:
    return Registered(tmp_path)


def test_versions_are_numbered_and_sorted_by_name(own: Registered) -> None:
    for name in ("two", "one", "two/1"):
        own.registry.add(name, Path("from") / name)
    assert own.served == [("one", 2), ("two", 1), ("two/1", 3)]
    [one, *_] = own.registry.versions
    assert one.info is INFO
    assert (one.folder / "exported").read_text() == "one"


def test_an_adapter_without_requests_is_replaced_at_once(own: Registered) -> None:
    old = own.registry.add("one", Path("a"))
    new = own.registry.add("one", Path("b"))
    assert (old.is_retired, new.is_retired) == (True, False)
    assert (own.served, own.forgotten, own.folders) == ([("one", 2)], [("one", 1)], ["2"])


def test_a_version_lasts_until_its_last_lease_ends(own: Registered) -> None:
    old = own.registry.add("one", Path("a"))
    assert own.registry.lease("one") is old
    end = own.registry.lease_again(old)
    own.registry.add("one", Path("b"))
    new = own.registry.lease("one")
    assert new.number == 2
    own.registry.release(old)
    assert (old.is_retired, own.forgotten, own.folders) == (True, [], ["1", "2"])
    end()
    assert (own.forgotten, own.folders) == ([("one", 1)], ["2"])
    own.registry.release(new)
    assert (own.forgotten, own.folders) == ([("one", 1)], ["2"])
    assert (old.leases, new.leases) == (0, 0)


def test_a_removed_adapter_takes_no_more_requests(own: Registered) -> None:
    version = own.registry.add("one", Path("a"))
    own.registry.lease("one")
    own.registry.remove("one")
    assert (own.served, own.folders) == ([], ["1"])
    for call in (own.registry.lease, own.registry.remove):
        with pytest.raises(AdapterError, match="no adapter is named 'one': among those that are served are none"):
            call("one")
    own.registry.release(version)
    assert (own.forgotten, own.folders) == ([("one", 1)], [])


def test_an_unknown_name_is_told_some_of_the_others(own: Registered) -> None:
    for name in "gfedcba":
        own.registry.add(name, Path(name))
    with pytest.raises(AdapterError) as unknown:
        own.registry.lease("nobody")
    assert str(unknown.value) == "no adapter is named 'nobody': among those that are served are a, b, c, d, e"


def test_an_adapter_that_cannot_be_served_leaves_the_old_one(own: Registered) -> None:
    own.registry.add("one", Path("a"))
    own.error = CheckpointError("the file is damaged")
    with pytest.raises(CheckpointError, match="the file is damaged"):
        own.registry.add("one", Path("b"))
    assert (own.served, own.folders, own.forgotten) == ([("one", 1)], ["1"], [])
    own.error = None
    assert own.registry.add("one", Path("c")).number == 3


def test_no_adapter_has_the_base_models_name(own: Registered) -> None:
    with pytest.raises(ConfigError, match="base is the base model's name: give the adapter's folder another one"):
        own.registry.add("base", Path("a"))
    assert (own.served, own.folders) == ([], [])


def test_the_number_of_virtual_tokens_is_the_configs() -> None:
    assert INFO.num_virtual_tokens == 7
    config: Any = object()
    assert AdapterInfo(config, None, None).num_virtual_tokens == 0


@pytest.fixture
def pair(own: Registered) -> Registered:
    """Two adapters."""
    for name in ("one", "two"):
        own.registry.add(name, Path(name))
    return own


def test_joined_names_are_composed_once(pair: Registered) -> None:
    version = pair.registry.lease("one+two")
    assert pair.registry.lease("one+two") is version
    assert ((version.folder / "exported").read_text(), version.number, version.leases) == ("one+two", 3, 2)
    assert [part.name for part in version.parts] == ["one", "two"]
    assert [part.leases for part in version.parts] == [0, 0]
    assert (pair.served, pair.registry.composed) == ([("one", 1), ("two", 2)], [version])
    other = pair.registry.lease("two+one+one")
    assert (other.folder / "exported").read_text() == "two+one+one"


def test_a_composed_version_ends_with_any_of_its_parts(pair: Registered) -> None:
    first = pair.registry.lease("one+two")
    pair.registry.add("two", Path("new"))
    assert (first.is_retired, pair.registry.composed, pair.folders) == (True, [], ["1", "3", "4"])
    second = pair.registry.lease("one+two")
    assert (second.folder / "exported").read_text() == "one+new"
    pair.registry.release(first)
    assert (pair.folders, pair.forgotten) == (["1", "4", "5"], [("two", 2), ("one+two", 3)])
    pair.registry.release(second)
    assert pair.folders == ["1", "4", "5"]
    pair.registry.remove("one")
    assert pair.folders == ["4"]
    with pytest.raises(AdapterError, match="no adapter is named 'one': among those that are served are two"):
        pair.registry.lease("one+two")


def test_a_part_that_is_replaced_meanwhile(pair: Registered) -> None:
    def replace() -> None:
        pair.composing = lambda: None
        pair.registry.add("two", Path("new"))

    pair.composing = replace
    version = pair.registry.lease("one+two")
    assert (version.folder / "exported").read_text() == "one+new"
    assert pair.registry.composed == [version]
    assert pair.folders == ["1", "4", "5"]
    pair.composing = replace
    pair.registry.compose("two+one")  # is outdated before it is there
    assert pair.registry.composed == []


def test_the_oldest_of_many_composed_versions_is_dropped(pair: Registered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_file, "MAX_COMPOSED", 2)
    for name in ("one+two", "two+one", "one+two", "one+one"):
        pair.registry.release(pair.registry.lease(name))
    assert [version.name for version in pair.registry.composed] == ["one+one", "one+two"]
    assert pair.folders == ["1", "2", "3", "5"]


def test_what_cannot_be_composed_leaves_nothing(pair: Registered) -> None:
    pair.error = RequestError("one has a head")
    with pytest.raises(RequestError, match="one has a head"):
        pair.registry.lease("one+two")
    assert (pair.folders, pair.registry.composed) == (["1", "2"], [])
    assert not any(version.leases for version in pair.registry.versions)
    for name, unknown in (("one+three", "three"), ("one+", ""), ("+", ""), ("three", "three")):
        with pytest.raises(AdapterError, match=f"no adapter is named '{unknown}'"):
            pair.registry.lease(name)
    alone = Registry(lambda *_: INFO, pair.folder, lambda version: None, "base")
    with pytest.raises(AdapterError, match="no adapter is named 'one\\+two'"):
        alone.lease("one+two")


def test_an_adapter_of_a_joined_name_comes_first(pair: Registered) -> None:
    composed = pair.registry.lease("one+two")
    own = pair.registry.add("one+two", Path("own"))
    assert pair.registry.lease("one+two") is own
    assert (composed.is_retired, pair.registry.composed) == (True, [])


def test_versions_are_told_apart_by_what_they_are() -> None:
    first, second = (Version("one", 1, INFO, Path("1")) for _ in range(2))
    assert len({first, second}) == 2
