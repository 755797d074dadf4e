"""The data sets and methods of the study of soft adapters beside LoRA: budgets, sizes and starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softtune.experiments.baselines import BASELINES

ROOT = Path(__file__).parents[1]
INTENTS = 20
MATCHED_RANK = 2
"""LoRA's rank at which it trains as many numbers as the soft adapters."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One set, and the budget of its runs."""

    title: str
    recipe: Path
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the recipe to replace."""
    steps: int
    """Steps of the runs with equal steps."""
    seconds: float
    """Processor seconds of the others."""
    held_out: int
    """Training rows that choose the learning rate."""


def recipe(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


def sets(files: Path) -> dict[str, DataSet]:
    """The sets by name.

    Args:
        files: folder of the files that ``write_files`` writes.
    """
    tweets, requests = files / "twitter_complaints", files / "clinc"
    return {
        "clinc": DataSet(
            title="CLINC, 20 intents: accuracy",
            recipe=recipe("clinc"),
            fields={
                "train": str(requests / "train.jsonl"),
                "evaluation": str(requests / "test.jsonl"),
                "evaluation_split": "train",
                "columns": None,
                "labels": [str(number) for number in range(INTENTS)],
                "batch_size": 16,
            },
            steps=80,
            seconds=40,
            held_out=200,
        ),
        "twitter_complaints": DataSet(
            title="Twitter complaints: accuracy",
            recipe=recipe("twitter_complaints"),
            fields={"train": str(tweets / "train.csv"), "evaluation": str(tweets / "test.csv"), "batch_size": 4},
            steps=20,
            seconds=40,
            held_out=10,
        ),
        "btc_ner": DataSet(
            title="Broad Twitter Corpus: F1",
            recipe=recipe("btc_ner"),
            fields={"examples": 2048, "evaluation_examples": 400},
            steps=56,
            seconds=40,
            held_out=200,
        ),
        "sst2": DataSet(
            title="SST-2: accuracy",
            recipe=recipe("sst2"),
            fields={
                "evaluation": "data/sst2/stsa.binary.test",
                "examples": 512,
                "evaluation_examples": 300,
                "batch_size": 4,
            },
            steps=32,
            seconds=64,
            held_out=64,
        ),
        "rte": DataSet(
            title="RTE: accuracy",
            recipe=recipe("rte"),
            fields={"evaluation_examples": 150, "batch_size": 4},
            steps=18,
            seconds=92,
            held_out=48,
        ),
        "e2e": DataSet(
            title="E2E: BLEU",
            recipe=recipe("e2e"),
            fields={"examples": 1024, "evaluation_examples": 60, "batch_size": 4},
            steps=34,
            seconds=104,
            held_out=24,
        ),
        "scitldr": DataSet(
            title="SciTLDR: BLEU",
            recipe=recipe("scitldr"),
            fields={"evaluation_examples": 30, "batch_size": 2},
            steps=18,
            seconds=110,
            held_out=16,
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method with its options, or a baseline with its own."""

    title: str
    entry: str
    """One of the entries of ``softtune compare``."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Recipe fields; ``options.name`` is an option of a baseline."""

    @property
    def is_ours(self) -> bool:
        return self.entry not in BASELINES


MATCHED, RANK_8 = "lora-matched", "lora-r8"
TELLING = ("prefix", "prefix-ia3", "all", MATCHED, RANK_8)
"""The methods that run first, since the project's bounds speak of them."""


def ways(recipe: Mapping[str, Any]) -> dict[str, Way]:
    """The methods by name, with sizes and starts for the recipe's base model.

    Args:
        recipe: the recipe's fields, whose ``options`` may have a text to start from.
    """
    adapters = _of_encoders() if recipe["model"] == "minilm" else _of_decoders(recipe.get("options", {}))
    return {
        **adapters,
        MATCHED: Way(title=f"LoRA r{MATCHED_RANK}", entry="lora", changes={"options.rank": MATCHED_RANK}),
        RANK_8: Way(title="LoRA r8", entry="lora"),
        "full": Way(title="full fine-tuning", entry="full"),
    }


def _of_decoders(options: Mapping[str, Any]) -> dict[str, Way]:
    """Soft adapters for SmolLM2-135M: prefixes start from a text where the recipe has one, prompt tuning from training
    rows."""
    text = {"init_text": options["init_text"]} if "init_text" in options else {}
    return _adapters(
        prefix=("PREFIX_TUNING", 53, text),
        beside_ia3=48,
        beside_all=15,
        memory={"share_heads": True, "layers": "last:15"},
        biases={"add_missing": True},
        prompt={},
    )


def _of_encoders() -> dict[str, Way]:
    """Soft adapters for MiniLM with a head."""
    return _adapters(
        prefix=("P_TUNING_V2", 18, {}),
        beside_ia3=15,
        beside_all=4,
        memory={"layers": "last:2"},
        biases={},
        prompt={"num_virtual_tokens": 20},
    )


def _adapters(
    *,
    prefix: tuple[str, int, dict[str, Any]],
    beside_ia3: int,
    beside_all: int,
    memory: dict[str, Any],
    biases: dict[str, Any],
    prompt: dict[str, Any],
) -> dict[str, Way]:
    """The soft adapters by name.

    Args:
        prefix: its method, its virtual tokens where it stands alone, and its start.
        beside_ia3: virtual tokens beside IA3.
        beside_all: virtual tokens beside IA3, a memory and biases.
        memory: options of the memory.
        biases: options of BitFit.
        prompt: options of prompt tuning.
    """
    method, alone, start = prefix
    scaling = {"peft_type": "IA3"}

    def virtual(number: int) -> dict[str, Any]:
        return {"num_virtual_tokens": number, **start}

    def combined(title: str, number: int, *others: dict[str, Any]) -> Way:
        parts = [{"peft_type": method, **virtual(number)}, scaling, *others]
        return Way(title=title, entry="combined", changes={"options": {"parts": parts}})

    return {
        "prefix": Way(title="prefix", entry=method.lower().replace("_", "-"), changes={"options": virtual(alone)}),
        "prefix-ia3": combined("prefix and IA3", beside_ia3),
        "all": combined(
            "prefix, memory, IA3, biases",
            beside_all,
            {"peft_type": "PREFIX_MEMORY", **memory},
            {"peft_type": "BITFIT", **biases},
        ),
        "prompt-tuning": Way(title="prompt tuning", entry="prompt-tuning", changes={"options": prompt}),
    }
