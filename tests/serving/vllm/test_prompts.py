"""Exported prompts as vLLM's processes read them: right tensors, each from its file once, and no other files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from softtune.errors import CheckpointError
from softtune.serving.prompt_export import PROMPT_NAME
from softtune.serving.vllm.prompts import CachedPrompts, Prompts

L, H, K = 2, 4, 3
TOKEN_BYTES = L * 2 * H * K * 4
"""Bytes of a virtual token in fp32."""


def write(folder: Path, name: str, length: int, more: dict[str, torch.Tensor] | None = None, **facts: Any) -> None:
    """A prompt of random numbers."""
    (folder / name).mkdir(parents=True)
    told = {"num_virtual_tokens": length, "shifts_positions": True, "after_text": False, **facts}
    prefix = torch.randn(length, L * 2 * H * K)
    save_file({"prefix": prefix, **(more or {})}, folder / name / PROMPT_NAME, {"prompt": json.dumps(told)})


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    for number, name in enumerate("abc"):
        write(tmp_path, name, number + 2)
    return Prompts(tmp_path, L, H, K)


def test_the_length_is_read_without_the_tensor(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "read", None)
    assert [prompts.length(name) for name in "abc"] == [2, 3, 4]


def test_a_length_is_read_once(prompts: Prompts) -> None:
    assert prompts.length("a") == 2
    (prompts.folder / "a" / PROMPT_NAME).unlink()
    assert prompts.length("a") == 2
    with pytest.raises(OSError, match="No such file"):
        prompts.read("a")


@pytest.mark.parametrize(
    "facts", [{"num_virtual_tokens": 3}, {"shifts_positions": False}, {"after_text": True}], ids=str
)
def test_what_is_no_plain_prefix_is_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    write(tmp_path, "a", 2, **facts)
    with pytest.raises(CheckpointError, match="a is no prefix in every layer of this model: bake it for this model"):
        Prompts(tmp_path, L, H, K).read("a")


def test_vectors_beside_a_prefix_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", 2, {"vectors": torch.zeros(2, 5)})
    with pytest.raises(CheckpointError, match="a is no prefix in every layer"):
        Prompts(tmp_path, L, H, K).length("a")


@pytest.mark.parametrize("size", [(L + 1, H, K), (L, H + 1, K), (L, H, K - 1)])
def test_another_models_prefix_is_refused(tmp_path: Path, size: tuple[int, int, int]) -> None:
    write(tmp_path, "a", 2)
    with pytest.raises(CheckpointError, match="a is no prefix in every layer"):
        Prompts(tmp_path, *size).length("a")


@pytest.mark.parametrize("name", ["", ".", "..", "../prefix", "a/b", ".hidden", "a" * 201])
def test_a_name_never_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no adapter's name"):
        Prompts(tmp_path, layers=2, heads=2, size=6).length(name)


def held(prompts: Prompts, tokens: int, heads: slice = slice(None)) -> CachedPrompts:
    """A cache of as many bytes as ``tokens`` virtual tokens have."""
    return CachedPrompts(prompts, heads, torch.float32, torch.device("cpu"), tokens * TOKEN_BYTES)


def test_a_worker_has_its_heads_in_its_dtype(prompts: Prompts) -> None:
    own = CachedPrompts(prompts, slice(1, 3), torch.bfloat16, torch.device("cpu"), 10**6)
    found = own.get("b")
    whole = prompts.read("b")
    assert whole.shape == (3, L, 2, H, K)
    assert found.is_contiguous()
    assert found.dtype == torch.bfloat16
    for token in range(3):
        for layer in range(L):
            for part in range(2):
                for head in (1, 2):
                    expected = whole[token, layer, part, head].to(torch.bfloat16)
                    assert torch.equal(found[token, layer, part, head - 1], expected)


def test_prompts_are_kept_up_to_the_bound(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    own, names = held(prompts, tokens=6), []
    read = prompts.read
    monkeypatch.setattr(prompts, "read", lambda name: names.append(name) or read(name))
    for name in "abab":  # 5 tokens
        own.get(name)
    assert names == ["a", "b"]
    own.get("a")
    own.get("c")  # with a, which was used last, 6 tokens
    own.get("a")
    assert names == ["a", "b", "c"]
    own.get("b")
    assert names == ["a", "b", "c", "b"]


def test_the_last_prompt_is_kept_in_any_case(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    own, names = held(prompts, tokens=0), []
    read = prompts.read
    monkeypatch.setattr(prompts, "read", lambda name: names.append(name) or read(name))
    for name in "ccac":
        assert torch.equal(own.get(name), read(name))
    assert names == ["c", "a", "c"]


def test_a_prompt_that_cannot_be_read_is_asked_for_again(prompts: Prompts) -> None:
    own = held(prompts, tokens=6)
    with pytest.raises(OSError, match="No such file"):
        own.get("later")
    write(prompts.folder, "later", 2)
    assert own.get("later").shape == (2, L, 2, H, K)
