"""A folder that is followed: adapters that are new, changed, broken or gone, here and in an object store."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest

from softtune import AdapterError, ConfigError
from softtune.serving.engine_config import EngineConfig
from softtune.serving.folder import AdapterFolder
from softtune.serving.service import Service


@pytest.fixture
def service(llama: str) -> Service:
    return Service(llama, EngineConfig(num_kv_slots=64))


def served(service: Service) -> dict[str, int]:
    return {version.name: version.number for version in service.registry.versions}


def test_a_folder_is_followed(
    service: Service, adapters: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = AdapterFolder(str(tmp_path))
    shutil.copytree(adapters / "prefix", tmp_path / "one")
    shutil.copytree(adapters / "prompt", tmp_path / "several" / "2")
    folder.follow(service.registry)
    before = served(service)
    assert list(before) == ["one", "several/2"]
    folder.follow(service.registry)
    assert served(service) == before
    shutil.copytree(adapters / "infix", tmp_path / "new")
    shutil.copytree(adapters / "prompt", tmp_path / "one", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "several")
    folder.follow(service.registry)
    after = served(service)
    assert list(after) == ["new", "one"]
    assert after["one"] > before["one"]
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        folder.follow(service.registry)
        folder.follow(service.registry)
    assert served(service) == after
    told = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert told == ["several/2 is gone, and served no longer", "kept the old one"]


def test_an_object_store_is_followed(service: Service, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: Any = fsspec.filesystem("memory")
    files.put(str(adapters / "prefix"), "/bucket/adapters/one", recursive=True)
    folder = AdapterFolder("memory://bucket/adapters")
    folder.follow(service.registry)
    assert list(served(service)) == ["one"]
    files.put(str(adapters / "prompt"), "/bucket/adapters/two", recursive=True)
    files.rm("/bucket/adapters/one", recursive=True)
    fetched: list[str] = []
    get = files.get_file
    monkeypatch.setattr(type(files), "get_file", lambda self, path, *own: (fetched.append(path), get(path, *own)))
    folder.follow(service.registry)
    assert list(served(service)) == ["two"]
    count = len(fetched)
    folder.follow(service.registry)
    assert len(fetched) == count > 0
    copies = [source.path for source in folder._sources]
    folder.close()
    assert not any(path.exists() for path in copies)


def test_adapters_come_from_several_places(
    service: Service, adapters: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files: Any = fsspec.filesystem("memory")
    files.put(str(adapters / "prompt"), "/user/prompt", recursive=True)
    for name in ("prefix", "infix"):
        shutil.copytree(adapters / "prompt", tmp_path / "more" / name)
    places = [adapters / "prefix", tmp_path / "more"]
    AdapterFolder(*map(str, places), "memory://user/prompt").follow(service.registry)
    assert list(served(service)) == ["infix", "prefix", "prompt"]
    methods = {version.name: version.info.config.peft_type for version in service.registry.versions}
    assert methods == {"infix": "PROMPT_TUNING", "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
    assert f"more/prefix is not served: there is another prefix in {adapters}" in caplog.text


def test_keys_with_dots_stay_outside(service: Service, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: Any = fsspec.filesystem("memory")
    files.put(str(adapters / "prefix"), "/dots/one", recursive=True)
    folder = AdapterFolder("memory://dots")
    find = type(files).find
    evil = {"/dots/../../evil/adapter_config.json": {"name": "evil", "size": 1}}
    monkeypatch.setattr(type(files), "find", lambda self, *own, **options: find(self, *own, **options) | evil)
    folder.follow(service.registry)
    assert list(served(service)) == ["one"]


def test_what_cannot_be_read_for_a_while_stays(
    service: Service, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapters / "prefix", tmp_path / "one" / "prefix")
    (tmp_path / "two").mkdir()
    folder = AdapterFolder(str(tmp_path / "one"), str(tmp_path / "two"))
    folder.follow(service.registry)
    (tmp_path / "one").rename(tmp_path / "away")
    shutil.copytree(adapters / "prompt", tmp_path / "two" / "prompt")
    add = service.registry.add
    monkeypatch.setattr(service.registry, "add", Mock(side_effect=OSError("no space left")))
    folder.follow(service.registry)
    assert list(served(service)) == ["prefix"]
    monkeypatch.setattr(service.registry, "add", add)
    folder.follow(service.registry)
    assert list(served(service)) == ["prefix", "prompt"]


def test_folders_that_are_not_there(tmp_path: Path, service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere: check the path"):
        AdapterFolder(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="there is nothing at memory://nowhere, or it cannot be reached"):
        AdapterFolder("memory://nowhere")
    shutil.rmtree(empty := tmp_path / "empty", ignore_errors=True)
    empty.mkdir()
    folder = AdapterFolder(str(empty))
    empty.rmdir()
    folder.follow(service.registry)
    assert re.search(r"empty cannot be read: there is no folder .*empty any more", caplog.text)
    with pytest.raises(ConfigError, match="nothing://x cannot be read"):
        AdapterFolder("nothing://x")
    with pytest.raises(AdapterError, match="the folder has no adapter 'x': among those that are there are none"):
        AdapterFolder().load("x", service.registry)
