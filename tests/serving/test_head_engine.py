"""Each example gets what its adapter's head answers to it alone, whoever else is in the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softtune import PeftModel
from softtune.data import Example
from softtune.errors import TooLongError
from softtune.methods import TaskType
from softtune.serving import prompt_export
from softtune.serving.engine_config import EngineConfig
from softtune.serving.head_engine import MOST_BATCHES, HeadEngine, HeadRequest
from softtune.serving.registry import AdapterInfo, Registry
from softtune.serving.request_queue import RequestHandle
from tests.families import PAD, QUESTION_ANS, SEQ_CLS, TOKEN_CLS, P, adapted, base_model

KINDS = ("prefix", "prompt", "bitfit")
Outputs = list[tuple[Tensor, ...]]


def example(length: int, places: list[int] | None = None) -> Example:
    ids = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Example(input_ids=ids, labels=[], prompt_positions=places)


class Judged:
    """An engine for one kind of head on a tiny BERT, with an adapter of each of some methods.

    Args:
        folder: where adapters are kept.
        task: the head's.
        config: see ``EngineConfig``.
    """

    def __init__(self, folder: Path, task: str = SEQ_CLS, **config: Any) -> None:
        self.models: dict[str, PeftModel] = {}
        for seed, kind in enumerate(KINDS):
            self.models[kind] = adapted("bert", task, kind, seed)
            self.models[kind].save_pretrained(folder / "adapters" / kind)
        self.folder = folder
        self.backbone = PeftModel(base_model("bert", task)).backbone
        self.engine = HeadEngine(self.backbone, TaskType(task), PAD, EngineConfig(**config))
        (folder / "spool").mkdir()
        self.registry = Registry(self._export, folder / "spool", lambda version: None, "bert")
        for kind in KINDS:
            self.registry.add(kind, folder / "adapters" / kind)
        self.sizes: list[int] = []
        """Examples of each forward."""
        self.backbone.model.register_forward_pre_hook(
            lambda model, args, call: self.sizes.append(len(call["input_ids"])), with_kwargs=True
        )

    def _export(self, folder: Path, export_folder: Path) -> AdapterInfo:
        adapter = prompt_export.load_adapter(self.backbone, folder)
        self.engine.export_adapter(adapter, export_folder, as_kv=False)
        return AdapterInfo(adapter.config, None, self.engine)

    def ask(
        self, kind: str, *examples: Example, tell: Callable[[Outputs], None] | None = None
    ) -> tuple[list[Outputs], list[Exception], RequestHandle[HeadRequest]]:
        """Ask an adapter; what it tells, and what it fails by."""
        told: list[Outputs] = []
        failures: list[Exception] = []
        version = self.registry.lease(kind)
        handle = RequestHandle(
            version,
            HeadRequest(examples, tell or told.append),
            failures.append,
            functools.partial(self.registry.release, version),
        )
        self.engine.submit(handle)
        return told, failures, handle

    def finish(self) -> None:
        for _ in range(50):
            self.engine.step()
        assert self.engine.batch.is_idle
        assert not any(version.leases for version in self.registry.versions)

    def alone(self, kind: str, one: Example) -> Any:
        """What the adapter's model answers to an example alone."""
        places = None if one.prompt_positions is None else torch.tensor([one.prompt_positions])
        with torch.no_grad():
            more = {} if places is None else {"prompt_positions": places}
            return self.models[kind](torch.tensor([one.input_ids]), **more)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., Judged]:
    return functools.partial(Judged, tmp_path)


@pytest.mark.parametrize(("max_num_seqs", "sizes"), [(1, [1] * 9), (4, [4, 4, 1]), (64, [9])])
def test_classes_are_those_of_each_example_alone(
    judged: Callable[..., Judged], max_num_seqs: int, sizes: list[int]
) -> None:
    own = judged(max_num_seqs=max_num_seqs)
    asked = [(kind, example(length)) for length in (3, 7, 1) for kind in KINDS]
    results = [own.ask(kind, one) for kind, one in asked]
    own.finish()
    for (kind, one), ([[(logits,)]], failures, _) in zip(asked, results, strict=True):
        close(logits, own.alone(kind, one).logits[0])
        assert not failures
    assert own.sizes == sizes


def test_tags_have_a_row_for_each_token_of_their_text(judged: Callable[..., Judged]) -> None:
    own = judged(TOKEN_CLS)
    asked = [(kind, example(length)) for kind, length in zip(KINDS, (2, 9, 5), strict=True)]
    results = [own.ask(kind, one)[0] for kind, one in asked]
    own.finish()
    for (kind, one), [[(logits,)]] in zip(asked, results, strict=True):
        assert len(logits) == len(one.input_ids)
        close(logits, own.alone(kind, one).logits[0])


def test_spans_have_logits_of_both_ends(judged: Callable[..., Judged]) -> None:
    own = judged(QUESTION_ANS)
    asked = [(kind, example(length)) for kind, length in zip(KINDS, (2, 9, 5), strict=True)]
    results = [own.ask(kind, one)[0] for kind, one in asked]
    own.finish()
    for (kind, one), [[(start, end)]] in zip(asked, results, strict=True):
        expected = own.alone(kind, one)
        close(start, expected.start_logits[0])
        close(end, expected.end_logits[0])


def test_a_request_is_answered_once_all_its_examples_are_run(judged: Callable[..., Judged]) -> None:
    own = judged(max_num_seqs=2)
    several = [example(length) for length in (4, 6, 2, 5, 3)]
    told, _, handle = own.ask("prompt", *several)
    later, *_ = own.ask("prefix", example(4))
    for left in (3, 1):
        own.engine.step()
        assert (told, later, len(handle.request.pending)) == ([], [], left)
    own.finish()
    assert own.sizes == [2, 2, 2]
    [outputs] = told
    for one, (logits,) in zip(several, outputs, strict=True):
        close(logits, own.alone("prompt", one).logits[0])
    close(later[0][0][0], own.alone("prefix", example(4)).logits[0])


def test_examples_with_other_places_for_virtual_tokens_come_in_another_batch(judged: Callable[..., Judged]) -> None:
    own = judged()
    placed, plain = example(5, [0, 1, 1, 3, 5]), example(5)
    assert len(placed.prompt_positions or ()) == P
    results = [own.ask("prompt", one)[0] for one in (plain, placed, plain)]
    own.finish()
    assert own.sizes == [2, 1]
    for one, [[(logits,)]] in zip((plain, placed, plain), results, strict=True):
        close(logits, own.alone("prompt", one).logits[0])


def test_more_examples_than_a_few_batches_are_refused(judged: Callable[..., Judged]) -> None:
    own = judged(max_num_seqs=2)
    told, *_ = own.ask("prefix", *[example(3)] * (2 * MOST_BATCHES))
    with pytest.raises(TooLongError, match="the text has 9 parts: shorten it"):
        own.engine.submit(RequestHandle(None, HeadRequest([example(3)] * 9, told.append), lambda error: None))
    own.finish()
    assert len(told) == 1


def test_what_cannot_be_told_fails_alone(judged: Callable[..., Judged]) -> None:
    own = judged()

    def fail(outputs: Outputs) -> None:
        raise ValueError("nobody listens")

    _, failures, _ = own.ask("prefix", example(4), tell=fail)
    good, *_ = own.ask("prefix", example(4))
    own.finish()
    assert [str(error) for error in failures] == ["nobody listens"]
    close(good[0][0][0], own.alone("prefix", example(4)).logits[0])


def test_an_adapter_without_numbers_fails_its_own_requests(judged: Callable[..., Judged]) -> None:
    own = judged()
    broken = own.models["prefix"]
    with torch.no_grad():
        for parameter in broken.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    broken.save_pretrained(own.folder / "broken")
    own.registry.add("broken", own.folder / "broken")
    told, failures, _ = own.ask("broken", example(4))
    good, *_ = own.ask("prompt", example(4))
    own.finish()
    assert not told
    assert "what is no number: train it anew" in str(failures[0])
    close(good[0][0][0], own.alone("prompt", example(4)).logits[0])


def test_a_damaged_file_fails_its_own_requests(judged: Callable[..., Judged]) -> None:
    own = judged()
    version = own.registry.lease("prefix")
    own.registry.release(version)
    (version.folder / "adapter_model.safetensors").write_bytes(b"nothing")
    _, failures, _ = own.ask("prefix", example(4))
    good, *_ = own.ask("prompt", example(4))
    own.finish()
    assert len(failures) == 1
    assert len(good) == 1


def test_a_cancelled_request_is_not_answered(judged: Callable[..., Judged]) -> None:
    own = judged(max_num_seqs=1)
    told, failures, handle = own.ask("prefix", example(4), example(5))
    good, *_ = own.ask("prompt", example(4))
    own.engine.step()
    handle.is_cancelled = True
    own.finish()
    assert (told, failures, len(good)) == ([], [], 1)
    assert own.sizes == [1, 1]


@pytest.mark.parametrize(("spare", "is_kept"), [(0, True), (-1, False)])
def test_idle_adapters_are_kept_up_to_the_configured_size(
    judged: Callable[..., Judged], spare: int, is_kept: bool
) -> None:
    trained = [p for p in adapted("bert", SEQ_CLS, "prefix").parameters() if p.requires_grad]
    size = sum(parameter.nbytes for parameter in trained)
    own = judged(adapter_cache_bytes=size + spare)
    own.ask("prefix", example(4))
    own.finish()
    assert own.engine.batch.adapter_cache.nbytes == is_kept * size
