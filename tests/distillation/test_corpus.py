"""Texts, and chunks of them that fit a model's context."""

from __future__ import annotations

from pathlib import Path

import pytest

from softtune.distillation.corpus import chunks_of, read_corpus
from softtune.errors import DataError
from tests.tiny import tokenizer

WORDS = ["red", "green", "blue", "cold", "warm", "good", "bad"]


def text_of(count: int) -> str:
    """A text of so many words, and so of twice as many tokens less one."""
    return " ".join(WORDS[(i * i + i // 7) % 7] for i in range(count))


def test_a_folder_gives_all_its_texts_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("\ufeffsecond\n", encoding="utf-8")
    (tmp_path / "a.md").write_text("# first\n", encoding="utf-8")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "rows.jsonl").write_text('{"title": "one", "body": "two", "n": 3}\n', encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text("  \n")
    assert read_corpus(str(tmp_path), None) == ["# first", "second", "one\ntwo"]
    others = [str(tmp_path / "c" / "rows.jsonl"), None, "elsewhere.txt"]
    assert read_corpus(str(tmp_path), None, others) == ["# first", "second"]
    assert read_corpus(str(tmp_path / "a.md"), None) == ["# first"]
    assert read_corpus(None, " said ") == ["said"]


def test_hidden_files_and_other_folders_are_no_text(tmp_path: Path) -> None:
    for name in ("a.md", ".b.md", ".git/c.md", "d/.e/f.txt", "runs/g.jsonl", "runs/out/h.txt", "runs-2/i.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}' if name.endswith("l") else name)
    assert read_corpus(str(tmp_path), None, [str(tmp_path / "runs")]) == ["a.md", "runs-2/i.txt"]
    assert read_corpus(str(tmp_path / ".git"), None, [str(tmp_path)]) == [".git/c.md"]  # what is named is read
    assert read_corpus(str(tmp_path / ".b.md"), None, [str(tmp_path)]) == [".b.md"]


def test_what_is_no_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^there is no file or folder .*none: check the path$"):
        read_corpus(str(tmp_path / "none"), None)
    with pytest.raises(DataError, match=r"has no text: give a file with the text to distil$"):
        read_corpus(str(tmp_path), None)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"has no text: give files that end in '.txt', '.md', '.csv'"):
        read_corpus(str(tmp_path), None)
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn")
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8 at byte 2: save the file as UTF-8$"):
        read_corpus(str(tmp_path), None)


@pytest.mark.parametrize("size", [16, 17, 31, 64])
@pytest.mark.parametrize("count", [1, 8, 9, 16, 33, 200])
def test_chunks_cover_the_text_and_fit(count: int, size: int) -> None:
    words, text = tokenizer(ends=False), text_of(count)
    chunks = chunks_of([text, "red"], words, size)
    assert [chunk.number for chunk in chunks] == [*range(len(chunks))]
    assert chunks[-1].text == "red"
    assert all(len(words(chunk.text)["input_ids"]) <= size for chunk in chunks)
    end = 0
    for chunk in chunks[:-1]:
        start = next(i for i in range(end + 1) if text.startswith(chunk.text, i) and i + len(chunk.text) > end)
        assert start <= end + 1  # a space may stand between
        end = start + len(chunk.text)
    assert end == len(text)
    assert (len(chunks) == 2) == (2 * count - 1 <= size)
