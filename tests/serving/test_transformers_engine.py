"""What the engine writes is what ``generate`` writes alone, whoever else is served, and whatever becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softtune.errors import ClosedError, FullError, TooLongError
from softtune.serving import prompt_export
from softtune.serving.requests import LoglikelihoodRequest
from tests.families import P
from tests.serving.stepping import Served

TEXTS = ["the sky is blue", "good text : bad", "red", "cold warm cold warm the green sky label : is", "is it"]


class Pooled(Served):
    """softtune's own engine."""

    def finish(self) -> None:
        super().finish()
        self.engine.batch.adapter_cache.shrink(0)
        assert self.engine.scheduler.pool.num_free == self.engine.config.num_kv_slots


@pytest.fixture
def served(llama: str, adapters: Path, tmp_path: Path) -> Callable[..., Pooled]:
    return lambda **config: Pooled(llama, adapters, tmp_path, **config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 5},
        {"num_kv_slots": 64, "max_num_seqs": 20, "adapter_cache_bytes": 10**4},
        {"adapter_cache_bytes": 0, "max_num_seqs": 2},
    ],
    ids=["all at once", "few places", "texts in parts", "a full pool", "nothing kept"],
)
def test_texts_are_those_of_generate_alone(served: Callable[..., Pooled], config: dict[str, int]) -> None:
    s = served(**config)
    asked = [(name, text, 3 + 5 * (i % 3)) for i, text in enumerate(TEXTS) for name in s.names]
    jobs = [s.write(name, text, max_tokens=tokens) for name, text, tokens in asked]
    s.finish()
    for (name, text, tokens), (job, _, failures) in zip(asked, jobs, strict=True):
        assert not failures
        assert job.output_ids == s.expected(name, text, tokens), (name, text)


@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 5, "num_kv_slots": 80, "adapter_cache_bytes": 0}])
def test_several_prefixes_in_front_of_a_text(served: Callable[..., Pooled], config: dict[str, int]) -> None:
    s = served(**config)
    names = ["prefix+prompt", "prefix", "prompt+prefix", "prefix+p_tuning_lstm+prompt", None, "ia3", "prompt_suffix"]
    asked = [(name, text) for text in TEXTS for name in names]
    jobs = [s.write(name, text, max_tokens=6) for name, text in asked]
    s.finish()
    for (name, text), (job, handle, failures) in zip(asked, jobs, strict=True):
        assert not failures
        assert job.output_ids == s.expected(name, text, 6), (name, text)
        assert "+" not in (name or "") or handle.num_virtual_tokens == P * len(str(name).split("+"))


def test_scores_are_those_of_a_forward_alone(served: Callable[..., Pooled]) -> None:
    s = served(max_num_batched_tokens=3, num_kv_slots=80)
    answers = ["warm", "cold", "bad text", "the sky is", "bad text is"]
    found: dict[tuple[str, str], list[float]] = {}
    for version in s.registry.versions:
        for text in TEXTS[:3]:
            job = LoglikelihoodRequest(
                s.ids(text), [s.ids(a) for a in answers], lambda x, at=(version.name, text): found.update({at: x})
            )
            s.submit(version.name, job)
    s.finish()
    for (name, text), scores in found.items():
        for answer, score in zip(answers, scores, strict=True):
            words, own = s.ids(text), s.ids(answer)
            labels = torch.tensor([[-100] * len(words) + own])
            with torch.no_grad():
                logits = s.model(torch.tensor([words + own]), labels=labels, adapter_names=[name]).logits[0]
            expected = logits[len(words) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(own)[:, None]).sum()
            assert score == pytest.approx(float(expected), abs=1e-4), (name, text, answer)


def test_a_seed_draws_the_same_tokens_in_any_company(served: Callable[..., Pooled]) -> None:
    s = served(max_num_batched_tokens=7)
    asked = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 5}
    alone, *_ = s.write("prefix", TEXTS[0], **asked)
    s.finish()
    again, *_ = s.write("prefix", TEXTS[0], **asked)
    other, *_ = s.write("prefix", TEXTS[0], **{**asked, "seed": 6})
    for text in TEXTS:
        s.write("prompt", text, max_tokens=9, temperature=1.0)
    s.finish()
    assert again.output_ids == alone.output_ids
    assert other.output_ids != alone.output_ids


def test_who_gives_up_leaves_a_place(served: Callable[..., Pooled]) -> None:
    s = served(max_num_seqs=1)
    first, handle, _ = s.write("prefix", TEXTS[0], max_tokens=30)
    waiting, waits, _ = s.write("prefix", TEXTS[1], max_tokens=30)
    last, *_ = s.write(None, TEXTS[2], max_tokens=4)
    for _ in range(3):
        s.engine.step()
    handle.is_cancelled = waits.is_cancelled = True
    s.finish()
    assert 0 < len(first.output_ids) < 30
    assert not waiting.output_ids
    assert last.output_ids == s.expected(None, TEXTS[2], 4)


def test_adapters_take_turns(served: Callable[..., Pooled]) -> None:
    s = served(max_num_seqs=1)
    crowd = [s.write("prefix", TEXTS[0], max_tokens=2, seed=i)[0] for i in range(6)]
    late, *_ = s.write("prompt", TEXTS[0], max_tokens=2)
    while not late.is_done:
        s.engine.step()
    assert sum(job.is_done for job in crowd) <= 2
    s.finish()


def test_a_crowd_leaves_places_in_the_queue(served: Callable[..., Pooled]) -> None:
    one = served(max_num_seqs=1, max_num_waiting=4)
    crowd = [one.write("prefix", "the sky is", max_tokens=3) for _ in range(5)]  # one of which has a place
    with pytest.raises(FullError, match="4 requests are waiting: try again later"):
        one.write("prefix", "red", max_tokens=3)
    others = [one.write(name, "red", max_tokens=3) for name in ("prompt", "infix", "prompt")]
    with pytest.raises(FullError):
        one.write("prompt", "red", max_tokens=3)
    assert [[*map(type, failures)] for _, _, failures in crowd] == [[], [], [FullError], [FullError], [FullError]]
    one.finish()
    for job, _, failures in crowd[:2] + others:
        assert (len(job.output_ids), failures) == (3, [])


def test_a_version_lasts_as_long_as_its_requests(served: Callable[..., Pooled], adapters: Path, llama: str) -> None:
    s = served(max_num_seqs=2, adapter_cache_bytes=0)
    old, *_ = s.write("prefix", TEXTS[0], max_tokens=8)
    waiting = [s.write("prefix", text, max_tokens=8)[0] for text in TEXTS[1:3]]
    s.engine.step()
    kept = s.registry.lease("prefix")
    s.registry.release(kept)
    s.registry.add("prefix", adapters / "prompt")
    new, *_ = s.write("prefix", TEXTS[0], max_tokens=8)
    assert kept.folder.exists()
    s.finish()
    assert not kept.folder.exists()
    for job, text in zip([old, *waiting], TEXTS, strict=False):
        assert job.output_ids == s.expected("prefix", text, 8)
    assert new.output_ids == s.expected("prompt", TEXTS[0], 8)


def test_what_does_not_fit_is_refused(served: Callable[..., Pooled]) -> None:
    s = served(max_num_waiting=2, max_num_seqs=1)
    with pytest.raises(TooLongError, match=r"3 tokens of text, 58 to write and 5 virtual ones are more than the 64"):
        s.write("prefix", "the sky", max_tokens=58)
    for _ in range(3):  # one of which has a place
        s.write(None, TEXTS[0])
    with pytest.raises(FullError, match="2 requests are waiting: try again later"):
        s.write(None, TEXTS[0])
    s.finish()
    s.engine.batch.queue.is_closed = True
    with pytest.raises(ClosedError, match="shutting down"):
        s.write(None, TEXTS[0])


def test_an_adapter_without_numbers_fails_its_own_requests(served: Callable[..., Pooled]) -> None:
    s = served()
    [broken] = [version for version in s.registry.versions if version.name == "prefix"]
    prompt = prompt_export.load_prompt(broken.folder, s.model.backbone)
    for layer in prompt.prefixes.values():
        layer.key.fill_(float("nan"))
    prompt_export.save_prompt(prompt, s.model.backbone, broken.folder)
    *_, failures = s.write("prefix", TEXTS[0], max_tokens=4)
    good, *_ = s.write("prompt", TEXTS[0], max_tokens=4)
    s.finish()
    assert "what is no number: train it anew" in str(failures[0])
    assert good.output_ids == s.expected("prompt", TEXTS[0], 4)


def test_a_damaged_file_fails_its_own_requests(served: Callable[..., Pooled]) -> None:
    s = served()
    version = s.registry.lease("prefix")
    s.registry.release(version)
    (version.folder / prompt_export.PROMPT_NAME).write_bytes(b"nothing")
    *_, failures = s.write("prefix", TEXTS[0])
    good, *_ = s.write("prompt", TEXTS[0], max_tokens=4)
    s.finish()
    assert len(failures) == 1
    assert good.output_ids == s.expected("prompt", TEXTS[0], 4)


def test_answers_that_do_not_fit_beside_each_other_are_refused(served: Callable[..., Pooled]) -> None:
    s, told = served(num_kv_slots=50), list[list[float]]()
    text, answer = s.ids("the sky is"), [3] * 11
    s.submit("prefix", LoglikelihoodRequest(text, [answer] * 4, told.append))
    with pytest.raises(TooLongError) as refusal:
        s.submit("prefix", LoglikelihoodRequest(text, [*[answer] * 3, [*answer, 3]], told.append))
    assert str(refusal.value).startswith("the answers to choose from have 46 tokens with the text, more than the 50")
    s.finish()
    assert len(told) == 1


@pytest.mark.parametrize(("num_kv_slots", "expected"), [(40, 40), (64, 64), (600, 64)])
def test_a_sequence_fits_the_model_and_the_pool(
    served: Callable[..., Pooled], num_kv_slots: int, expected: int
) -> None:
    s = served(num_kv_slots=num_kv_slots)
    assert s.engine.max_model_len == expected
    with pytest.raises(TooLongError, match=f"more than the {expected} that there is room for"):
        s.write(None, "red", max_tokens=expected)
    job, *_ = s.write(None, "red", max_tokens=expected - 1)
    assert job.max_num_tokens == expected


def test_who_cannot_be_told_fails_alone(served: Callable[..., Pooled]) -> None:
    s = served()

    def fail(scores: list[float]) -> None:
        raise ValueError("nobody listens")

    _, failures = s.submit("prefix", LoglikelihoodRequest(s.ids("red"), [[3], [4]], fail))
    good, *_ = s.write("prefix", TEXTS[0], max_tokens=4)
    s.finish()
    assert [str(error) for error in failures] == ["nobody listens"]
    assert good.output_ids == s.expected("prefix", TEXTS[0], 4)


@pytest.mark.parametrize("as_kv", [True, False])
def test_adapters_are_exported_as_they_are_asked_for(
    served: Callable[..., Pooled], adapters: Path, tmp_path: Path, as_kv: bool
) -> None:
    engine = served().engine
    folder = tmp_path / "exported"
    folder.mkdir()
    engine.export_adapter(prompt_export.load_adapter(engine.backbone, adapters / "prompt"), folder, as_kv=as_kv)
    prompt = prompt_export.load_prompt(folder, engine.backbone)
    assert (bool(prompt.prefixes), prompt.vectors is None) == (as_kv, as_kv)
