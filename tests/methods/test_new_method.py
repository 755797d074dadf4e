"""A new method is one file, and lines in the registry: it trains, is saved, loaded, inspected, compared and baked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli import write_recipe
from tests.tiny import save_models

TOY = '''
from dataclasses import dataclass, replace
from typing import ClassVar

from softtune.methods import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, PromptEmbedding, PromptTuningConfig

# What a line of PeftType adds.
member = str.__new__(PeftType, "DOUBLED_TUNING")
member._name_ = member._value_ = "DOUBLED_TUNING"
PeftType._member_map_["DOUBLED_TUNING"] = PeftType._value2member_map_["DOUBLED_TUNING"] = member
PeftType._member_names_.append("DOUBLED_TUNING")


@dataclass(kw_only=True, eq=False)
class DoubledTuningConfig(PromptTuningConfig):
    peft_type: PeftType = member
    learning_rate: ClassVar[float] = 0.02

    def build(self, backbone):
        super().build(backbone)
        return Doubled(self)


class Doubled(PromptEmbedding):
    """Virtual tokens that stand in the model at twice their trained size."""

    def prompt(self):
        prompt = super().prompt()
        return replace(prompt, vectors=prompt.vectors * 2)


PEFT_TYPE_TO_CONFIG_MAPPING[member] = DoubledTuningConfig
'''
CHECK = """
import torch
from transformers import AutoModelForCausalLM
from softtune import PeftModel
from softtune.training.recipe import Recipe

assert Recipe.from_adapter({folder!r}).peak_learning_rate == 0.02
base = AutoModelForCausalLM.from_pretrained({base!r}).eval()
ids = torch.tensor([[5, 6, 7]])
plain = base(ids).logits.detach()
model = PeftModel.from_pretrained(base, {folder!r})
trained = model.get_prompt_embedding_to_save("default")
vectors = torch.cat([2 * trained[None], base.get_input_embeddings()(ids)], dim=1)
with model.disable_adapter():
    expected = model(inputs_embeds=vectors).logits[:, len(trained):]
torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
assert not torch.allclose(expected, plain)
"""


def run(folder: Path, code: str, *arguments: str) -> str:
    """What Python prints that knows the toy."""
    command = [sys.executable, "-c", f"import toy\n{code}", *arguments]
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_new_method_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    base, command = save_models(tmp_path / "models")["llama"], "import softtune_command; softtune_command.main()"
    recipe = write_recipe(tmp_path / "r.yaml", base, tmp_path / "out", method="DOUBLED_TUNING")
    assert "6 steps" in run(tmp_path, command, "train", recipe, "--epochs", "2")
    run(tmp_path, CHECK.format(base=base, folder=str(tmp_path / "out")))
    assert "nearest vocabulary entries" in run(tmp_path, command, "inspect", "out")
    compared = ("--output", "compared", "--entries", "doubled-tuning,few-shot", "--seeds", "1")
    assert "doubled-tuning" in run(tmp_path, command, "compare", recipe, *compared)
    run(tmp_path, command, "bake", "out", "--model", base, "--to", "baked")
    assert (tmp_path / "baked" / "out").is_dir()
    assert "doubled tuning" in run(tmp_path, command, "check", base, "--method", "doubled-tuning")
