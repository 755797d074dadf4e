"""Other people's tools, unchanged, with a model with adapters in the place of a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval.models.huggingface
import numpy as np
import outlines
import pytest
import torch
from lm_eval.api.instance import Instance
from outlines.types import Regex
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models
from transformers import AutoModelForCausalLM, AutoTokenizer

from softtune import PeftModel, get_peft_model
from tests.families import METHODS, scramble
from tests.tiny import save_models

KINDS = ["prefix", "prompt", "bitfit_added"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


def writer(folder: str, method: str) -> tuple[PeftModel, Any]:
    """A decoder with an adapter, and its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = scramble(get_peft_model(base, METHODS[method](task_type="CAUSAL_LM"))).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # of the tools
@pytest.mark.parametrize("method", KINDS)
def test_lm_eval_scores_and_writes(method: str, folders: dict[str, str]) -> None:
    model, tokenizer = writer(folders["llama"], method)
    asked = [("the sky is", " blue"), ("red is", " warm good")]
    harness = lm_eval.models.huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=32
    )
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
    for (score, _), (context, answer) in zip(harness.loglikelihood(requests), asked, strict=True):
        given, own = tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad():
            log = torch.log_softmax(model(torch.tensor([given + own])).logits[0].float(), -1)
        expected = sum(float(log[len(given) - 1 + i, token]) for i, token in enumerate(own))
        assert score == pytest.approx(expected, abs=1e-4)
    settings = {"until": ["</s>"], "max_gen_toks": 5, "do_sample": False}
    (written,) = harness.generate_until([Instance("generate_until", {}, ("the sky is", settings), 0)])
    ids = tokenizer("the sky is", return_tensors="pt")
    whole = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert written.split() == tokenizer.decode(whole, skip_special_tokens=True).split()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", KINDS)
def test_outlines_writes_what_it_is_allowed_to(method: str, folders: dict[str, str]) -> None:
    model, tokenizer = writer(folders["llama"], method)
    wrapped = outlines.from_transformers(model, tokenizer)
    ids = tokenizer("the sky is", return_tensors="pt")
    free = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    found = wrapped("the sky is", max_new_tokens=4, do_sample=False)
    assert found == tokenizer.decode(free, skip_special_tokens=True)
    assert wrapped("the sky is", Regex("( red| blue)"), max_new_tokens=4).split()[0] in ("red", "blue")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning_v2"])
def test_sentence_transformers_encodes(method: str, folders: dict[str, str], tmp_path: Path) -> None:
    texts, plain = ["the sky is blue", "red"], models.Transformer(folders["bert"], max_seq_length=16)
    before = SentenceTransformer(modules=[plain, models.Pooling(24)]).encode(texts)
    plain.model = scramble(get_peft_model(plain.model, METHODS[method](task_type="FEATURE_EXTRACTION"))).eval()
    encoder = SentenceTransformer(modules=[plain, models.Pooling(24)])
    found = encoder.encode(texts)
    assert np.abs(found - before).max() > 1e-2
    np.testing.assert_allclose(encoder.encode(texts[1:]), found[1:], atol=1e-5)
    encoder.save_pretrained(str(tmp_path))
    again = models.Transformer(folders["bert"], max_seq_length=16)
    again.model = PeftModel.from_pretrained(again.model, tmp_path)
    read = SentenceTransformer(modules=[again, models.Pooling(24)]).encode(texts)
    np.testing.assert_allclose(read, found, atol=1e-6)
