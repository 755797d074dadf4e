"""Compares training steps and label scoring with PEFT's, and a step with its matrix products alone.

SmolLM2-135M in fp32, eight rows of 16 to 48 real tokens. Run alone on an idle machine: ``make bench``.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import epochs
import growth
import peft
import torch
from memory import apart, resident
from step import (
    ANSWER,
    ROUNDS,
    Step,
    adapted,
    at_answers,
    forward_backward,
    matrix_products,
    padded_batch,
    training_step,
    without_shared_padding,
)
from timing import measure, ratio, report
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM

import softtune
from softtune.data import Example
from softtune.evaluation.predict import score_words
from softtune.pretrained import load_base_model

PREFIX = ("PrefixTuningConfig", 30)
PROMPT = ("PromptTuningConfig", 100)
SHORT_PROMPT = ("PromptTuningConfig", 30)
SIDES = {"softtune": softtune, "peft": peft}
RECORDS = 32


def main() -> None:
    torch.manual_seed(0)
    base, tokenizer = load_base_model("smollm2-135m")
    batch = padded_batch(tokenizer.pad_token_id)
    batch_at_answers = at_answers(batch)
    measures = []
    for method, (padded, dynamic) in {PREFIX: (0.40, 0.72), PROMPT: (0.20, 0.38)}.items():
        ours, theirs = (
            training_step(adapted(base, *method, side=side), b)
            for side, b in ((softtune, batch_at_answers), (peft, batch))
        )
        trimmed = training_step(adapted(base, *method, side=peft), without_shared_padding(batch))
        name = f"{method[0]} P={method[1]}: step / peft's"
        measures += [
            measure(f"{name}, padded to {batch['input_ids'].shape[1]}", ratio(ours, theirs, rounds=ROUNDS)[0], padded),
            measure(f"{name}, padded to the longest row", ratio(ours, trimmed, rounds=ROUNDS)[0], dynamic),
        ]
    step = training_step(adapted(base), batch_at_answers)
    share, seconds, products = ratio(step, matrix_products(step), rounds=ROUNDS)
    measures += [
        measure("PrefixTuningConfig P=30: step / its matrix products alone", share, 1.25),
        measure("seconds of that step", seconds, None),
        measure("seconds of its matrix products", products, None),
    ]
    plain = without_adapter(base)
    alone, _, _ = ratio(plain, matrix_products(plain), rounds=ROUNDS)
    measures.append(measure("base model without adapter, six rows of 42: the same", alone, None))
    for method, must in {PREFIX: 1.0, SHORT_PROMPT: 0.75}.items():
        ours, theirs = (forward_backward(adapted(base, *method, side=side), batch) for side in (softtune, peft))
        name = f"{method[0]} P={method[1]}: model(**padded_batch) with labels and backward / peft's"
        measures.append(measure(name, ratio(ours, theirs, rounds=ROUNDS)[0], must))
    for model, must in {"smollm2-135m": 0.5, "bloom": 0.1}.items():
        ours, theirs = (apart(__file__, side, model, rounds=ROUNDS) for side in SIDES)
        name = f"PrefixTuningConfig P=30, {model}: peak memory above the model / peft's"
        measures += [
            measure(name, ours / theirs, must),
            measure(f"{model}: MB of softtune's", ours / 1e6, None),
            measure(f"{model}: MB of peft's", theirs / 1e6, None),
        ]
    speed = ratio(
        scoring_by_peft(adapted(base, side=peft).eval(), tokenizer.pad_token_id),
        scoring(adapted(base).eval(), tokenizer.pad_token_id),
        rounds=ROUNDS,
    )
    measures.append(measure("scoring two labels: examples/s / peft's", speed[0], 3.0, at_least=True))
    measures += epochs.measures(base, tokenizer.pad_token_id) + growth.measures(base)
    report("training", measures)


def without_adapter(base: nn.Module) -> Step:
    """A step of the plain base model, on about as many tokens without padding, with gradients down to the input
    embeddings: less than any adapter's step needs."""
    model = copy.deepcopy(base).requires_grad_(False).train()
    embeddings = torch.randn(6, 42, model.config.hidden_size, requires_grad=True)

    def step() -> None:
        states = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        model.lm_head(states[:, -ANSWER - 1 :]).logsumexp(-1).sum().backward()

    return step


def peak(side: str, model: str) -> float:
    """Peak resident bytes of two training steps, less those before."""
    if model == "bloom":
        config = BloomConfig(vocab_size=250_880, hidden_size=64, n_layer=2, n_head=4, pad_token_id=3)
        base: nn.Module = BloomForCausalLM(config)
        pad = 3
    else:
        base, tokenizer = load_base_model(model)
        pad = tokenizer.pad_token_id
    batch = padded_batch(pad)
    tuned = adapted(base.requires_grad_(False), side=SIDES[side])
    with torch.no_grad():
        tuned(batch["input_ids"][:1, -2:])  # reads the weights from disk, which happens on first use
    step = training_step(tuned, at_answers(batch) if side == "softtune" else batch)
    before, most = resident(lambda: (step(), step()))
    return most - before


def records() -> tuple[list[list[int]], list[list[int]]]:
    """Texts of 16 to 48 tokens in any order, as in a data set, and two answers of two tokens each."""
    order = torch.randperm(RECORDS, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(16, 48, RECORDS).int()[order].tolist()
    return [torch.randint(100, 40_000, (n,)).tolist() for n in lengths], [[500, 600], [700, 800]]


def scoring(model: Any, pad: int) -> Step:
    texts, labels = records()
    rows = [[Example(input_ids=t + a, labels=[-100] * len(t) + a) for a in labels] for t in texts]
    return lambda: score_words(model, rows, pad)


def scoring_by_peft(model: Any, pad: int) -> Step:
    """Label scoring as in PEFT scripts: texts padded left, a forward pass per label, log-probabilities of tokens."""
    texts, labels = records()

    def run() -> Tensor:
        scores = []
        for start in range(0, len(texts), 16):
            for answer in labels:
                rows = [t + answer for t in texts[start : start + 16]]
                width = max(map(len, rows))
                ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
                mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
                with torch.no_grad():
                    logits = model(input_ids=ids, attention_mask=mask).logits[:, -ANSWER - 1 : -1].log_softmax(-1)
                scores.append(logits.gather(2, ids[:, -ANSWER:, None]).sum((1, 2)))
        return torch.cat(scores)

    return run


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak(*sys.argv[1:]))
    else:
        main()
