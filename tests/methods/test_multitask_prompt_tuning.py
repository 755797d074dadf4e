"""MPT: parity with PEFT, rows of several tasks in one batch, and what becomes of one task alone."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.families import (
    CAUSAL_LM,
    METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    P,
    adapted,
    answers,
    base_model,
    batch,
    labels_for,
    scramble,
    texts,
    trained,
)
from tests.tiny import save_models, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from softtune import (
    AdapterError,
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    DataError,
    MultitaskPromptTuningConfig,
    PeftModel,
    UnsupportedModelError,
    add_task_adapter,
    get_peft_model,
)
from softtune.adapter_context import prompts_cached
from softtune.compat import disable_checkpointing, enable_checkpointing
from softtune.experiments.cases import DEFAULT_ENTRIES, ENTRIES
from softtune.serving.prompt_export import export_prompt, load_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.past.key.values. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
N, R = 3, 2
TASKS = torch.tensor([2, 0, 2])
SOURCE = {"prompt_tuning_init_state_dict_path": "folder"}
NAMES = ("embedding.weight", "prefix_task_cols", "prefix_task_rows")


def fields(task: str = CAUSAL_LM, **others: Any) -> dict[str, Any]:
    return {"task_type": task, "num_virtual_tokens": P, "num_tasks": N, "num_ranks": R, **others}


def multitask(family: str = "gpt2", task: str = CAUSAL_LM, seed: int = 1, **others: Any) -> PeftModel:
    config = MultitaskPromptTuningConfig(**fields(task, **others))
    return scramble(get_peft_model(base_model(family, task), config), seed).eval()


def in_peft(ours: PeftModel, family: str, task: str = CAUSAL_LM, **others: Any) -> peft.PeftModel:
    """PEFT's model with the same numbers."""
    config = peft.MultitaskPromptTuningConfig(**fields(task, **others))
    theirs = peft.get_peft_model(base_model(family, task), config).eval()
    theirs.prompt_encoder["default"].load_state_dict(ours.prompt_encoder["default"].state_dict())
    if task == SEQ_CLS:
        theirs.classifier.modules_to_save["default"].load_state_dict(ours.heads["default"]["classifier"].state_dict())
    return theirs


def numbers(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    own = dict(model.prompt_encoder["default"].named_parameters())  # type: ignore[index,union-attr]
    return {name: own[name] for name in NAMES}


# Configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tasks": 0}, "num_tasks"),
        ({"num_ranks": 0}, "num_ranks"),
        ({"prompt_tuning_init": "SAMPLE_VOCAB"}, "prompt_tuning_init"),
        ({"prompt_tuning_init": "TEXT"}, "TEXT needs prompt_tuning_init_text"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "needs prompt_tuning_init_state_dict_path"),
        ({"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", **SOURCE}, "starts one task, and num_tasks is 3"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "has no use for tokenizer_kwargs"),
        ({"prompt_tuning_init_task": -1}, "prompt_tuning_init_task"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        MultitaskPromptTuningConfig(**fields(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("unused", [{"prompt_tuning_init_text": "red"}, SOURCE, {"prompt_tuning_init_task": 1}])
def test_fields_that_the_start_does_not_use_are_left_out_with_a_word(unused: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=f"{next(iter(unused))} of MultitaskPromptTuningConfig: left out"):
        config = MultitaskPromptTuningConfig(**fields(**unused))
    assert config == MultitaskPromptTuningConfig(**fields())


# Starts


def test_the_random_start_is_pefts() -> None:
    for library, config in (
        (get_peft_model, MultitaskPromptTuningConfig),
        (peft.get_peft_model, peft.MultitaskPromptTuningConfig),
    ):
        torch.manual_seed(0)
        model = library(
            base_model("llama", CAUSAL_LM), config(**fields() | {"num_virtual_tokens": 200, "num_ranks": 40})
        )
        found = {name: float(x.detach().std()) for name, x in numbers(model).items()}
        assert found == pytest.approx({"embedding.weight": 1, NAMES[1]: 0.02, NAMES[2]: 0.02}, rel=0.05)


def test_the_start_from_a_text_is_pefts(tmp_path: Path) -> None:
    tokenizer(ends=False).save_pretrained(tmp_path)
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the sky is blue", "num_virtual_tokens": 9}
    made = fields(**text, tokenizer_name_or_path=str(tmp_path)) | text
    ours = get_peft_model(base_model("gpt2", CAUSAL_LM), MultitaskPromptTuningConfig(**made))
    theirs = peft.get_peft_model(base_model("gpt2", CAUSAL_LM), peft.MultitaskPromptTuningConfig(**made))
    assert torch.equal(numbers(ours)["embedding.weight"], numbers(theirs)["embedding.weight"])


@pytest.mark.parametrize(
    ("start", "tasks"),
    [("AVERAGE_SOURCE_TASKS", 1), ("EXACT_SOURCE_TASK", 1), ("ONLY_SOURCE_SHARED", 1), ("ONLY_SOURCE_SHARED", 4)],
)
@pytest.mark.parametrize("saved_by", ["softtune", "peft"])
def test_starts_from_a_trained_adapter_are_pefts(start: str, tasks: int, saved_by: str, tmp_path: Path) -> None:
    source = multitask()
    (source if saved_by == "softtune" else in_peft(source, "gpt2")).save_pretrained(str(tmp_path))
    file = str(tmp_path / "adapter_model.safetensors")
    task = {"prompt_tuning_init_task": 2} if start == "EXACT_SOURCE_TASK" else {}
    made = fields(prompt_tuning_init=start, prompt_tuning_init_state_dict_path=file, **task) | {"num_tasks": tasks}
    ours = get_peft_model(base_model("gpt2", CAUSAL_LM), MultitaskPromptTuningConfig(**made))
    theirs = peft.get_peft_model(base_model("gpt2", CAUSAL_LM), peft.MultitaskPromptTuningConfig(**made))
    for name, expected in numbers(theirs).items():
        if start != "ONLY_SOURCE_SHARED" or name == "embedding.weight":
            torch.testing.assert_close(numbers(ours)[name], expected, atol=0, rtol=1e-6)
            assert not torch.equal(expected, torch.zeros_like(expected))
        else:
            assert numbers(ours)[name].shape == expected.shape
    from_folder = made | {"prompt_tuning_init_state_dict_path": str(tmp_path)}
    again = get_peft_model(base_model("gpt2", CAUSAL_LM), MultitaskPromptTuningConfig(**from_folder))
    assert torch.equal(numbers(again)["embedding.weight"], numbers(source)["embedding.weight"])


def test_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    multitask().save_pretrained(tmp_path / "source")
    adapted("gpt2", CAUSAL_LM, "prompt").save_pretrained(tmp_path / "prompt")
    start = fields(prompt_tuning_init="EXACT_SOURCE_TASK", num_tasks=1)
    for source, changes, error, message in (
        ("source", {"prompt_tuning_init_task": 3}, ConfigError, "the source has 3 tasks"),
        (
            "source",
            {"num_ranks": 4},
            CheckpointError,
            r"has prefix_task_cols \[1, 5, 2\], the config asks for \[1, 5, 4\]",
        ),
        ("source", {"num_virtual_tokens": 6}, CheckpointError, "change num_virtual_tokens, num_ranks or the source"),
        ("prompt", {}, CheckpointError, "has no prefix_task_cols: name an adapter of multitask prompt tuning"),
        ("nothing.safetensors", {}, CheckpointError, "no prompt can be read from"),
        ("adapter_model.bin", {}, CheckpointError, "is pickled, which can run code"),
    ):
        config = MultitaskPromptTuningConfig(
            **start | changes | {"prompt_tuning_init_state_dict_path": str(tmp_path / source)}
        )
        with pytest.raises(error, match=message) as found:
            get_peft_model(base_model("gpt2", CAUSAL_LM), config)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "ONLY_SOURCE_SHARED"])
def test_pefts_sources_of_encoder_decoders_start_as_they_load(start: str, tmp_path: Path) -> None:
    config = peft.MultitaskPromptTuningConfig(**fields(SEQ_2_SEQ_LM))
    theirs = peft.get_peft_model(base_model("t5", SEQ_2_SEQ_LM), config)
    scramble(theirs).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    loaded = numbers(PeftModel.from_pretrained(base_model("t5", SEQ_2_SEQ_LM), tmp_path))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        source = {"prompt_tuning_init": start, "prompt_tuning_init_state_dict_path": str(path)}
        made = MultitaskPromptTuningConfig(**fields(SEQ_2_SEQ_LM, **source) | {"num_tasks": 1})
        found = numbers(get_peft_model(base_model("t5", SEQ_2_SEQ_LM), made))
        assert torch.equal(found["embedding.weight"], loaded["embedding.weight"])
        for name in NAMES[1:] if start == "AVERAGE_SOURCE_TASKS" else ():
            torch.testing.assert_close(found[name], loaded[name].mean(0, keepdim=True))


def test_a_source_of_another_base_model_is_refused(tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(**fields())
    get_peft_model(base_model("gpt2", CAUSAL_LM, seed=4), config).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        source = {"prompt_tuning_init": "ONLY_SOURCE_SHARED", "prompt_tuning_init_state_dict_path": str(path)}
        with pytest.raises(AdapterMismatchError, match="another base model"):
            get_peft_model(base_model("gpt2", CAUSAL_LM), MultitaskPromptTuningConfig(**fields(**source)))


# Parity


def test_the_modules_vectors_are_pefts() -> None:
    ours = multitask()
    theirs = in_peft(ours, "gpt2")
    indices = torch.arange(P).expand(3, -1)
    vectors = ours.prompt_encoder["default"](indices, TASKS)
    torch.testing.assert_close(vectors, theirs.prompt_encoder["default"](indices, TASKS))
    torch.testing.assert_close(ours.get_prompt(3, task_ids=TASKS), vectors)
    assert torch.equal(ours.get_prompt_embedding_to_save("default"), theirs.get_prompt_embedding_to_save("default"))
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        theirs.prompt_encoder["default"](indices, None)


@pytest.mark.promise(6, methods=("multitask",))
@pytest.mark.parametrize(
    ("family", "task"), [("gpt2", CAUSAL_LM), ("llama", CAUSAL_LM), ("bert", SEQ_CLS), ("t5", SEQ_2_SEQ_LM)]
)
def test_outputs_losses_and_gradients_are_pefts(family: str, task: str) -> None:
    """Of an encoder-decoder, where PEFT has vectors in front of the encoder's text alone."""
    single = {"num_transformer_submodules": 1}
    ours = multitask(family, task, **single)
    theirs = in_peft(ours, family, task, **single)
    inputs = batch(texts(family, task))
    labels = labels_for(task, inputs)
    given = {**inputs, "labels": labels, "task_ids": TASKS}
    found, expected = ours(**given), theirs(**given)
    is_text = inputs["attention_mask"].bool()
    logits, wanted = found.logits, expected.logits
    if task == CAUSAL_LM:
        logits, wanted = logits[is_text], wanted[:, P:][is_text]
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
    expected.loss.backward()
    for name, parameter in numbers(ours).items():
        gradient = numbers(theirs)[name].grad
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    assert not numbers(ours)["prefix_task_cols"].grad[1].any()  # type: ignore[index]


# Rows


@pytest.mark.promise(2, methods=("multitask",))
@pytest.mark.parametrize(
    ("family", "task"), [("gpt2", CAUSAL_LM), ("gemma3", CAUSAL_LM), ("bert", SEQ_CLS), ("t5", SEQ_2_SEQ_LM)]
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_as_if_alone(family: str, task: str, side: str) -> None:
    """Beside rows of other tasks, of other adapters and of none."""
    model = multitask(family, task)
    model.add_adapter("other", MultitaskPromptTuningConfig(**fields(task) | {"num_tasks": 1, "num_virtual_tokens": 2}))
    model.add_adapter("plain", METHODS["prompt"](task_type=task))
    names, ids = ["default", "other", "__base__", "plain", "default", "default"], [1, 0, 7, 5, 0, 1]
    rows = texts(family, task, (7, 4, 2, 5, 3, 6))
    inputs = {**batch(rows, side), **answers(task, 6)}
    found = model(**inputs, adapter_names=names, task_ids=torch.tensor(ids)).logits
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        alone = {"input_ids": row[None], **{n: x[number : number + 1] for n, x in answers(task, 6).items()}}
        own = {"adapter_names": [name]} | ({"task_ids": ids[number : number + 1]} if name == "default" else {})
        expected = model(**alone, **own).logits[0]
        mask = inputs["attention_mask"][number].bool()
        logits = found[number][mask] if task == CAUSAL_LM else found[number]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_gradients_of_a_task_are_those_of_its_rows() -> None:
    model, rows = multitask(), texts("gpt2", CAUSAL_LM)
    inputs = batch(rows)
    model(**inputs, task_ids=TASKS).logits[inputs["attention_mask"].bool()].square().sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in trained(model).items()}  # type: ignore[union-attr]
    model.zero_grad()
    for row, task in zip(rows, TASKS.tolist(), strict=True):
        model(row[None], task_ids=[task]).logits.square().sum().backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(together[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_training_is_watched_by_the_adapters_own_names() -> None:
    model = multitask().train()
    numbers(model)["embedding.weight"].data.zero_()
    with pytest.warns(UserWarning, match=r"no gradient.*") as said:
        model(torch.tensor([[5, 6], [7, 8]]), task_ids=[0, 1]).logits.sum().backward()
    assert str(said[0].message).count("default.prefix_task_cols") == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = multitask("llama").train()
    inputs = batch(texts("llama", CAUSAL_LM), "left")
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            enable_checkpointing(model.get_base_model(), use_reentrant=reentrant)
        model(**inputs, labels=labels_for(CAUSAL_LM, inputs), task_ids=TASKS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in trained(model).items()})  # type: ignore[union-attr]
        model.zero_grad()
    disable_checkpointing(model.get_base_model())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.promise(2, methods=("multitask",))
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_of_each_rows_task(beams: int) -> None:
    model, rows = multitask(), texts("gpt2", CAUSAL_LM, (5, 3, 4))
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    found = model.generate(**batch(rows, "left"), task_ids=TASKS, **settings)
    alone = [
        model.generate(row[None], task_ids=[task], **settings) for row, task in zip(rows, TASKS.tolist(), strict=True)
    ]
    assert [row.tolist() for row in found[:, -5:]] == [row[0, -5:].tolist() for row in alone]
    assert len({tuple(model.generate(rows[0][None], task_ids=[t], **settings)[0].tolist()) for t in range(N)}) > 1


def test_generation_is_pefts() -> None:
    """Without a cache, beside which PEFT 0.21.2 inserts the prompt again at each step with transformers 5.24."""
    ours, inputs = multitask(), batch(texts("gpt2", CAUSAL_LM, (5, 5, 5)))
    settings = {"task_ids": TASKS, "max_new_tokens": 5, "do_sample": False}
    expected = in_peft(ours, "gpt2").generate(**inputs, use_cache=False, **settings)
    assert torch.equal(ours.generate(**inputs, **settings), expected)


@pytest.mark.promise(4, methods=("multitask",))
def test_pefts_folders_of_encoder_decoders_generate_as_there(tmp_path: Path) -> None:
    """PEFT trains 2P vectors: forward reads P in the encoder and P in the decoder, ``generate`` the first P alone."""
    theirs = peft.get_peft_model(
        base_model("t5", SEQ_2_SEQ_LM), peft.MultitaskPromptTuningConfig(**fields(SEQ_2_SEQ_LM))
    )
    scramble(theirs).eval().save_pretrained(str(tmp_path))  # type: ignore[arg-type,attr-defined]
    ours = PeftModel.from_pretrained(base_model("t5", SEQ_2_SEQ_LM), tmp_path)
    inputs = batch(texts("t5", SEQ_2_SEQ_LM))
    settings = {"task_ids": TASKS, "max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    expected = theirs.generate(**inputs, **settings)
    assert torch.equal(ours.generate(**inputs, **settings), expected)
    with ours.disable_adapter():
        assert not torch.equal(ours.generate(**inputs, **settings), expected)


# What says no task, or a wrong one


def test_a_single_task_needs_no_ids() -> None:
    model = multitask(num_tasks=1)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, model(ids, task_ids=[0]).logits)
    assert torch.equal(model(ids).logits, model(ids, task_ids=torch.tensor([0])).logits)
    with pytest.raises(AdapterError, match="there is no task 1, the adapter has 1: count its tasks from 0"):
        model(ids, task_ids=[1])


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_ids_that_do_not_fit_are_refused(call: str) -> None:
    model, ids = multitask(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    settings = {"max_new_tokens": 2} if call == "generate" else {}
    for tasks, error, message in (
        (None, AdapterError, r"adapter 'default' has 3 tasks, and no row says which: give each row's, as in task_ids="),
        ([0, 3], AdapterError, "there is no task 3, the adapter has 3"),
        (torch.tensor([-1, 0]), AdapterError, "there is no task -1"),
        ([0], DataError, r"task_ids \[1\] do not fit 2 rows"),
        (torch.tensor(1), DataError, r"task_ids \[\] do not fit 2 rows"),
        (torch.tensor([[0, 1]]), DataError, r"task_ids \[1, 2\] do not fit 2 rows"),
        (torch.tensor([0.0, 1.0]), DataError, r"task_ids \[0.0, 1.0\] are not one whole number for each row"),
    ):
        with pytest.raises(error, match=message) as found:
            getattr(model, call)(ids, task_ids=tasks, **settings)
        assert "\n" not in str(found.value)
    with pytest.raises(AdapterError, match="task_ids is for adapters with several tasks, and no row has one"):
        getattr(adapted("gpt2", CAUSAL_LM, "prompt"), call)(ids, task_ids=[0, 0], **settings)
    with model.disable_adapter():
        getattr(model, call)(ids, task_ids=[0, 1], **settings)


def test_a_cache_belongs_to_a_task() -> None:
    model, cache, ids = multitask(), DynamicCache(), torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    text = model.generate(ids, task_ids=[1], cache=cache, **settings)
    longer = torch.cat([text, torch.tensor([[4]])], dim=1)
    with pytest.raises(AdapterError, match="computed with default/task 1, not default/task 0: leave it out"):
        model.generate(longer, task_ids=[0], cache=cache, **settings)
    expected = model.generate(longer, task_ids=[1], **settings)
    assert torch.equal(model.generate(longer, task_ids=[1], cache=cache, **settings), expected)


def test_prompts_are_cached_by_task() -> None:
    model, ids = multitask("llama"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = [model(ids, task_ids=[task]).logits for task in range(N)]
        with prompts_cached():
            for _ in range(2):
                for task in range(N):
                    assert torch.equal(model(ids, task_ids=[task]).logits, expected[task])
    assert not torch.equal(expected[0], expected[1])


# Folders, one task alone, Trainers


@pytest.mark.promise(4, methods=("multitask",))
@pytest.mark.parametrize(("family", "task"), [("gpt2", CAUSAL_LM), ("bert", SEQ_CLS)])
def test_folders_go_both_ways(family: str, task: str, tmp_path: Path) -> None:
    ours = multitask(family, task)
    theirs = in_peft(ours, family, task)
    inputs = batch(texts(family, task, (4, 4, 4)))
    expected = ours(**inputs, task_ids=TASKS).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    read = peft.PeftModel.from_pretrained(base_model(family, task), str(tmp_path / "ours")).eval()
    logits = read(**inputs, task_ids=TASKS).logits
    torch.testing.assert_close(logits[:, P:] if task == CAUSAL_LM else logits, expected, atol=1e-5, rtol=1e-4)
    for trains in (False, True):
        own = PeftModel.from_pretrained(base_model(family, task), tmp_path / "theirs", is_trainable=trains).eval()
        torch.testing.assert_close(own(**inputs, task_ids=TASKS).logits, expected, atol=1e-6, rtol=1e-6)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_what_peft_would_misread_keeps_its_factors(tmp_path: Path) -> None:
    """Marian multiplies its words, which PEFT does not."""
    ours = multitask("marian", SEQ_2_SEQ_LM)
    ours.save_pretrained(tmp_path)
    names = {"softtune.prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}
    assert {*load_file(tmp_path / "adapter_model.safetensors")} == names
    inputs = {**batch(texts("marian", SEQ_2_SEQ_LM)), **answers(SEQ_2_SEQ_LM, 3), "task_ids": TASKS}
    read = PeftModel.from_pretrained(base_model("marian", SEQ_2_SEQ_LM), tmp_path)
    assert torch.equal(read(**inputs).logits, ours(**inputs).logits)


@pytest.mark.parametrize(("family", "task"), [("llama", CAUSAL_LM), ("bert", SEQ_CLS)])
def test_one_task_becomes_an_adapter_of_its_own(family: str, task: str, tmp_path: Path) -> None:
    model = multitask(family, task)
    inputs = batch(texts(family, task))
    expected = model(**inputs, task_ids=[2, 2, 2]).logits
    add_task_adapter(model, 2, "second")
    model.set_adapter("second")
    assert torch.equal(model(**inputs).logits, expected)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    read = PeftModel.from_pretrained(base_model(family, task), tmp_path / "second")
    assert torch.equal(read(**inputs).logits, expected)
    theirs = peft.PeftModel.from_pretrained(base_model(family, task), str(tmp_path / "second"))
    assert type(theirs.peft_config["default"]) is peft.PromptTuningConfig
    with pytest.raises(AdapterError, match="there is no task 3, the adapter has 3"):
        add_task_adapter(model, 3, "third")
    with pytest.raises(AdapterError, match="'second' has no tasks of its own"):
        add_task_adapter(model, 0, "third", source="second")
    assert [*model.peft_config] == ["default", "second"]


def test_one_task_keeps_the_chat_template() -> None:
    model = multitask("llama")
    model.chat_templates["default"] = "{{ messages }}"
    add_task_adapter(model, 1, "second")
    assert model.adapter("second").chat_template == "{{ messages }}"


def test_a_server_takes_one_task(tmp_path: Path) -> None:
    base = save_models(tmp_path)["llama"]
    load = AutoModelForCausalLM.from_pretrained
    for number in (1, 3):
        config = MultitaskPromptTuningConfig(**fields(num_tasks=number) | {"num_tasks": number})
        scramble(PeftModel(load(base), config)).save_pretrained(tmp_path / str(number))
    backbone = PeftModel(load(base).eval()).backbone
    adapter = load_adapter(backbone, tmp_path / "1")
    exported = export_prompt(backbone, adapter, as_kv=False)
    assert torch.equal(exported.vectors, adapter.module.prompt(0).vectors)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"has prompts for 3 tasks, .*: make each an adapter of its own by"):
        load_adapter(backbone, tmp_path / "3")
    with pytest.raises(AdapterError, match="the adapter has 3 tasks, and none is named: make one an adapter"):
        multitask().adapter("default").prompt()


def test_a_trainer_hands_the_tasks_over(tmp_path: Path) -> None:
    """As a column of the data set, among those that it would drop."""
    model = multitask().train()
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "task_ids": task, "other": 1} for task in (0, 2, 0, 2)]
    before = {name: parameter.detach().clone() for name, parameter in numbers(model).items()}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    if "task_ids" not in columns(trainer):  # where PEFT is loaded, the Trainer looks at the base model
        arguments.remove_unused_columns = False
        for row in rows:
            del row["other"]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    changed = (numbers(model)["prefix_task_cols"] != before["prefix_task_cols"]).flatten(1).any(1)
    assert changed.tolist() == [True, False, True]


def columns(trainer: Trainer) -> list[str]:
    trainer._set_signature_columns_if_needed()
    return list(trainer._signature_columns or ())


def test_forward_names_its_arguments() -> None:
    assert {"task_ids", "input_type_mask"} <= {*inspect.signature(multitask().forward).parameters}


def test_it_is_compared_where_it_is_named() -> None:
    assert "multitask-prompt-tuning" in ENTRIES
    assert "multitask-prompt-tuning" not in DEFAULT_ENTRIES


def test_exported_graphs_have_a_fixed_task() -> None:
    model = multitask("llama")
    ids: Tensor = torch.tensor([[5, 6, 7], [8, 9, 10]])
    expected = model(ids, task_ids=[1, 1]).logits
    graph = torch.export.export(model, (), {"input_ids": ids, "task_ids": [1, 1], "use_cache": False}).module()
    torch.testing.assert_close(
        graph(input_ids=ids, task_ids=[1, 1], use_cache=False).logits, expected, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(UnsupportedModelError, match="a graph is for tasks that are fixed: give task_ids as a list"):
        torch.export.export(model, (), {"input_ids": ids, "task_ids": torch.tensor([1, 1])})
