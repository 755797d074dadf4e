"""Every start of a trained state is what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.families import CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, VOCABULARY, base_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast

from softtune import (
    CheckpointError,
    ConfigError,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
    get_peft_model,
)
from softtune.backbone import Backbone
from softtune.compat import renamed
from softtune.methods import initialization as init

WORDS = ["great", "terrible", "movie", "the", "classify"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer: word i of WORDS has the id 10 + i."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(WordLevel({"[UNK]": 3} | {w: 10 + i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def prompt_of(family: str, **fields: object) -> Tensor:
    model = get_peft_model(base_model(family, CAUSAL_LM), PromptTuningConfig(**fields))  # type: ignore[arg-type]
    return model.get_prompt_embedding_to_save("default")


def words_of(family: str, ids: list[int]) -> Tensor:
    return base_model(family, CAUSAL_LM).get_input_embeddings()(torch.tensor(ids)).detach()


def test_random_is_uniform() -> None:
    prompt = prompt_of("gpt2", num_virtual_tokens=200, prompt_tuning_init="RANDOM")
    assert prompt.abs().max() <= 0.5
    assert prompt.abs().max() > 0.49
    assert abs(float(prompt.std()) - 12**-0.5) < 0.01


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_vocabulary_sample(family: str) -> None:
    """Distinct word vectors, as the first layer sees them; Gemma scales them."""
    prompt, words = prompt_of(family, num_virtual_tokens=20), words_of(family, list(range(VOCABULARY)))
    ids = [int(torch.where((words == row).all(1))[0][0]) for row in prompt]
    assert len(set(ids)) == 20


def test_vocabulary_sample_is_of_common_words() -> None:
    backbone = Backbone(base_model("gpt2", CAUSAL_LM))
    backbone.model.resize_token_embeddings(init.COMMON_WORDS + 3000, mean_resizing=False)
    ids = init.vocabulary_ids(backbone, 4000)
    assert int(ids.max()) < init.COMMON_WORDS
    assert len(set(ids.tolist())) == 4000


@pytest.mark.parametrize("start", ["SAMPLE_VOCAB", "LABELS"])
def test_a_vocabulary_sample_has_no_special_and_unused_entries(start: str, tmp_path: Path) -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[unused0]": 2, "[unused17]": 3, "<unused_2>": 4, "great": 5, "unused": 6}
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")),
        unk_token="[UNK]",
        pad_token="[PAD]",
        extra_special_tokens=["[MORE]"],
    )
    words.save_pretrained(tmp_path)
    labels = {"prompt_tuning_init_labels": ["great"]} if start == "LABELS" else {}
    prompt = prompt_of(
        "gpt2", num_virtual_tokens=9, prompt_tuning_init=start, tokenizer_name_or_path=str(tmp_path), **labels
    )
    expected = words_of("gpt2", [5, 6])
    assert all((expected == row).all(1).any() for row in prompt)
    assert all((prompt == row).all(1).any() for row in expected)


def test_more_virtual_tokens_than_words() -> None:
    ids = init.vocabulary_ids(Backbone(base_model("gpt2", CAUSAL_LM)), 2 * VOCABULARY)
    assert sorted(ids.tolist()) == sorted(2 * list(range(VOCABULARY)))


@pytest.mark.parametrize(
    ("text", "ids"),
    [("classify the movie", [14, 13, 12, 14, 13]), ("the movie great terrible the classify", [13, 12, 10, 11, 13])],
)
def test_text_is_repeated_or_cut(text: str, ids: list[int], tokenizer: str) -> None:
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": tokenizer}
    assert torch.equal(prompt_of("gpt2", num_virtual_tokens=5, **fields), words_of("gpt2", ids))


def test_labels_are_means_of_their_words(tokenizer: str) -> None:
    fields = {"prompt_tuning_init": "LABELS", "tokenizer_name_or_path": tokenizer}
    labels = ["great movie", "terrible"]
    prompt = prompt_of("gpt2", num_virtual_tokens=4, prompt_tuning_init_labels=labels, **fields)
    torch.testing.assert_close(prompt[0], words_of("gpt2", [10, 12]).mean(0))
    torch.testing.assert_close(prompt[1], words_of("gpt2", [11])[0])
    words = words_of("gpt2", list(range(VOCABULARY)))
    assert all((words == row).all(1).any() for row in prompt[2:])
    assert prompt_of("gpt2", num_virtual_tokens=1, prompt_tuning_init_labels=labels, **fields).shape == (1, 36)


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_file(placement: str, tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=4, placement=placement)
    saved = get_peft_model(base_model("gpt2", CAUSAL_LM), config)
    saved.save_pretrained(tmp_path)
    expected = saved.get_prompt_embedding_to_save("default")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        fields = {"prompt_tuning_init": "FILE", "prompt_tuning_init_file": str(path)}
        assert torch.equal(prompt_of("gpt2", num_virtual_tokens=4, **fields), expected)
        with pytest.raises(CheckpointError, match=r"\(4, 36\).*\(5, 36\)"):
            prompt_of("gpt2", num_virtual_tokens=5, **fields)


def test_files_that_hold_no_prompt(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(2, 36)}, tmp_path / "other.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\x08")
    for name in ("other.safetensors", "short.safetensors", "none.safetensors", "folder"):
        with pytest.raises(CheckpointError, match=name):
            prompt_of(
                "gpt2", prompt_tuning_init="FILE", prompt_tuning_init_file=str(tmp_path / name), num_virtual_tokens=2
            )


def test_missing_text_or_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt_tuning_init_text"):
        PromptTuningConfig(prompt_tuning_init="TEXT", tokenizer_name_or_path=tokenizer)
    with pytest.raises(ConfigError, match="init_text"):
        PrefixTuningConfig(init_weights="text")
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the movie"}
    with pytest.raises(ConfigError, match="tokenizer"):
        prompt_of("gpt2", tokenizer_name_or_path=str(tmp_path), **fields)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        prompt_of("gpt2", tokenizer_kwargs={"trust_remote_code": True}, **fields)
    fields["prompt_tuning_init_text"] = " "
    with pytest.raises(ConfigError, match="no tokens"):
        prompt_of("gpt2", tokenizer_name_or_path=tokenizer, **fields)


def cached(family: str, ids: Tensor) -> Tensor:
    """[P, W] what the model's own cache holds of a text."""
    cache = DynamicCache()
    base = base_model(family, CAUSAL_LM)
    base(**renamed({"input_ids": ids[None], "cache": cache, "use_cache": True}, base.forward))
    parts = [
        part[0].transpose(0, 1).reshape(len(ids), -1) for layer in cache.layers for part in (layer.keys, layer.values)
    ]
    return torch.cat(parts, dim=1).detach()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "bloom"])
@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_starts_from_the_keys_and_values_of_a_text(family: str, projection: bool, tokenizer: str) -> None:
    config = PrefixTuningConfig(
        num_virtual_tokens=4,
        init_text="classify the movie",
        tokenizer_name_or_path=tokenizer,
        prefix_projection=projection,
        encoder_hidden_size=16 if projection else None,
    )
    model = get_peft_model(base_model(family, CAUSAL_LM), config)
    expected = cached(family, torch.tensor([14, 13, 12, 14]))
    torch.testing.assert_close(model.get_prompt_embedding_to_save("default"), expected, atol=1e-5, rtol=1e-5)


def test_a_prefix_of_a_text_continues_it(tokenizer: str) -> None:
    """Before training, the model answers as if it had read the text."""
    config = PrefixTuningConfig(num_virtual_tokens=3, init_text="classify the movie", tokenizer_name_or_path=tokenizer)
    for family in ("gpt2", "llama", "bloom"):
        model = get_peft_model(base_model(family, CAUSAL_LM), config).eval()
        ids = torch.tensor([[14, 13, 12, 20, 21, 22]])
        read = base_model(family, CAUSAL_LM)(ids).logits[:, 3:]
        torch.testing.assert_close(model(ids[:, 3:]).logits, read, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [PrefixTuningConfig(num_virtual_tokens=7), PTuningV2Config(num_virtual_tokens=7)])
@pytest.mark.parametrize(("family", "task"), [("gpt2", CAUSAL_LM), ("bert", SEQ_CLS), ("t5", SEQ_2_SEQ_LM)])
def test_a_prefix_starts_from_words_by_default(config: PrefixTuningConfig, family: str, task: str) -> None:
    prompts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        prompts.append(get_peft_model(base_model(family, task), config).get_prompt_embedding_to_save("default"))
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])


def test_zero_and_random_prefixes() -> None:
    for projection in (False, True):
        fields = {"num_virtual_tokens": 9, "prefix_projection": projection}
        zero = get_peft_model(base_model("gpt2", CAUSAL_LM), PrefixTuningConfig(init_weights="zero", **fields))
        assert zero.get_prompt_embedding_to_save("default").abs().max() < 1e-6
    random = get_peft_model(
        base_model("gpt2", CAUSAL_LM), PrefixTuningConfig(init_weights="random", num_virtual_tokens=50)
    )
    assert abs(float(random.get_prompt_embedding_to_save("default").std()) - 1) < 0.05
