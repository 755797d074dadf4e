"""Context tuning: Lu et al. 2025, "Context Tuning for In-Context Optimization", arXiv 2507.04221 (CT-KV); and the
demonstrations of context-aware prompt tuning (``methods/cpt.py``).

A prefix starts from labelled rows, formatted one behind the other as for in-context learning: from the keys and values
that the frozen model computes for them. Before training it answers as the model does with these rows in its prompt.
While it is trained on a row, the row's own tokens are hidden (leave one out), and others at random (token dropout).

CPT, prompt tuning and P-tuning start from the token embeddings of the same text; CPT knows their types too. These are
trained, as in CPT's paper, on each row with the row itself among the demonstrations.

Where the rows have more tokens than the prompt, it starts from a random sample, with each label in turn. Letter: P
virtual tokens.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from softtune.data import Template
from softtune.data.encoding import IGNORED, Example, token_ids
from softtune.data.records import each_row
from softtune.errors import ConfigError
from softtune.peft_types import PeftType, TaskType
from softtune.tasks import Task
from softtune.tasks.texts import alike
from softtune.training.recipe_fields import RecipeFields

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOKEN_DROPOUT = 0.05
"""Default token dropout of a prefix that starts from examples, as in the paper."""
TOKENS = 100
"""Virtual tokens at the input that start from examples at most by default, as many as Lester et al. 2021 take."""
SAMPLED_ROWS = 1000
"""Training rows that these are drawn from at most, so that not all of many rows are encoded twice."""
KEYS_AND_VALUES = (PeftType.PREFIX_TUNING, PeftType.P_TUNING_V2)
"""The methods whose prompts start from keys and values of examples."""
VECTORS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
"""The methods whose prompts start from token embeddings of examples, by default."""
LEARNING_RATES = {**dict.fromkeys(KEYS_AND_VALUES, 1e-3), PeftType.PROMPT_TUNING: 1e-2}
"""Default peak learning rates of prompts that start from examples, where they are not the method's."""
FIXED = {
    "prefix_projection": False,
    "embedding_only": False,
    "placement": "prefix",
    "shift_positions": True,
    "init_weights": None,
    "init_text": None,
    "init_file": None,
    "prompt_tuning_init": None,
    "prompt_tuning_init_file": None,
    "prompt_tuning_init_labels": None,
    "prompt_tuning_init_text": None,
    "layers": None,
    "sites": None,
}
"""Options of these methods that leave the start as it is, by their names."""
OF_EXAMPLES = {"leave_one_out": True, "example_separator": None}
"""Recipe fields of a start from examples, as they are without one."""
DEMONSTRATED = ("cpt_token_ids", "cpt_tokens_type_mask", "cpt_mask")
"""Options of CPT that describe its demonstrations."""
LINE_BETWEEN = "\n\n"
"""Text behind each example, but for conversations, whose turns have an end of their own."""

INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE, OUTPUT = 1, 2, 3, 4
"""PEFT's types of the tokens of the first example (``CPTConfig.cpt_tokens_type_mask``); 4 more for each further one."""


def starts_from_examples(recipe: RecipeFields) -> bool:
    """Whether a recipe's prompt starts from its training rows: where it says so, and by default where virtual tokens at
    the input start from nothing else."""
    if recipe.start is not None or recipe.method not in VECTORS:
        return recipe.start == "examples"
    is_free = recipe.task is TaskType.CAUSAL_LM and not Template(recipe.template).num_virtual_tokens
    return is_free and not _other_start(recipe)


def _other_start(recipe: RecipeFields) -> str | None:
    """An option that says that the prompt starts from something else, or is none in front of the text."""
    return next((name for name, value in FIXED.items() if recipe.options.get(name, value) != value), None)


def check_start(recipe: RecipeFields) -> None:
    """Check that the recipe's fields fit where its prompt starts.

    Raises:
        ValueError: they do not.
    """
    if not starts_from_examples(recipe):
        for name, default in OF_EXAMPLES.items():
            if getattr(recipe, name) != default:
                raise ValueError(f"{name} is for a prompt that starts from examples: set start: examples, or drop it")
        if recipe.method is PeftType.CPT and recipe.options.get("cpt_token_ids") is None:
            raise ValueError("CPT has no demonstrations: set start: examples, or cpt_token_ids in options")
        return
    if recipe.task is not TaskType.CAUSAL_LM:
        raise ValueError("start: examples is for a decoder that writes answers: set task: CAUSAL_LM, or drop start")
    if recipe.method not in KEYS_AND_VALUES and not recipe.leave_one_out:
        raise ValueError(
            f"leave_one_out is for a prefix, and {recipe.method.value} shows each row all examples: drop it"
        )
    if recipe.method is PeftType.CPT:
        _check_cpt(recipe)
        return
    if recipe.method not in (*KEYS_AND_VALUES, *VECTORS):
        able = ", ".join(method.value for method in (*KEYS_AND_VALUES, *VECTORS))
        raise ValueError(f"start: examples is for virtual tokens: set method to {able} or CPT, or drop start")
    if Template(recipe.template).num_virtual_tokens:
        raise ValueError("start: examples is in front of the text: drop the template's virtual tokens, or start")
    if other := _other_start(recipe):
        raise ValueError(f"start: examples is a whole prompt in front of the text: drop {other}, or start")


def _check_cpt(recipe: RecipeFields) -> None:
    if given := [name for name in DEMONSTRATED if name in recipe.options]:
        raise ValueError(f"start: examples makes the demonstrations of the training rows: drop {given[0]}, or start")
    if "token_dropout" in recipe.options:
        raise ValueError("token_dropout is for a prefix, and not for CPT: drop it")


def options_before(recipe: RecipeFields) -> dict[str, Any]:
    """Fields of the method's config, unless the recipe's options have them, of a prompt whose examples are not read
    yet."""
    if not starts_from_examples(recipe) or recipe.method in VECTORS:
        return {}
    if recipe.method is not PeftType.CPT:
        return {"token_dropout": TOKEN_DROPOUT}
    size = recipe.options.get("num_virtual_tokens")
    return {"cpt_token_ids": [0] * size} if isinstance(size, int) else {}


def hides_own_tokens(recipe: RecipeFields) -> bool:
    """Whether a row does not see the virtual tokens that start from it, while the prompt is trained on it."""
    return starts_from_examples(recipe) and recipe.leave_one_out and recipe.method in KEYS_AND_VALUES


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Labelled rows as the tokens that a prompt starts from."""

    input_ids: list[int]
    """Token ids, row after row: [P], or fewer where the prompt repeats them."""
    types: list[int]
    """PEFT's types of these tokens."""
    hidden: Mapping[int, Sequence[int]]
    """By the number of a training row, the virtual tokens that start from it or from rows with the same input, which
    give its answer away."""
    total: int
    """Tokens of all rows, of which these may be a sample."""

    @classmethod
    def from_rows(
        cls,
        examples: Sequence[Example],
        separator: Sequence[int],
        *,
        groups: Sequence[Sequence[int]],
        labels: Sequence[Any] = (),
        size: int | None,
        most: int | None,
        seed: int,
    ) -> Demonstrations:
        """Put rows one behind the other, in random order.

        Args:
            examples: one for each row, with its answer.
            separator: token ids behind each.
            groups: numbers of the rows that have the same input.
            labels: of the rows, of which a sample has as many rows each; empty where they have none.
            size: P; by default as many as there are tokens, but ``most``.
            most: the most virtual tokens that leave a text of the greatest length its positions; None for no limit.
            seed: of the order and the sample.

        Raises:
            ConfigError: P is more than there are tokens.
        """
        lengths = [len(example.input_ids) + len(separator) for example in examples]
        total = sum(lengths)
        if size is not None and size > total:
            raise ConfigError(
                f"num_virtual_tokens is {size}, and the {len(examples)} examples have {total} tokens",
                f"lower it, or leave it out for all {total}",
            )
        size = size or min(total, most or total)
        order = _shuffled(len(examples), labels if size < total else (), seed)
        chunks = _chunks([lengths[row] for row in order], size)
        ids, types, spans = list[int](), list[int](), dict[int, range]()
        for number, (place, length) in enumerate(chunks):
            example = examples[order[place]]
            own = [*_types(example), *[INPUT_TEMPLATE] * len(separator)][-length:]
            spans[order[place]] = range(len(ids), len(ids) + length)
            ids += [*example.input_ids, *separator][-length:]
            types += [kind + OUTPUT * number for kind in own]
        hidden: dict[int, list[int]] = {}
        for group in groups:
            places = [place for row in group for place in spans.get(row, ())]
            hidden |= dict.fromkeys(group, places)
        return cls(input_ids=ids, types=types, hidden=hidden, total=total)

    def options(self, method: PeftType, size: int | None) -> dict[str, Any]:
        """Fields of the method's config that make its virtual tokens these, or ``size`` that start from them."""
        tokens = {"num_virtual_tokens": size or len(self.input_ids)}
        if method is not PeftType.CPT:
            return tokens
        return {**tokens, "cpt_token_ids": self.input_ids, "cpt_tokens_type_mask": self.types}

    def prefix_mask(self, row: int) -> list[int] | None:
        """[P] 1 for each virtual token that a training row sees: those that start from other rows; None for all."""
        hidden = {*self.hidden[row]}
        return [int(place not in hidden) for place in range(len(self.input_ids))] if hidden else None


def demonstrations(
    recipe: RecipeFields,
    task: Task,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    *,
    seed: int,
) -> Demonstrations:
    """The training rows of a recipe as the start of a prompt.

    Args:
        recipe: the recipe.
        task: the task that it describes, which formats the rows.
        rows: the training rows.
        tokenizer: the base model's.
        positions: how many the base model has; None for no limit.
        seed: of the order and the sample.

    Raises:
        ConfigError: ``num_virtual_tokens`` is not set and no position is left for examples, or it is more than they
            have tokens.
        DataError: a row does not fit.
    """
    size, labels = recipe.options.get("num_virtual_tokens"), rows[task.label_column] if task.label_set else ()
    most = None if positions is None else positions - task.max_length - task.num_new_tokens
    if size is None and most is not None and most < 1:
        raise ConfigError(
            f"the model has {positions} positions, of which a text may take all",
            "lower max_length, or set num_virtual_tokens in options",
        )
    if recipe.method in VECTORS:
        size, most = None, size or min(TOKENS, most or TOKENS)
        if len(rows) > SAMPLED_ROWS:
            numbers = sorted(_shuffled(len(rows), labels, seed)[:SAMPLED_ROWS])
            rows, labels = rows.select(numbers), [labels[number] for number in numbers] if labels else ()
    encoded = each_row(rows, [*task.columns, task.label_column], lambda row: task.examples(row, tokenizer)[0])
    is_conversation = recipe.chat or recipe.messages is not None
    default = "" if is_conversation else LINE_BETWEEN
    found = Demonstrations.from_rows(
        encoded,
        token_ids(default if recipe.example_separator is None else recipe.example_separator, tokenizer),
        groups=alike(rows, task.columns) if task.has_template else [[row] for row in range(len(rows))],
        labels=labels,
        size=size,
        most=most,
        seed=seed,
    )
    if recipe.method not in VECTORS and len(found.input_ids) < found.total:
        warnings.warn(
            f"the {len(rows)} examples have {found.total} tokens, the prompt {len(found.input_ids)}: it starts from a "
            "sample of them, and trains on all",
            stacklevel=2,
        )
    return found


def _shuffled(count: int, labels: Sequence[Any], seed: int) -> list[int]:
    """The numbers of rows in random order; where they have labels, with one row of each label in turn."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    if not labels:
        return order
    seen = Counter[Any]()
    turns = {}
    for row in order:
        turns[row] = seen[labels[row]]
        seen[labels[row]] += 1
    return sorted(order, key=turns.__getitem__)


def _chunks(lengths: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Choose texts, in order and whole, that have ``size`` tokens together; of the last one only its end, which comes
    first, since nothing reads on from it.

    Args:
        lengths: of all texts.
        size: at most their sum.

    Returns:
        The place of each chosen text in ``lengths``, and how many of its last tokens are taken.
    """
    chosen = []
    for place, length in enumerate(lengths):
        if size > 0:
            chosen.append((place, min(length, size)))
            size -= length
    return [chosen[-1], *chosen[:-1]] if size < 0 else chosen


def _types(example: Example) -> list[int]:
    """PEFT's types of an example's tokens: what stands behind its last field, and is no answer, asks for the output."""
    fields = example.from_fields or [True] * len(example.input_ids)
    last = max((place for place, is_field in enumerate(fields) if is_field), default=-1)
    around = [INPUT if is_field else INPUT_TEMPLATE for is_field in fields[: last + 1]]
    prompt = [*around, *[OUTPUT_TEMPLATE] * (len(fields) - last - 1)]
    return [OUTPUT if label != IGNORED else kind for kind, label in zip(prompt, example.labels, strict=True)]
