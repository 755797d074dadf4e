"""Prefixes and CPT's prompts that start from the training rows, against the base model with these rows in front of the
text."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from tests.tiny import LABELS, save_chat_model, save_models
from tests.training.test_run import interrupt_at, no_work
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from softtune import ConfigError, DataError, PeftModel
from softtune.data import Collator, load_records
from softtune.data.encoding import IGNORED, Example
from softtune.evaluation.answers import judge
from softtune.experiments.cases import Case
from softtune.training.context_tuning import Demonstrations, starts_from_examples
from softtune.training.folder import RunFolder
from softtune.training.recipe import Recipe
from softtune.training.run import train
from softtune.training.setup import BaseModels, Rows, Setup
from softtune.training.trainer import AdapterTrainer

SEPARATOR = [90, 91]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    return save_models(folder, max_position_embeddings=512, attention_dropout=0.0)["llama"]


@pytest.fixture
def fields(fields: dict[str, Any], model: str) -> dict[str, Any]:
    """18 rows of 8 to 14 tokens, and 6 held out."""
    return {**fields, "model": model, "options": {}, "start": "examples"}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """All batches of training steps."""
    seen: list[dict[str, Tensor]] = []
    step = AdapterTrainer.training_step

    def noting(self: AdapterTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        seen.append(dict(inputs))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", noting)
    return seen


def prepared(fields: dict[str, Any]) -> Setup:
    recipe = Recipe.from_fields(fields)
    return Setup.prepare(RunFolder(recipe), Rows.load(recipe), BaseModels(), no_work)


def row_of(length: int, first: int) -> Example:
    """A row of the template's word, a field, the template's word, and an answer of one token, which are all told apart
    by their ids."""
    ids = list(range(first, first + length))
    fields = [False, *[True] * (length - 3), False, False]
    return Example(input_ids=ids, labels=[*[IGNORED] * (length - 1), ids[-1]], from_fields=fields)


def placed(lengths: list[int], size: int | None = None, most: int | None = None, seed: int = 0) -> Demonstrations:
    examples = [row_of(length, 100 * number) for number, length in enumerate(lengths, start=1)]
    groups = [[row] for row in range(len(lengths))]
    return Demonstrations.from_rows(examples, SEPARATOR, groups=groups, size=size, most=most, seed=seed)


def test_rows_stand_one_behind_the_other() -> None:
    found = placed([5, 4, 6])
    pieces = {row: [found.input_ids[place] for place in places] for row, places in found.hidden.items()}
    assert pieces == {
        0: [100, 101, 102, 103, 104, *SEPARATOR],
        1: [200, 201, 202, 203, *SEPARATOR],
        2: [300, 301, 302, 303, 304, 305, *SEPARATOR],
    }
    assert sorted(place for places in found.hidden.values() for place in places) == list(range(21))
    orders = {tuple(placed([5, 4, 6], seed=seed).input_ids) for seed in range(20)}
    assert len(orders) == 6


def test_types_are_those_of_peft() -> None:
    """Input template, input, output template and output; 4 more for each further example."""
    found = placed([5, 4])
    first = sorted(found.hidden, key=lambda row: found.hidden[row][0])
    own = {0: [1, 2, 2, 3, 4, 1, 1], 1: [1, 2, 3, 4, 1, 1]}
    assert found.types == [*own[first[0]], *[kind + 4 for kind in own[first[1]]]]


def test_types_come_from_the_template(fields: dict[str, Any]) -> None:
    setup = prepared({**fields, "labels": None, "test_size": 1})
    [start] = setup.starts
    kinds = [kind for kind in start.types if kind <= 4]
    separator = len(setup.tokenizer("\n\n", add_special_tokens=False)["input_ids"])
    # "text : ", the words and spaces of the field, " label :", " " with the answer and its end, and the empty line
    around = 4, 4, 3, separator
    field = len(kinds) - sum(around)
    assert field > 0
    assert kinds == [*[1] * around[0], *[2] * field, *[3] * around[1], *[4] * around[2], *[1] * around[3]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(4, 9), min_size=1, max_size=6), st.data())
def test_a_smaller_prefix_starts_from_a_sample(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths) + 2 * len(lengths)
    size = data.draw(st.integers(1, total))
    found = placed(lengths, size=size, seed=data.draw(st.integers(0, 5)))
    assert found.total == total
    assert len(found.input_ids) == len(found.types) == size
    pieces = {row: [found.input_ids[place] for place in places] for row, places in found.hidden.items() if places}
    assert sum(map(len, pieces.values())) == size
    cut = []
    for row, piece in pieces.items():
        whole = [*range(100 * (row + 1), 100 * (row + 1) + lengths[row]), *SEPARATOR]
        assert piece == whole[-len(piece) :]
        assert list(found.hidden[row]) == list(range(found.hidden[row][0], found.hidden[row][0] + len(piece)))
        if piece != whole:
            cut.append(found.hidden[row][0])
    assert cut in ([], [0])


def test_as_many_tokens_as_the_model_has_positions_for() -> None:
    assert len(placed([5, 4, 6], most=12).input_ids) == 12
    assert len(placed([5, 4, 6], most=30).input_ids) == 21
    with pytest.raises(ConfigError, match="num_virtual_tokens is 22, and the 3 examples have 21 tokens: lower it"):
        placed([5, 4, 6], size=22)


def test_rows_with_the_same_input_hide_one_another() -> None:
    examples = [row_of(4, 100), row_of(5, 200), row_of(4, 300)]
    found = Demonstrations.from_rows(examples, [], groups=[[0, 2], [1]], size=None, most=None, seed=0)
    for row, hidden in ((0, {*range(100, 104), *range(300, 304)}), (1, {*range(200, 205)})):
        mask = found.prefix_mask(row)
        assert mask is not None
        assert {token for token, sees in zip(found.input_ids, mask, strict=True) if not sees} == hidden
    assert found.prefix_mask(0) == found.prefix_mask(2)


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "P_TUNING_V2", "CPT"])
def test_the_untrained_prefix_is_in_context_learning(fields: dict[str, Any], method: str) -> None:
    """The same logits, and so the same scores of labels, as with the rows in front of the text."""
    setup = prepared({**fields, "method": method})
    [start] = setup.starts
    base = AutoModelForCausalLM.from_pretrained(fields["model"]).eval()
    assert setup.rows.evaluation is not None
    setup.model.eval()
    for record in setup.rows.evaluation:
        [example] = setup.task.examples(record, setup.tokenizer)
        with torch.no_grad():
            found = setup.model(torch.tensor([example.input_ids])).logits[0]
            whole = base(torch.tensor([start.input_ids + example.input_ids])).logits[0]
        torch.testing.assert_close(found, whole[len(start.input_ids) :], atol=1e-4, rtol=1e-4)


def test_the_metrics_before_training_are_those_in_context(fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields({**fields, "learning_rate": 1e-12, "max_steps": 2}))
    assert report.before == report.after
    saved = json.loads(Path(fields["output"], "metrics.json").read_text())
    assert saved["before"] == report.before
    setup = prepared({**fields, "output": fields["output"] + "-2"})
    [start], rows = setup.starts, setup.rows.evaluation
    assert rows is not None
    scores = [scores_in_context(setup, record, [1] * len(start.input_ids)) for record in rows]
    answers = [LABELS[int(own.argmax())] for own in scores]
    assert report.before["accuracy"] == accuracy_score(rows["label"], answers)
    assert report.before["macro_f1"] == pytest.approx(f1_score(rows["label"], answers, average="macro"))
    alone = train(Recipe.from_fields({**fields, "start": "method", "max_steps": 2, "output": fields["output"] + "-3"}))
    assert alone.before.keys() == report.before.keys()


def scores_in_context(setup: Setup, record: Any, shown: list[int]) -> Tensor:
    """[labels] log-probabilities of the answers to a record by the base model, behind all of the start: a text and its
    answer do not attend to those of the start's tokens that are not shown."""
    [start], base = setup.starts, setup.model.get_base_model()
    found = []
    for label in LABELS:
        [example] = setup.task.examples({**record, "label": label}, setup.tokenizer)
        ids, before = [*start.input_ids, *example.input_ids], len(start.input_ids)
        sees = torch.ones(len(ids), len(ids)).tril().bool()
        sees[before:, :before] &= torch.tensor(shown).bool()
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = base(torch.tensor([ids]), attention_mask=mask[None, None]).logits[0]
        places = [before + i for i, label_id in enumerate(example.labels) if label_id != IGNORED]
        found.append(sum(logits[place - 1].log_softmax(-1)[ids[place]] for place in places))
    return torch.stack(found)


@pytest.mark.parametrize("size", [None, 60])
def test_leave_one_out_is_a_loop_over_rows(
    fields: dict[str, Any], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields |= {"test_size": 0, "options": {} if size is None else {"num_virtual_tokens": size}}
    with nullcontext() if size is None else pytest.warns(UserWarning, match="sample"):
        setup = prepared(fields)
    [start], rows, seen = setup.starts, setup.rows.training, list[Any]()
    monkeypatch.setattr("softtune.training.setup.judge", lambda *given: seen.append(given) or judge(*given))
    found = setup.evaluate_leave_one_out()
    scores, moved = [], 0
    for record in rows:
        alike = [row for row, text in enumerate(rows["words"]) if text == record["words"]]
        hidden = {place for row in alike for place in start.hidden[row]}
        every = [1] * len(start.input_ids)
        scores.append(scores_in_context(setup, record, [int(place not in hidden) for place in range(len(every))]))
        moved += not torch.allclose(scores[-1], scores_in_context(setup, record, every), atol=1e-3)
    assert 0 < moved <= len(rows)
    assert (moved == len(rows)) == (size is None)
    [(_, _, answers)] = seen
    torch.testing.assert_close(answers.scores, torch.stack(scores), atol=1e-4, rtol=1e-4)
    right = [LABELS[int(own.argmax())] == label for own, label in zip(scores, rows["label"], strict=True)]
    assert found["accuracy"] == pytest.approx(sum(right) / len(rows))


def test_leave_one_out_is_kept(fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields({**fields, "test_size": 0, "max_steps": 2}))
    before, after = report.leave_one_out
    assert before.keys() == after.keys() > {"accuracy"}
    saved = json.loads((report.folder / "metrics.json").read_text())
    assert (saved["leave_one_out"], saved["after"]) == ({"before": before, "after": after}, {})
    card = ModelCard.load(report.folder / "README.md")
    assert "Leave-one-out: on the training rows" in card.text
    assert f"| accuracy | {before['accuracy']:.1%} | {after['accuracy']:.1%} |" in card.text
    assert card.data.eval_results is None


def test_each_row_is_trained_without_its_own_tokens(fields: dict[str, Any], batches: list[dict[str, Tensor]]) -> None:
    report = train(Recipe.from_fields(fields))
    [start] = prepared({**fields, "output": fields["output"] + "-2"}).starts
    assert report.trained == len(start.input_ids) * 2 * 2 * 2 * 6  # P, layers, key and value, heads, head size
    tokenizer: Any = AutoTokenizer.from_pretrained(fields["model"])
    separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    seen = 0
    for batch in batches:
        for ids, mask, shown in zip(batch["input_ids"], batch["attention_mask"], batch["prefix_mask"], strict=True):
            own = ids[mask != 0].tolist() + separator
            hidden = [token for token, sees in zip(start.input_ids, shown.tolist(), strict=True) if not sees]
            copies = len(hidden) // len(own)  # rows with the same text are hidden, too
            assert copies >= 1
            assert hidden == own * copies
            seen += 1
    assert seen == 36


def test_rows_may_keep_their_own_tokens(fields: dict[str, Any], batches: list[dict[str, Tensor]]) -> None:
    train(Recipe.from_fields({**fields, "leave_one_out": False, "max_steps": 1}))
    assert all("prefix_mask" not in batch for batch in batches)


def test_rows_that_the_sample_left_out_see_all(fields: dict[str, Any], batches: list[dict[str, Tensor]]) -> None:
    with pytest.warns(UserWarning, match="sample"):
        train(Recipe.from_fields({**fields, "options": {"num_virtual_tokens": 30}}))
    masks = torch.cat([batch["prefix_mask"] for batch in batches if "prefix_mask" in batch])
    assert masks.shape[1] == 30
    assert masks.all(dim=1).any()
    assert not masks.all()


def test_a_resumed_run_draws_the_same_tokens(fields: dict[str, Any], tmp_path: Path) -> None:
    fields["options"] = {"token_dropout": 0.3}
    whole, broken = (Recipe.from_fields({**fields, "output": str(tmp_path / name)}) for name in ("whole", "broken"))
    train(whole)
    assert not train(broken, progress=interrupt_at(5)).finished
    assert train(broken, resume=True).finished
    a, b = (load_file(Path(recipe.output, "adapter_model.safetensors")) for recipe in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_members_of_an_ensemble_are_runs_of_their_own(fields: dict[str, Any], tmp_path: Path) -> None:
    """Each has an order of its own. Dropout is drawn for all at once, and so left out here."""
    fields |= {"options": {"token_dropout": 0.0}, "max_steps": 4, "test_size": 0}
    train(Recipe.from_fields({**fields, "ensemble": 2, "output": str(tmp_path / "both")}))
    for member in (0, 1):
        alone = {**fields, "seed": member, "data_seed": 0, "output": str(tmp_path / f"{member}")}
        train(Recipe.from_fields(alone))
        a, b = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (tmp_path / "both" / str(member + 1), tmp_path / f"{member}")
        )
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_folder_is_loaded_as_any_prefix(fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields(fields))
    base = AutoModelForCausalLM.from_pretrained(fields["model"])
    config = PeftModel.from_pretrained(base, report.folder).active_peft_config
    recipe = Recipe.from_adapter(report.folder)
    assert (recipe.start, recipe.options) == ("examples", {})
    assert config.token_dropout == 0.05
    assert config.num_virtual_tokens * 2 * 2 * 2 * 6 == report.trained


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "CPT"])
@pytest.mark.parametrize("kind", ["texts", "chat", "messages", "choices"])
def test_other_kinds_of_answers(fields: dict[str, Any], tmp_path: Path, kind: str, method: str) -> None:
    fields["method"] = method
    if kind in ("chat", "messages"):
        fields["model"] = save_chat_model(tmp_path / "chat", max_position_embeddings=768)
    if kind == "messages":
        rows = [
            {"m": [{"role": "user", "content": record["words"]}, {"role": "assistant", "content": record["label"]}]}
            for record in load_records(fields["train"])
        ]
        fields["train"] = write_lines(tmp_path / "rows.jsonl", rows)
        fields = {n: v for n, v in fields.items() if n not in ("template", "label_column", "labels")} | {
            "messages": "m"
        }
    if kind == "choices":
        rows = [
            {**record, "words": record["words"], "options": ["warm", "cold"]}
            for record in load_records(fields["train"])
        ]
        fields |= {"train": write_lines(tmp_path / "rows.jsonl", rows), "labels": None, "choices": "options"}
    fields |= {"texts": {"labels": None}, "chat": {"chat": True}}.get(kind, {})
    if kind in ("texts", "messages"):
        fields["max_new_tokens"] = 3
    fields |= {"max_length": 60, "test_size": 1 if kind == "texts" else 4, "max_steps": 2}
    report = train(Recipe.from_fields(fields))
    assert report.finished
    assert report.after


def write_lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "SEQ_CLS"}, "start: examples is for a decoder that writes answers: set task: CAUSAL_LM"),
        ({"method": "BITFIT"}, "for virtual tokens: set method to PREFIX_TUNING, .*, P_TUNING or CPT, or drop start"),
        ({"method": "PROMPT_TUNING", "leave_one_out": False}, "PROMPT_TUNING shows each row all examples: drop it"),
        ({"method": "PROMPT_TUNING", "options": {"prompt_tuning_init": "RANDOM"}}, "drop prompt_tuning_init, or start"),
        ({"method": "P_TUNING", "options": {"init_file": "adapter"}}, "drop init_file, or start"),
        ({"method": "P_TUNING", "template": "{prompt:3} {words}"}, "drop the template's virtual tokens, or start"),
        ({"options": {"prefix_projection": True}}, "a whole prompt in front of the text: drop prefix_projection"),
        ({"options": {"init_text": "warm"}}, "drop init_text, or start"),
        ({"options": {"placement": "infix"}}, "drop placement"),
        ({"options": {"shift_positions": False}}, "drop shift_positions"),
        ({"options": {"init_file": "adapter"}}, "drop init_file"),
        ({"options": {"layers": [0]}}, "drop layers"),
        ({"options": {"sites": ["decoder"]}}, "drop sites"),
        ({"start": "method", "leave_one_out": False}, "leave_one_out is for a prompt that starts from examples"),
        ({"start": "method", "example_separator": "x"}, "example_separator is for a prompt that starts from examples"),
        ({"start": "text"}, "start is 'text'"),
        ({"method": "CPT", "leave_one_out": False}, "CPT shows each row all examples: drop it"),
        (
            {"method": "CPT", "options": {"token_dropout": 0.1}},
            "token_dropout is for a prefix, and not for CPT: drop it",
        ),
        ({"method": "CPT", "options": {"cpt_token_ids": [3]}}, "drop cpt_token_ids, or start"),
        ({"method": "CPT", "options": {"num_virtual_tokens": "x"}}, "num_virtual_tokens"),
        ({"method": "CPT", "task": "SEQ_2_SEQ_LM"}, "is for a decoder that writes answers"),
        ({"method": "CPT", "start": "method"}, "no demonstrations: set start: examples, or cpt_token_ids in options"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_fields({**fields, **changes})


@pytest.mark.filterwarnings("ignore:the 18 examples have")  # more tokens than three
@pytest.mark.parametrize("method", ["PREFIX_TUNING", "CPT", "PROMPT_TUNING"])
def test_a_model_without_positions_for_examples(fields: dict[str, Any], method: str) -> None:
    full = {**fields, "method": method, "max_length": 512}
    with pytest.raises(ConfigError, match="512 positions, of which a text may take all: lower max_length, or set num_"):
        prepared(full)
    prepared({**full, "options": {"num_virtual_tokens": 3}})


def test_labels_without_an_example_are_named(fields: dict[str, Any]) -> None:
    changes = {"labels": ["warm", "cold", "good", "bad"]}
    with pytest.raises(DataError, match="rows is labelled 'good', 'bad': add rows, or drop the labels"):
        train(Recipe.from_fields({**fields, **changes}), progress=no_work)


def test_other_methods_and_baselines_of_a_comparison_start_as_they_do(fields: dict[str, Any]) -> None:
    names = {"name": "x", "number": 0, "seeds": 1}
    starts = {
        entry: Case.from_fields(fields, entry, {}, **names).recipe.start
        for entry in ("", "prefix-tuning", "bitfit", "prompt-tuning", "full", "cpt")
    }
    assert [*starts.values()] == ["examples", "examples", None, None, None, "examples"]


def test_rows_without_a_mask_see_all_beside_rows_with_one() -> None:
    rows = [Example(input_ids=[5, 6], labels=[IGNORED, 6], prefix_mask=mask) for mask in ([1, 0, 1], None)]
    assert Collator(0)(rows)["prefix_mask"].tolist() == [[1, 0, 1], [1, 1, 1]]
    assert "prefix_mask" not in Collator(0)(rows[1:])


def test_learning_rate_and_dropout_are_those_of_the_paper(fields: dict[str, Any]) -> None:
    recipe = Recipe.from_fields({**fields, "learning_rate": None})
    assert 1e-3 <= recipe.peak_learning_rate <= 3e-3
    assert recipe.config().token_dropout == 0.05
    plain = Recipe.from_fields({**fields, "learning_rate": None, "start": "method"})
    assert plain.peak_learning_rate == 1e-2
    assert plain.config().token_dropout == 0


# Virtual tokens at the input


VECTORS = [("PROMPT_TUNING", {}), ("P_TUNING", {"encoder_hidden_size": 128})]


@pytest.mark.parametrize(("method", "options"), VECTORS)
def test_virtual_tokens_at_the_input_start_from_examples(
    fields: dict[str, Any], method: str, options: dict[str, Any]
) -> None:
    """Before training a text has the logits that it has behind the examples' tokens."""
    setup = prepared({**fields, "method": method, "options": options, "start": None})
    [start], size = setup.starts, setup.model.adapter("default").config.num_virtual_tokens
    assert size == len(start.input_ids) == 100 < start.total
    text = setup.examples[0].input_ids
    with torch.no_grad():
        own = setup.model(input_ids=torch.tensor([text])).logits[0, -len(text) :]
        whole = setup.model.get_base_model()(torch.tensor([start.input_ids + text])).logits[0, -len(text) :]
    torch.testing.assert_close(own, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("method", "options"), VECTORS)
def test_more_virtual_tokens_than_examples_have_repeat_them(
    fields: dict[str, Any], method: str, options: dict[str, Any]
) -> None:
    fields |= {"start": None, "shots": 2}
    setup = prepared({**fields, "method": method, "options": {"num_virtual_tokens": 90, **options}})
    [start] = setup.starts
    assert len(start.input_ids) == start.total < 90
    ids = torch.tensor([start.input_ids[i % start.total] for i in range(90)])
    words = setup.model.get_base_model().get_input_embeddings().weight[ids]
    torch.testing.assert_close(setup.model.adapter("default").module(), words, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("options", "size"), [({}, 5), ({"num_virtual_tokens": 20}, 20)])
def test_virtual_tokens_beside_a_long_text(fields: dict[str, Any], options: dict[str, Any], size: int) -> None:
    """As many as leave a text its positions, unless the recipe says how many."""
    setup = prepared({**fields, "method": "PROMPT_TUNING", "options": options, "start": None, "max_length": 512 - 5})
    assert len(setup.starts[0].input_ids) == setup.model.adapter("default").config.num_virtual_tokens == size


def test_many_rows_are_sampled(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softtune.training.context_tuning.SAMPLED_ROWS", 4)
    seen: list[int] = []
    of_rows = Demonstrations.from_rows.__func__

    def noted(cls: Any, examples: Any, *rest: Any, **options: Any) -> Demonstrations:
        seen.append(len(examples))
        assert sorted(options["labels"]) == ["cold", "cold", "warm", "warm"]
        return of_rows(cls, examples, *rest, **options)

    monkeypatch.setattr(Demonstrations, "from_rows", classmethod(noted))
    prepared({**fields, "method": "PROMPT_TUNING", "start": None})
    assert seen == [4]


def test_a_sample_has_each_label_in_turn() -> None:
    examples = [row_of(4, 100 * number) for number in range(1, 9)]
    labels = ["a", "a", "a", "a", "a", "a", "b", "b"]
    groups = [[row] for row in range(8)]
    for seed in range(5):
        start = Demonstrations.from_rows(examples, [], groups=groups, labels=labels, size=16, most=None, seed=seed)
        assert sorted(labels[row] for row, places in start.hidden.items() if places) == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("changes", "is_start"),
    [
        ({"method": "PROMPT_TUNING"}, True),
        ({"method": "P_TUNING", "options": {"num_virtual_tokens": 7}}, True),
        ({"method": "PROMPT_TUNING", "options": {"prompt_tuning_init": "SAMPLE_VOCAB"}}, False),
        ({"method": "PROMPT_TUNING", "options": {"placement": "suffix"}}, False),
        ({"method": "P_TUNING", "options": {"init_file": "adapter"}}, False),
        ({"method": "P_TUNING", "template": "{prompt:3} {words}"}, False),
        ({"method": "PROMPT_TUNING", "start": "method"}, False),
        ({"method": "PROMPT_TUNING", "task": "SEQ_CLS"}, False),
        ({"method": "PROMPT_TUNING", "task": "SEQ_2_SEQ_LM"}, False),
        ({"method": "PREFIX_TUNING"}, False),
    ],
)
def test_examples_are_the_default_start_of_virtual_tokens_alone(
    fields: dict[str, Any], changes: dict[str, Any], is_start: bool
) -> None:
    recipe = Recipe.from_fields({**fields, "start": None, "learning_rate": None, **changes})
    assert starts_from_examples(recipe) is is_start
    assert (recipe.peak_learning_rate != recipe.config().peak_learning_rate(recipe.task)) is (
        is_start and recipe.method == "PROMPT_TUNING"
    )


# CPT

DECAY = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.8}


@pytest.fixture
def cpt_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "method": "CPT", "options": DECAY}


def slow_loss(base: Any, start: Demonstrations, rows: list[Example]) -> Tensor:
    """Of each row by itself behind the demonstrations' tokens, answer by answer; the last answers count most."""
    losses = []
    for row in rows:
        ids = [*start.input_ids, *row.input_ids]
        logits = base(torch.tensor([ids])).logits[0]
        last = max(start.types) // 4
        for place, kind in enumerate(start.types[1:], start=1):
            if kind % 4 == 0:
                loss = F.cross_entropy(logits[place - 1], torch.tensor(ids[place]))
                losses.append(loss * 0.8 ** (1 + last - kind // 4))
        for place, label in enumerate(row.labels, start=len(start.types)):
            if label != IGNORED:
                losses.append(F.cross_entropy(logits[place - 1], torch.tensor(label)))
    return torch.stack(losses).mean()


def test_the_rows_are_the_demonstrations(cpt_fields: dict[str, Any]) -> None:
    report = train(Recipe.from_fields(cpt_fields))
    [start] = prepared({**cpt_fields, "output": cpt_fields["output"] + "-2"}).starts
    base = AutoModelForCausalLM.from_pretrained(cpt_fields["model"])
    config: Any = PeftModel.from_pretrained(base, report.folder).active_peft_config
    assert config.cpt_token_ids == start.input_ids
    assert config.cpt_tokens_type_mask == start.types
    assert (config.opt_weighted_loss_type, config.opt_loss_decay_factor) == ("decay", 0.8)
    assert report.trained == len(start.input_ids) * 24
    recipe = Recipe.from_adapter(report.folder)
    assert (recipe.start, recipe.options) == ("examples", DECAY)
    assert "| examples in context |" in Path(report.folder, "README.md").read_text()


def test_the_loss_is_over_the_row_and_the_demonstrations(cpt_fields: dict[str, Any]) -> None:
    """Rows of several lengths, padded; and the loss and gradients of PEFT for a row by itself."""
    setup = prepared(cpt_fields)
    [start] = setup.starts
    base = AutoModelForCausalLM.from_pretrained(cpt_fields["model"])
    setup.model.train()
    found = setup.model(**Collator(0, padding_side="left")(setup.examples[:4])).loss
    torch.testing.assert_close(found, slow_loss(base, start, setup.examples[:4]), atol=1e-5, rtol=1e-5)
    tokens = {"cpt_token_ids": start.input_ids, "cpt_tokens_type_mask": start.types}
    theirs = peft.get_peft_model(base, peft.CPTConfig(task_type="CAUSAL_LM", **tokens, **DECAY)).train()
    row = Collator(0)(setup.examples[:1])
    own, other = setup.model(**row).loss, theirs(**row).loss
    torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    deltas = [model.prompt_encoder["default"].delta_embedding.weight for model in (setup.model, theirs)]
    (ours,), (expected,) = (torch.autograd.grad(*pair) for pair in zip((own, other), deltas, strict=True))
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_cpt_begins_in_context_and_learns(cpt_fields: dict[str, Any], batches: list[dict[str, Tensor]]) -> None:
    """Each row sees all demonstrations, and the first loss is that in context."""
    still = train(Recipe.from_fields({**cpt_fields, "learning_rate": 1e-12, "max_steps": 2}))
    assert still.before == still.after
    output = cpt_fields["output"] + "-2"
    wide = {"opt_projection_epsilon": 5.0, "opt_projection_format_epsilon": 5.0}
    report = train(Recipe.from_fields({**cpt_fields, "options": wide, "epochs": 6, "output": output, "test_size": 0}))
    assert report.leave_one_out == ({}, {})
    assert all("prefix_mask" not in batch for batch in batches)
    losses = [entry["loss"] for entry in json.loads(Path(output, "history.json").read_text())["default"]]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_a_resumed_run_of_cpt_has_the_same_demonstrations(cpt_fields: dict[str, Any], tmp_path: Path) -> None:
    whole, broken = (Recipe.from_fields({**cpt_fields, "output": str(tmp_path / name)}) for name in ("whole", "broken"))
    train(whole)
    assert not train(broken, progress=interrupt_at(5)).finished
    assert train(broken, resume=True).finished
    a, b = (load_file(Path(recipe.output, "adapter_model.safetensors")) for recipe in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_cpt_of_a_sample(cpt_fields: dict[str, Any]) -> None:
    """Only the sample is spoken of, since ``num_virtual_tokens`` is not left out."""
    fields = {**cpt_fields, "options": {"num_virtual_tokens": 30}, "max_steps": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = Recipe.from_fields(fields)
    with pytest.warns(UserWarning, match="the prompt 30: it starts from a sample") as spoken:
        report = train(recipe)
    assert not [line for line in spoken if "left out" in str(line.message)]
    assert report.trained == 30 * 24


def test_cpt_trains_one_adapter_at_a_time(cpt_fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="CPT trains one adapter at a time: run one recipe, without an ensemble"):
        train(Recipe.from_fields({**cpt_fields, "ensemble": 2}), progress=no_work)


def test_the_learning_rate_of_cpt_is_its_own(cpt_fields: dict[str, Any]) -> None:
    recipe = Recipe.from_fields({**cpt_fields, "learning_rate": None})
    assert recipe.peak_learning_rate == recipe.config().peak_learning_rate(recipe.task)
