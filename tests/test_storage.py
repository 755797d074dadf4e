"""Files are found, and folders are never left half written."""

from __future__ import annotations

import os
from pathlib import Path

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


def test_a_cached_repository_without_the_file_needs_no_hub(tmp_path: Path) -> None:
    cached = tmp_path / "models--someone--something"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40) / "file").write_text("x")
    assert locate("someone/something", "file", cache_dir=tmp_path) is not None
    assert locate("someone/something", "other", cache_dir=tmp_path) is None
    with pytest.raises(CheckpointError, match="hub"):
        locate("someone/something", "file", cache_dir=tmp_path, revision="v2")


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
