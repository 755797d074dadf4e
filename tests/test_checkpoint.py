"""How a base model is known again, and the model card."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import softtune
from softtune import (
    AdapterMismatchError,
    BitFitConfig,
    CheckpointError,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tests.families import CAUSAL_LM, FAMILIES, SEQ_2_SEQ_LM, SEQ_CLS, VOCABULARY, adapted, base_model, cases
from tests.tiny import save_models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_model_at_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    exact = adapted("gpt2", CAUSAL_LM, "prefix")
    exact.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"on its base model in float32, which is in {str(dtype)[6:]} now"):
        rounded = PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM).to(dtype), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert rounded(ids).logits.dtype == dtype
    torch.testing.assert_close(rounded(ids).logits.float(), exact(ids).logits, rtol=0.05, atol=0.05)


@pytest.mark.promise(7)
@pytest.mark.parametrize(("family", "task", "method"), [c for c in cases() if c[1] == FAMILIES[c[0]].tasks[0]])
def test_other_weights_of_the_same_shape(family: str, task: str, method: str, tmp_path: Path) -> None:
    adapted(family, task, method).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match="word embeddings"):
        PeftModel.from_pretrained(base_model(family, task, seed=5), tmp_path)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (3, 0), (40, 0), (0, 40), (-10, 0)])
@pytest.mark.parametrize("seed", [0, 5])
def test_words_added_or_cut_are_not_compared(before: int, after: int, seed: int, tmp_path: Path) -> None:
    def resized(more: int, seed: int = 0) -> PreTrainedModel:
        model = base_model("gpt2", CAUSAL_LM, seed=seed)
        model.resize_token_embeddings(VOCABULARY + more, mean_resizing=False)
        return model

    get_peft_model(resized(before), PrefixTuningConfig(task_type=CAUSAL_LM)).save_pretrained(tmp_path)
    with nullcontext() if seed == 0 else pytest.raises(AdapterMismatchError, match="word embeddings"):
        PeftModel.from_pretrained(resized(after, seed), tmp_path)


def test_fields_of_softtune_stand_in_its_own_file(tmp_path: Path) -> None:
    adapted("gpt2", CAUSAL_LM, "prefix_last").save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = json.loads((tmp_path / "softtune_config.json").read_text())
    assert "layers" not in theirs
    assert theirs["inference_mode"] is True
    assert ours["config"] == {"layers": "last:1"}
    assert len(ours["embedding_sample"]) == 16
    assert ours["embedding_rows"] == VOCABULARY


@pytest.mark.parametrize(
    ("family", "task", "pipeline", "peft"),
    [
        ("gpt2", CAUSAL_LM, "text-generation", "reads it too"),
        ("t5", SEQ_2_SEQ_LM, None, "does not compute the same from it"),
    ],
)
def test_model_card(family: str, task: str, pipeline: str | None, peft: str, tmp_path: Path) -> None:
    adapted(family, task, "prefix").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == pipeline
    adapted(family, task, "prefix").save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert text.count(f"- Trained with: softtune {softtune.__version__}") == 1
    for part in ("- Method: PREFIX_TUNING, 5 virtual tokens", f"- Task: {task}\n", f"PEFT's `PeftModel` {peft}."):
        assert part in text
    assert "More Information Needed" not in text


def test_a_model_cards_lines_load_the_adapter(tmp_path: Path) -> None:
    bert = save_models(tmp_path)["bert"]
    base = AutoModelForSequenceClassification.from_pretrained(bert)
    model = get_peft_model(base, BitFitConfig(task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"- Base model: {bert}" in card
    assert "PEFT's `PeftModel` does not compute the same from it." in card
    lines = card.partition("```python\n")[2].partition("```")[0]
    found: dict[str, PeftModel] = {}
    exec(lines.replace("the folder of this file", str(tmp_path / "adapter")), found)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(found["model"](ids).logits, model(ids).logits)


def test_a_model_card_follows_the_adapter_and_keeps_what_others_wrote(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n\nTrained on tea leaves.\n", encoding="utf-8")
    for method, name in (("prefix", "PREFIX_TUNING"), ("prompt", "PROMPT_TUNING")):
        adapted("gpt2", CAUSAL_LM, method).save_pretrained(tmp_path)
        text = card.read_text(encoding="utf-8")
        assert text.count("- Method: ") == text.count(f"- Method: {name}") == 1
        assert text.count("Trained on tea leaves.") == text.count("license: mit") == 1


@pytest.mark.promise(4, families=("bert",))
@pytest.mark.parametrize("method", ["prompt", "prefix", "prefix_last", "p_tuning_v2", "bitfit"])
def test_a_state_dict_goes_round(method: str) -> None:
    source, target = adapted("bert", SEQ_CLS, method), adapted("bert", SEQ_CLS, method, seed=6)
    state = get_peft_model_state_dict(source)
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(source(ids).logits, target(ids).logits)
    set_peft_model_state_dict(target, state)
    assert torch.equal(source(ids).logits, target(ids).logits)


def test_a_prompt_is_not_for_an_adapter_without_virtual_tokens() -> None:
    with pytest.raises(AdapterMismatchError, match=r"the adapter (lacks|also has)"):
        set_peft_model_state_dict(adapted("bert", SEQ_CLS, "bitfit"), {"prompt_embeddings": torch.zeros(5, 32)})


@pytest.mark.parametrize(("sites", "error"), [(None, "set sites="), (["cross"], "set sites="), (["decoder"], "shape")])
def test_pefts_prefix_for_an_encoder_decoder_is_the_whole_decoders(sites: list[str] | None, error: str) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=2, task_type=SEQ_2_SEQ_LM, sites=sites, layers="last:1")
    model = get_peft_model(base_model("t5", SEQ_2_SEQ_LM), config)
    numbers = 2 * model.peft_config["default"].num_layers * model.peft_config["default"].token_dim
    with pytest.raises(AdapterMismatchError, match=error):
        set_peft_model_state_dict(model, {"prompt_embeddings": torch.zeros(2, numbers)})


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning_v2", "bitfit"])
def test_numbers_are_loaded_into_the_tensors_that_are_there(method: str) -> None:
    source, target = adapted("bert", SEQ_CLS, method), adapted("bert", SEQ_CLS, method, seed=6)
    before = {n: (id(p), p.requires_grad) for n, p in target.named_parameters()}
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert {n: (id(p), p.requires_grad) for n, p in target.named_parameters()} == before
    torch.testing.assert_close(dict(target.state_dict()), dict(source.state_dict()), rtol=0, atol=0)


@pytest.mark.promise(4, families=("bert",))
@pytest.mark.parametrize("method", ["p_tuning_mlp", "prefix", "bitfit"])
def test_an_adapter_is_exported_from_a_state_dict(method: str) -> None:
    source, other = adapted("bert", SEQ_CLS, method), adapted("bert", SEQ_CLS, method, seed=6)
    expected, own = get_peft_model_state_dict(source), get_peft_model_state_dict(other)
    exported = get_peft_model_state_dict(other, source.state_dict())
    torch.testing.assert_close(exported, expected, rtol=0, atol=0)
    torch.testing.assert_close(get_peft_model_state_dict(other), own, rtol=0, atol=0)


def test_an_adapter_that_only_softtune_reads_is_copied_whole(tmp_path: Path) -> None:
    adapted("gpt2", CAUSAL_LM, "prefix_last").save_pretrained(tmp_path)
    (tmp_path / "softtune_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no softtune_config\.json, .*: copy the whole folder"):
        PeftModel.from_pretrained(base_model("gpt2", CAUSAL_LM), tmp_path)
