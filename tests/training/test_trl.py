"""TRL's Trainers on chat models: their losses and gradients with soft prompts are those computed by hand, row by row.

TRL checkpoints gradients by default, here too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.families import CAUSAL_LM, METHODS, scramble
from tests.tiny import CHATML, MARKED, save_chat_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from softtune import PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL

KINDS = ["prompt", "prefix", "p_tuning_mlp", "p_tuning_lstm", "p_tuning_v2"]
BETA = 0.1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_chat_model(folder / name, text) for name, text in {"plain": CHATML, "marked": MARKED}.items()}


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


PREFERENCES = [
    {"prompt": said("user", ask), "chosen": said("assistant", good), "rejected": said("assistant", bad)}
    for ask, good, bad in [
        ("the red sky", "warm", "cold is bad"),
        ("blue", "cold and good", "warm"),
        ("sky", "is", "bad"),
    ]
]


def settings(folder: Path, rows: int, **changes: Any) -> dict[str, Any]:
    """Of one step on all rows at once."""
    own = {"output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": rows, "logging_steps": 1}
    own |= {"report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 1e9}
    return {**own, **changes}


def begun(trainer: Any, name: str, kind: str) -> PeftModel:
    """What training starts from, once its prompt is no longer a small one, on a base model that TRL has not touched."""
    scramble(trainer.model)
    assert issubclass(type(trainer.model), PeftModel)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), METHODS[kind](task_type=CAUSAL_LM)).eval()
    model.load_state_dict(trainer.model.state_dict())
    return model


def first(trainer: Any) -> dict[str, float]:
    """What the Trainer logs of its first step."""
    trainer.train()
    return dict(trainer.state.log_history[0])


def logprobs(model: Any, ids: Sequence[int], start: int) -> Tensor:
    """Log-probabilities of a row's tokens from ``start`` on, each after those before it."""
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


def check_gradient(model: PeftModel, loss: Tensor, logged: dict[str, float]) -> None:
    """Compare a loss, and the norm of its gradient by the trained tensors, with those of a step."""
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)
    assert logged["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


def tokenized(words: Any, messages: list[dict[str, str]], count: int) -> tuple[list[int], int]:
    """A conversation's ids, and how many of them precede its last ``count`` messages."""
    before = words.apply_chat_template(messages[:-count], add_generation_prompt=True)["input_ids"]
    return words.apply_chat_template(messages)["input_ids"], len(before)


@pytest.mark.parametrize("kind", KINDS)
def test_sft(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    """On the assistant's turns, of which a template with marks tells the tokens."""
    from trl import SFTConfig, SFTTrainer

    set_seed(0)
    talks = [[*row["prompt"], *row["chosen"], *said("user", "sky"), *row["rejected"]] for row in PREFERENCES]
    words = AutoTokenizer.from_pretrained(models["marked"])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(models["marked"]),
        args=SFTConfig(**settings(tmp_path, len(talks)), assistant_only_loss=True),
        train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]),
        processing_class=words,
        peft_config=METHODS[kind](task_type=CAUSAL_LM),
    )
    model = begun(trainer, models["marked"], kind)
    logged = first(trainer)
    scores = []
    for talk in talks:
        encoded = words.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        mask = torch.tensor(encoded["assistant_masks"][1:]).bool()
        scores.append(logprobs(model, encoded["input_ids"], 1)[mask])
    check_gradient(model, -torch.cat(scores).mean(), logged)


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_compares_with_the_base_model(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    set_seed(0)
    base, words = AutoModelForCausalLM.from_pretrained(models["plain"]), AutoTokenizer.from_pretrained(models["plain"])
    trainer = DPOTrainer(
        model=copy.deepcopy(base),
        args=DPOConfig(**settings(tmp_path, len(PREFERENCES)), beta=BETA),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=words,
        peft_config=METHODS[kind](task_type=CAUSAL_LM),
    )
    model = begun(trainer, models["plain"], kind)
    references = {
        answer: [float(logprobs(base, *tokenized(words, row["prompt"] + row[answer], 1)).sum()) for row in PREFERENCES]
        for answer in ("chosen", "rejected")
    }
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_ref_log_probs(trainer.model, batch)
    for answer, own in zip(references, found, strict=True):
        torch.testing.assert_close(own.sort().values, torch.tensor(references[answer]).sort().values)
    logged = first(trainer)
    own = {
        answer: torch.stack(
            [logprobs(model, *tokenized(words, row["prompt"] + row[answer], 1)).sum() for row in PREFERENCES]
        )
        for answer in references
    }
    margins = [own[answer] - torch.tensor(references[answer]) for answer in ("chosen", "rejected")]
    check_gradient(model, -logsigmoid(BETA * (margins[0] - margins[1])).mean(), logged)


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_of_a_trained_adapter_compares_with_what_it_was(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    """TRL keeps a copy of it, under the name ref."""
    from trl import DPOConfig, DPOTrainer

    set_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(models["plain"]), METHODS[kind](task_type=CAUSAL_LM))
    scramble(model)
    words, before = AutoTokenizer.from_pretrained(models["plain"]), copy.deepcopy(model).eval()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**settings(tmp_path, len(PREFERENCES), max_steps=2, learning_rate=0.1), beta=BETA),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=words,
    )
    assert first(trainer)["loss"] == pytest.approx(float(-logsigmoid(torch.tensor(0.0))), abs=1e-5)
    ids, start = tokenized(words, PREFERENCES[0]["prompt"] + PREFERENCES[0]["chosen"], 1)
    with torch.no_grad():
        expected = logprobs(before, ids, start)
        trainer.model.eval()
        assert not torch.allclose(logprobs(trainer.model, ids, start), expected, atol=1e-4)
        trainer.model.set_adapter("ref")
        torch.testing.assert_close(logprobs(trainer.model, ids, start), expected)


def grpo(folder: Path, name: str, kind: str, rewarded: Callable[..., list[float]], **changes: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    set_seed(0)
    arguments = GRPOConfig(**settings(folder, 4), num_generations=2, max_completion_length=6, beta=BETA, **changes)
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name),
        reward_funcs=rewarded,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES[:2]]),
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=METHODS[kind](task_type=CAUSAL_LM),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_grpo_writes_with_the_prompt(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    """As ``generate`` does, and otherwise than the base model alone."""
    seen: dict[str, list[int]] = {}

    def rewarded(prompts: Any, completion_ids: Any, **others: Any) -> list[float]:
        seen.update({talk[0]["content"]: ids for talk, ids in zip(prompts, completion_ids, strict=True)})
        return [float(len(ids)) for ids in completion_ids]

    trainer = grpo(tmp_path, models["plain"], kind, rewarded, generation_kwargs={"do_sample": False})
    model, words = begun(trainer, models["plain"], kind), trainer.processing_class
    trainer.train()
    assert len(seen) == 2
    alone = []
    for text, ids in seen.items():
        inputs = words.apply_chat_template(said("user", text), add_generation_prompt=True, return_tensors="pt")
        options = {**inputs, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
        written = model.generate(**options)[0, inputs["input_ids"].shape[1] :].tolist()
        assert written[: len(ids)] == ids
        with model.disable_adapter():
            alone.append(model.generate(**options)[0, inputs["input_ids"].shape[1] :].tolist()[: len(ids)] == ids)
    assert not all(alone)


@pytest.mark.parametrize("kind", KINDS)
def test_grpo_keeps_near_the_base_model(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    """Its loss has the advantages, and the divergence from the model without the prompt."""
    seen: list[tuple[list[int], list[int], float]] = []

    def rewarded(prompts: Any, completion_ids: Any, **others: Any) -> list[float]:
        rewards = [float(sum(ids)) for ids in completion_ids]
        for talk, ids, reward in zip(prompts, completion_ids, rewards, strict=True):
            begin = words.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
            seen.append((begin, ids, reward))
        return rewards

    base, words = AutoModelForCausalLM.from_pretrained(models["plain"]), AutoTokenizer.from_pretrained(models["plain"])
    trainer = grpo(tmp_path, models["plain"], kind, rewarded)
    model = begun(trainer, models["plain"], kind)
    logged = first(trainer)
    groups: dict[tuple[int, ...], list[float]] = {}
    for begin, _, reward in seen:
        groups.setdefault(tuple(begin), []).append(reward)
    losses, divergences = [], []
    for begin, ids, reward in seen:
        rewards = torch.tensor(groups[tuple(begin)])
        advantage = (reward - rewards.mean()) / (rewards.std() + 1e-4)
        own, reference = (logprobs(one, begin + ids, len(begin)) for one in (model, base))
        gap, ratio = reference.detach() - own, (own - own.detach()).exp()
        divergences.append(gap.exp() - gap - 1)
        losses.append(ratio * (BETA * divergences[-1] - advantage))
    assert logged["kl"] == pytest.approx(float(torch.cat(divergences).detach().mean()), rel=1e-4)
    assert logged["kl"] > 1e-3
    check_gradient(model, torch.cat(losses).mean(), logged)
