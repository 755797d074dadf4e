"""A text in the context, and what the teacher says with it, against transformers reading all tokens at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softtune import PeftModel, compat
from softtune.data import Collator
from softtune.distillation import teacher
from softtune.distillation.context import create_cartridge, kv_bytes, prefill_context
from softtune.distillation.dialogue import Dialogue, answer_ids
from softtune.distillation.loss import TEACHER, TeacherCollator, TeacherDivergence
from softtune.distillation.self_study import Conversation
from softtune.distillation.teacher import DistillationExample, TeacherCache
from softtune.errors import ConfigError
from softtune.training.trainer import AdapterTrainer, training_arguments
from tests.tiny import CHATML, MARKED, chat_tokenizer, save_chat_model, save_models

TEXT = "red sky is cold blue sky is warm green is bad"
TALKS = [
    Conversation(chunk=0, question="red sky is", answer="cold cold blue"),
    Conversation(chunk=0, question="is green good", answer="bad"),
    Conversation(chunk=1, question="sky", answer="warm green"),
]
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<s>system good</s>\n{% endif %}" + CHATML
TEMPLATES = {"chat": CHATML, "marked": MARKED, "refuses": REFUSES_SYSTEM, "default": DEFAULT_SYSTEM}


@pytest.fixture(params=["plain", *TEMPLATES])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A model and its tokenizer, with chat templates of several kinds or none."""
    if request.param == "plain":
        folder = save_models(tmp_path, max_position_embeddings=256, attention_dropout=0)["llama"]
    else:
        folder = save_chat_model(tmp_path / "chat", TEMPLATES[request.param], max_position_embeddings=256)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def examples_of(
    tokenizer: Any, texts: tuple[str, str] = (TEXT, "bad bad"), role: Any = "system"
) -> list[DistillationExample]:
    form = Dialogue(tokenizer, role)
    return [DistillationExample.from_conversation(talk, texts[talk.chunk], form, form) for talk in TALKS]


def cache_of(base: Any, examples: list[DistillationExample], folder: Path, k: int) -> TeacherCache:
    cache = TeacherCache(
        folder=folder, base=base, examples=examples, top_k=k, vocabulary=base.vocab_size, pad_token_id=0
    )
    cache.fill(lambda done: None)
    return cache


def read_at_once(base: Any, example: DistillationExample) -> torch.Tensor:
    """[N, V] log-probabilities at the answer of a teacher that reads context, question and answer as one text."""
    answer = answer_ids(example.teacher)
    ids = [*example.context, *example.teacher.input_ids]
    with torch.no_grad():
        logits = base(torch.tensor([ids])).logits[0]
    return logits[-len(answer) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(("k", "role"), [(1, "system"), (4, "user"), (1000, "system")])
def test_the_teacher_has_the_text_in_its_context(k: int, role: str, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    base, tokenizer = loaded
    examples = examples_of(tokenizer, role=role)
    cache = cache_of(base, examples, tmp_path / "teacher", k)
    for number, example in enumerate(examples):
        ids, values = cache.read(number)
        expected = read_at_once(base, example).topk(min(k, base.vocab_size))
        torch.testing.assert_close(values, expected.values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(read_at_once(base, example).gather(-1, ids), expected.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("role", ["user", "system"])
def test_context_and_rest_are_the_conversation(role: Any, loaded: tuple[Any, Any]) -> None:
    """Both are tokenized apart, which words of this tokenizer show at the place where they meet."""
    _, tokenizer = loaded
    form, question = Dialogue(tokenizer, role), "is green good"
    whole, met = f"{TEXT}\n\nQuestion: {question}\nAnswer:", len(TEXT) + 2
    if form.is_chat:
        messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": question}]
        if role == "user" or tokenizer.chat_template == REFUSES_SYSTEM:
            messages = [{"role": "user", "content": f"{TEXT}\n\n{question}"}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        met = whole.index(question) if len(messages) == 1 else whole.index("<s>user")
    assert form.context_ids(TEXT) == tokenizer(whole[:met])["input_ids"]
    assert form.rest(TEXT, question).input_ids == tokenizer(whole[met:])["input_ids"]


def test_requests_are_what_users_send(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    form = Dialogue(tokenizer)
    request, answered = form.request("red sky is"), form.answered("red sky is", "cold blue")
    assert answered.input_ids[: len(request.input_ids)] == request.input_ids
    assert tokenizer.decode(answer_ids(answered)).replace(" ", "") == "coldblue</s>"
    if form.is_chat:
        messages = [{"role": "user", "content": "red sky is"}]
        sent = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert request.input_ids == tokenizer(sent)["input_ids"]


@pytest.mark.parametrize("template", [None, "chat", "marked"])
def test_a_prefix_of_the_whole_text_is_the_text(template: str | None, tmp_path: Path) -> None:
    """Where requests have no beginning of their own, the loss is 0 at the start: same tokens at the same positions."""
    if template is None:
        folder = save_models(tmp_path, max_position_embeddings=256, attention_dropout=0)["llama"]
    else:
        folder = save_chat_model(tmp_path / "chat", TEMPLATES[template], max_position_embeddings=256)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    examples = examples_of(tokenizer, (TEXT, TEXT))
    assert all(example.student.input_ids == example.teacher.input_ids for example in examples)
    cache = cache_of(base, examples, tmp_path / "teacher", 4)
    batch = TeacherCollator(Collator(0, padding_side="left"), [one.student for one in examples], cache)(range(3))
    whole = trainer_of(create_cartridge(base, examples[0].context), tmp_path)
    assert whole.compute_loss(whole.model, dict(batch)).item() == pytest.approx(0, abs=1e-5)
    shorter = trainer_of(create_cartridge(base, examples[0].context[:-4]), tmp_path)
    assert shorter.compute_loss(shorter.model, dict(batch)).item() > 1e-3


def trainer_of(model: PeftModel, folder: Path) -> AdapterTrainer:
    arguments = training_arguments(folder / "checkpoints", torch.device("cpu"), max_steps=1, label_names=["labels"])
    return AdapterTrainer(model, args=arguments, objective=TeacherDivergence())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_objective_is_the_divergence_over_all_answers(side: str, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Against rows on their own, without padding and with all of the vocabulary; gradients too."""
    base, tokenizer = loaded
    examples = examples_of(tokenizer)
    cache = cache_of(base, examples, tmp_path / "teacher", 1000)
    model = create_cartridge(base, examples[0].context[:7])
    weight = model.adapter("default").module.trainable_embedding
    collate = TeacherCollator(Collator(0, padding_side=side), [example.student for example in examples], cache)
    batch = collate([2, 0, 1])
    assert set(TEACHER) < set(batch)
    loss = trainer_of(model, tmp_path).compute_loss(model, dict(batch))
    [gradient] = torch.autograd.grad(loss, weight)
    sums = []
    for example in examples:
        answer = answer_ids(example.student)
        logits = model(torch.tensor([example.student.input_ids])).logits[0, -len(answer) - 1 : -1]
        wanted = read_at_once(base, example)
        sums.append((wanted.exp() * (wanted - logits.log_softmax(-1))).sum())
    tokens = sum(len(answer_ids(example.student)) for example in examples)
    expected = torch.stack(sums).sum() / tokens
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0], atol=1e-5, rtol=1e-3)
    assert model.adapter("default").module.num_frozen_tokens == 1
    assert gradient[1:].abs().amax(-1).min() > 0


def test_the_cache_keeps_what_has_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "SHARD", 2)
    folder = save_chat_model(tmp_path / "chat")
    base, words = AutoModelForCausalLM.from_pretrained(folder).eval(), chat_tokenizer()
    examples = examples_of(words)
    cache_of(base, examples, tmp_path / "teacher", 4)
    first, second = sorted((tmp_path / "teacher").iterdir())
    times = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    cache_of(base, examples, tmp_path / "teacher", 4)
    assert (first.stat().st_mtime_ns, second.stat().st_mtime_ns) == times
    edited = [*examples[:2], examples_of(words, (TEXT, "good good"))[2]]
    changed = cache_of(base, edited, tmp_path / "teacher", 4)
    assert first.stat().st_mtime_ns == times[0]
    assert not second.exists()
    assert len([*(tmp_path / "teacher").iterdir()]) == 2
    torch.testing.assert_close(changed.read(2)[1], read_at_once(base, edited[2]).topk(4).values, atol=1e-5, rtol=1e-4)
    other_k = cache_of(base, edited, tmp_path / "teacher", 3)
    assert other_k.read(0)[0].shape[1] == 3
    assert len([*(tmp_path / "teacher").iterdir()]) == 2


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "chat")
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    examples = examples_of(chat_tokenizer())
    cache = cache_of(base, examples, tmp_path / "teacher", 4)
    tokens = sum(len(answer_ids(example.student)) for example in examples)
    header = 2000
    assert sum(file.stat().st_size for file in (tmp_path / "teacher").iterdir()) <= tokens * 4 * 8 + header
    cache.check_size(tokens * 4 * 8 / 1e6)
    with pytest.raises(
        ConfigError, match=rf"^{tokens} tokens with 4 log-probabilities each take \d+ B, cache_mb allows"
    ):
        cache.check_size(tokens * 4 * 8 / 1e6 - 1e-6)


def test_nothing_in_the_context_is_the_base_model(loaded: tuple[Any, Any]) -> None:
    base, tokenizer = loaded
    ids = torch.tensor([tokenizer("red sky")["input_ids"]])
    torch.testing.assert_close(prefill_context(base, [])(ids).logits, base(ids).logits)
    assert kv_bytes(base, 10) == 10 * sum(
        tensor.shape[1] * tensor.shape[3] * 4
        for layer in compat.cache_of(base(ids, use_cache=True)).layers
        for tensor in (layer.keys, layer.values)
    )
