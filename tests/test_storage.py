"""Files are found, and folders are never left half written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from softtune import CheckpointError
from softtune.storage import is_path, locate, read_json, staged, write_json


def test_locate(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("x")
    assert locate(tmp_path, "file") is None
    assert locate(tmp_path, "file", subfolder="sub") == tmp_path / "sub" / "file"
    assert locate(tmp_path / "none", "file") is None


def test_a_hub_that_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="hub"):
        locate("someone/something", "file")


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that the hub is asked for, where there is no connection."""

    class ConnectError(Exception):
        """What the hub's HTTP client raises."""

    asked: list[str] = []

    def ask(address: str, **_: object) -> None:
        asked.append(address)
        raise ConnectError

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    return asked


def cached_file(cache: Path) -> dict[str, Any]:
    """A hub's cache with one file of a repository; how it is looked up."""
    cached = cache / "models--someone--something"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40) / "sub").mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40) / "sub" / "file").write_text("x")
    return {"model_id": "someone/something", "cache_dir": cache, "subfolder": "sub"}


def test_the_hub_is_not_asked_for_what_is_cached(tmp_path: Path, questions: list[str]) -> None:
    where = cached_file(tmp_path)
    assert locate(filename="file", **where) is not None
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        locate(filename="other", local_files_only=True, **where)
    assert not questions


def test_a_hub_without_connection_is_asked_once(tmp_path: Path, questions: list[str]) -> None:
    where = cached_file(tmp_path)
    for more in ({"filename": "other"}, {"filename": "file", "revision": "v2"}):
        with pytest.raises(CheckpointError, match="the hub cannot be reached"):
            locate(**where, **more)
    assert [address.rpartition("something/")[2] for address in questions] == [
        "resolve/main/sub/other",
        "resolve/v2/sub/file",
    ]


def test_an_optional_file_is_done_without_where_others_are_cached(tmp_path: Path, questions: list[str]) -> None:
    with pytest.warns(UserWarning, match="other of someone/something is not cached and the hub cannot be reached"):
        assert locate(filename="other", is_optional=True, **cached_file(tmp_path)) is None
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        locate("some/other", "other", cache_dir=tmp_path, is_optional=True)


def test_a_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    (home / "adapters").mkdir(parents=True)
    here.mkdir()
    (home / "adapters" / "file").write_text("x")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert locate("~/adapters", "file") == home / "adapters" / "file"
    assert locate("~/adapters", "other") is None
    assert locate("~nobody-of-that-name/adapters", "file") is None
    Path("~/adapters").mkdir(parents=True)
    assert locate("~/adapters", "file") is None


@pytest.mark.parametrize("name", ["my runs/x", "~/adapters", "a--b/c", "a/b.git", "-a/b", "x" * 97, "größe/x"])
def test_the_hub_is_not_asked_for_names_that_it_does_not_have(name: str) -> None:
    assert is_path(name)
    assert locate(name, "file") is None


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_damaged_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_json_is_sorted_and_ends_with_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": "ä"})
    text = (tmp_path / "x.json").read_text()
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")
    assert read_json(tmp_path / "x.json") == {"a": "ä", "b": 1}


def test_staged_files_arrive_together(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    target.mkdir(parents=True)
    (target / "mine").write_text("kept")
    (target / "old").write_text("old")
    with staged(target) as stage:
        (stage / "old").write_text("new")
        (stage / "sub").mkdir()
        (stage / "sub" / "more").write_text("more")
        assert (target / "old").read_text() == "old"
    assert {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()} == {
        "mine": "kept",
        "old": "new",
        "sub/more": "more",
    }
    assert [p.name for p in target.parent.iterdir()] == ["folder"]


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "folder") as stage:
            (stage / "half").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file"), staged(tmp_path / "file"):
        pass


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        with staged(tmp_path / "folder") as stage:
            (stage / "sub").mkdir(mode=0o700)
            (stage / "sub" / "private").touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"folder": folder, "sub": folder, "private": file}


@pytest.mark.parametrize(
    "name", ["./model", "../model", "/model", "~/model", "runs/one/model", "my model", "C:\\model"]
)
def test_names_that_the_hub_does_not_have_are_paths(name: str) -> None:
    assert is_path(name)


def test_names_that_the_hub_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("gpt2", "HuggingFaceTB/SmolLM2-1.7B")
    assert not any(map(is_path, names))
    Path("HuggingFaceTB/SmolLM2-1.7B").mkdir(parents=True)
    assert is_path(names[1])
