"""``softtune import``: pickled weights in, safetensors out."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from tests.cli.test_cli import run
from tests.families import CAUSAL_LM, P, adapted, base_model

from softtune import PeftModel


def old_adapter(folder: Path) -> torch.Tensor:
    """An adapter as PEFT saved it before safetensors."""
    config = peft.PrefixTuningConfig(task_type=CAUSAL_LM, num_virtual_tokens=P)
    model = peft.get_peft_model(base_model("gpt2", CAUSAL_LM), config)
    model.save_pretrained(str(folder), safe_serialization=False)
    prompt: torch.Tensor = peft.get_peft_model_state_dict(model)["prompt_embeddings"]
    return prompt


def test_an_old_adapter_is_read_from_the_new_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = old_adapter(tmp_path / "old")
    assert run("import", str(tmp_path / "old"), str(tmp_path / "new")) == 0
    assert f"1 tensor, {prompt.numel():,} numbers" in " ".join(capsys.readouterr().out.split())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path / "new")
    assert torch.equal(model.get_prompt_embedding_to_save("default"), prompt)


def test_what_cannot_be_imported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old_adapter(tmp_path / "old")
    adapted("gpt2", CAUSAL_LM, "prompt_suffix").save_pretrained(tmp_path / "new")
    for source, target, message in (
        ("nothing here", "new", "has no adapter_config.json"),
        ("old", "old", "holds the adapter itself: name another folder"),
        ("old", "new", "new is there already: name another folder"),
        ("new", "newer", "has safetensors already: load it as it is"),
    ):
        assert run("import", str(tmp_path / source), str(tmp_path / target)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    torch.save({"prompt_embeddings": Path("x")}, tmp_path / "old" / "adapter_model.bin")
    assert run("import", str(tmp_path / "old"), str(tmp_path / "newer")) == 2
    assert "holds more than tensors" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()
