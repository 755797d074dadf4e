"""Tensors come back as they were or not at all, whatever happens to the disk."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch

from softtune import ConfigError
from softtune.injection.tensor_store import TensorStore

NewStore = Callable[..., TensorStore]
open_file = tempfile.TemporaryFile
KB = 1e-3
"""Megabytes."""


@pytest.fixture
def new_store() -> Iterator[NewStore]:
    """Stores that are closed when the test is over."""
    with ExitStack() as stack:
        yield lambda *sizes: stack.enter_context(closing(TensorStore(*sizes)))


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """1 kB in fp32."""
    return torch.randn(25, 10, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("memory", "disk"), [(9, 0), (0, 9), (1.5, 9)])
def test_tensors_come_back_bit_for_bit(
    dtype: torch.dtype, memory: float, disk: float, tmp_path: Path, new_store: NewStore
) -> None:
    store = new_store(memory * KB, disk * KB, tmp_path)
    for key in range(4):
        store.put(key, numbers(key, dtype)[: key + 1].T)
    assert len(store) == 4
    for key in (2, 0, 3, 1):
        kept = store.get(key)
        assert kept is not None
        assert kept.dtype == dtype
        assert torch.equal(kept, numbers(key, dtype)[: key + 1].T)
    assert store.get(4) is None
    store.close()
    assert store.get(0) is None
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_a_copy(new_store: NewStore) -> None:
    store, tensor = new_store(9 * KB, 0), numbers(0)
    store.put(0, tensor)
    tensor.zero_()
    assert torch.equal(store.get(0), numbers(0))  # type: ignore[arg-type]


def test_both_bounds_hold_and_the_first_stay(new_store: NewStore) -> None:
    store = new_store(2.5 * KB, 1.5 * KB)
    for key in range(6):
        store.put(key, numbers(key))
    assert [key for key in range(6) if store.get(key) is not None] == [0, 1, 2]


class FullDisk:
    """A file on a disk that takes so many bytes; what does not fit is written in part."""

    def __init__(self, size: int) -> None:
        self.file, self.left = open_file(buffering=0), size

    def write(self, content: Any) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(content[: self.left])
        self.left -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("size", [0, 2000, 2400])
def test_a_full_disk_ends_the_writing_with_one_warning(
    size: int, monkeypatch: pytest.MonkeyPatch, new_store: NewStore
) -> None:
    monkeypatch.setattr("softtune.injection.tensor_store.tempfile.TemporaryFile", lambda **kwargs: FullDisk(size))
    store = new_store(1 * KB, 9 * KB)
    with pytest.warns(RuntimeWarning, match="cannot write") as warned:
        _ = [store.put(key, numbers(key)) for key in range(6)]
    assert len(warned) == 1
    for key in range(6):
        kept = store.get(key)
        assert (kept is not None) == (key <= size // 1000)
        assert kept is None or torch.equal(kept, numbers(key))
    store.close()


def test_a_folder_that_cannot_be_written_into_is_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, new_store: NewStore
) -> None:
    def refuse(**kwargs: Any) -> None:
        raise PermissionError("no")

    monkeypatch.setattr("softtune.injection.tensor_store.tempfile.TemporaryFile", refuse)
    store = new_store(0, 9 * KB)
    with pytest.warns(RuntimeWarning, match="cannot write"):
        store.put(0, numbers(0))
    store.put(1, numbers(1))
    assert len(store) == 0


@pytest.mark.parametrize("harm", ["change", "cut"])
def test_what_the_disk_lost_is_not_read_back(harm: str, new_store: NewStore) -> None:
    store = new_store(0, 9 * KB)
    for key in range(3):
        store.put(key, numbers(key))
    if harm == "change":
        store._file.seek(1500)
        store._file.write(b"\0" * 8)
    else:
        store._file.truncate(1500)
    assert torch.equal(store.get(0), numbers(0))  # type: ignore[arg-type]
    assert store.get(1) is None
    store.put(1, numbers(1))
    assert torch.equal(store.get(1), numbers(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("memory", "disk"), [(-1, 0), (0, -1), (0, 0), (float("nan"), 1), (5, -1)])
def test_sizes_that_make_no_sense(memory: float, disk: float) -> None:
    with pytest.raises(ConfigError, match="use 0 or more, and one above 0"):
        TensorStore(memory, disk)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make it first"):
        TensorStore(1, 1, tmp_path / "none")
