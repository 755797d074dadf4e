"""Promise 6: outputs and gradients are those of slow, obvious implementations, on odd shapes and both paddings."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softtune import PeftModel
from softtune.compat import cache_of
from tests.families import (
    CAUSAL_LM,
    FAMILIES,
    INPUT_METHODS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    TOKEN_CLS,
    P,
    adapted,
    answers,
    assert_same_gradients,
    base_model,
    batch,
    cases,
    is_decoder_only,
    sides,
    texts,
)
from tests.reference import encoders, prefixes, virtual_tokens

pytestmark = pytest.mark.promise(6)


def with_head(model: PeftModel, base: PreTrainedModel) -> PreTrainedModel:
    """The base model with the adapter's trained head in it."""
    for name, head in model.adapter("default").heads.items():
        base.get_submodule(name).load_state_dict(head.state_dict())
    return base


def prompt_of(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The adapter's virtual tokens, [P, D] or [P, W], as the reference computes them from a copy of what is trained."""
    trained = model.prompt_encoder["default"].named_parameters()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in trained}
    return encoders.virtual_tokens(leaves), leaves


def compare(
    model: PeftModel,
    ours: list[Tensor],
    theirs: list[Tensor],
    leaves: dict[str, Tensor],
    least: str = "embedding.weight",
) -> None:
    """The same logits, and the same gradients of all that makes the prompt, for a random loss."""
    weights = [torch.randn_like(x) for x in ours]
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    own_total, total = (sum((w * x).sum() for w, x in zip(weights, form, strict=True)) for form in (ours, theirs))
    parameters = dict(model.prompt_encoder["default"].named_parameters())
    own_gradients = torch.autograd.grad(own_total, list(parameters.values()))
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), retain_graph=True), strict=True))
    assert gradients[least].abs().max() > 1e-4
    assert_same_gradients(dict(zip(parameters, own_gradients, strict=True)), gradients, 1e-5)


def rows_of(model: PeftModel, task: str, rows: list[Tensor], side: str, **kwargs: Tensor) -> list[Tensor]:
    """Logits of each row's real tokens, from one padded batch."""
    logits = model(**batch(rows, side), **kwargs).logits
    if task != CAUSAL_LM:
        return list(logits)
    return [x[: len(r)] if side == "right" else x[len(x) - len(r) :] for x, r in zip(logits, rows, strict=True)]


@pytest.mark.parametrize(("family", "task", "method"), cases(INPUT_METHODS))
def test_virtual_tokens(family: str, task: str, method: str) -> None:
    model, base = adapted(family, task, method), base_model(family, task)
    with_head(model, base)
    window = FAMILIES[family].window
    ahead = window and is_decoder_only(family) and method == "prompt"
    rows = texts(family, task, (3, 2, 1) if ahead else (14, 9, 2))  # in sight of the first virtual token
    decoder = answers(task, len(rows))
    vectors, leaves = prompt_of(model)
    theirs = []
    for i, row in enumerate(rows):
        columns = [len(row) if method == "prompt_suffix" else 0] * P
        opened = tuple(range(columns[0], columns[0] + P)) if window and not ahead else ()
        with prefixes.naive_prefixes(base, {}, open_slots=opened) if opened else nullcontext():
            if task == CAUSAL_LM:
                theirs.append(virtual_tokens.causal(base, row, vectors, columns))
            elif FAMILIES[family].ends_with_eos and task == SEQ_CLS:
                theirs.append(classes_behind_a_decoder(base, row, vectors, columns))
            else:
                ids = decoder["decoder_input_ids"][i] if decoder else None
                theirs.append(virtual_tokens.whole(base, row, vectors, columns, ids, FAMILIES[family].word_scale))
    for side in sides(family, task):
        compare(model, rows_of(model, task, rows, side, **decoder), theirs, leaves)


@pytest.mark.promise(6, methods=("prompt",))
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_window_does_not_end_virtual_tokens_in_front(family: str) -> None:
    """They are a prefix, of the keys and values that the frozen model computes for them."""
    model, base = adapted(family, CAUSAL_LM, "prompt"), base_model(family, CAUSAL_LM)
    vectors, leaves = prompt_of(model)
    cache = cache_of(base(inputs_embeds=vectors[None], use_cache=True))
    pairs = {f"layers.{i}.self_attn": (layer.keys[0], layer.values[0]) for i, layer in enumerate(cache.layers)}
    rows = texts(family, CAUSAL_LM, (14, 9, 2))
    with prefixes.naive_prefixes(base, pairs) as naive:
        positions = [torch.arange(P, P + len(row))[None] for row in rows]
        theirs = [
            naive(input_ids=row[None], position_ids=p, use_cache=False).logits[0]
            for row, p in zip(rows, positions, strict=True)
        ]
        compare(model, rows_of(model, CAUSAL_LM, rows, "left"), theirs, leaves)


def classes_behind_a_decoder(base: PreTrainedModel, row: Tensor, vectors: Tensor, columns: list[int]) -> Tensor:
    """BART's and T5's classifier: the decoder reads the text too, and its last output is the one that counts."""
    sequence, _ = virtual_tokens.arrange(base.get_input_embeddings()(row), vectors, columns)
    decoder_ids = torch.cat([torch.tensor([base.config.decoder_start_token_id]), row[:-1]])
    states = base.base_model(inputs_embeds=sequence[None], decoder_input_ids=decoder_ids[None]).last_hidden_state
    return base.classification_head(states[0, -1])


@pytest.mark.parametrize(("family", "task", "method"), cases(("p_tuning_mlp",), tasks=(CAUSAL_LM,)))
@pytest.mark.parametrize("side", ["right", "left"])
def test_virtual_tokens_at_the_positions_of_a_template(family: str, task: str, method: str, side: str) -> None:
    model, base = adapted(family, task, method), base_model(family, task)
    rows = texts(family, CAUSAL_LM)
    columns = [[0, 0, 3, 3, 7], [1, 2, 2, 3, 4], [0, 1, 1, 2, 2]]
    vectors = model.prompt_encoder["default"]()
    offsets = [0 if side == "right" else 7 - len(r) for r in rows]
    positions = torch.tensor([[c + o for c in row] for row, o in zip(columns, offsets, strict=True)])
    ours = rows_of(model, CAUSAL_LM, rows, side, prompt_positions=positions)
    for own, row, places in zip(ours, rows, columns, strict=True):
        opened = tuple(column + number for number, column in enumerate(places)) if FAMILIES[family].window else ()
        with prefixes.naive_prefixes(base, {}, open_slots=opened) if opened else nullcontext():
            theirs = virtual_tokens.causal(base, row, vectors, places)
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        c
        for c in cases(("prefix", "prefix_projection", "p_tuning_v2"), tasks=(CAUSAL_LM,))
        if FAMILIES[c[0]].plain_cache
    ],
)
def test_prefix_is_a_ready_cache(family: str, task: str, method: str) -> None:
    model, base = adapted(family, task, method), base_model(family, task)
    row = FAMILIES[family]
    rows = texts(family, task, (3, 2, 1) if row.window else (7, 4, 2))  # a plain cache lets a window end the prefix
    flat, leaves = prompt_of(model)
    pairs = prefixes.split(flat, [sizes for _, sizes in row.layers()])
    numbers = [n for a in row.attention["decoder"] for n in a.numbers]
    has_ids = row.positions == "ids"
    theirs = [prefixes.causal_by_cache(base, r, dict(zip(numbers, pairs, strict=True)), has_ids) for r in rows]
    for side in ("right", "left"):
        compare(model, rows_of(model, task, rows, side), theirs, leaves)


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [c for c in cases(("prefix", "prefix_projection", "prefix_last", "p_tuning_v2")) if FAMILIES[c[0]].reachable],
)
def test_prefix_at_every_site(family: str, task: str, method: str) -> None:
    model, base = adapted(family, task, method), base_model(family, task)
    with_head(model, base)
    of = FAMILIES[family]
    rows = texts(family, task, (14, 9, 2) if of.window else (7, 4, 2))  # longer than the window
    decoder = answers(task, len(rows))
    flat, leaves = prompt_of(model)
    names = of.layers()
    if method == "prefix_last":
        names = [of.layers(site)[-1] for site in of.attention]
    pairs = dict(zip([n for n, _ in names], prefixes.split(flat, [s for _, s in names]), strict=True))
    theirs = []
    with prefixes.naive_prefixes(base, pairs) as naive, position_shift(family, naive):
        for i, row in enumerate(rows):
            inputs = {"input_ids": row[None], **{k: v[i : i + 1] for k, v in decoder.items()}}
            if of.positions == "ids":
                inputs["position_ids"] = of.first_position + torch.arange(P, P + len(row))[None]
            if "decoder_input_ids" in inputs and of.positions == "ids":
                length = inputs["decoder_input_ids"].shape[1]
                inputs["decoder_position_ids"] = of.first_position + torch.arange(P, P + length)[None]
            if "decoder" in of.attention:
                inputs["use_cache"] = False
            theirs.append(naive(**inputs).logits[0])
    for side in sides(family, task):
        compare(model, rows_of(model, task, rows, side, **decoder), theirs, leaves)


@pytest.mark.parametrize(("family", "task", "method"), cases(("memory",)))
def test_memory_outside_of_the_softmax(family: str, task: str, method: str) -> None:
    """elu(q) M is added to the output of each head, one query at a time."""
    model, base = adapted(family, task, method), base_model(family, task)
    with_head(model, base)
    of, rows = FAMILIES[family], texts(family, task)
    decoder = answers(task, len(rows))
    named = dict(model.prompt_encoder["default"].named_parameters())
    leaves = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
    places = {f"memories.{site}_{i}": path for site in of.attention for i, (path, _) in enumerate(of.layers(site))}
    terms = {places[name]: partial(remembered, memory) for name, memory in leaves.items()}
    theirs = []
    with prefixes.naive_prefixes(base, {}, terms=terms) as naive:
        for i, row in enumerate(rows):
            inputs = {"input_ids": row[None], **{k: v[i : i + 1] for k, v in decoder.items()}}
            without_cache = {"use_cache": False} if "decoder" in of.attention else {}
            theirs.append(naive(**inputs, **without_cache).logits[0])
    for side in sides(family, task):
        compare(model, rows_of(model, task, rows, side, **decoder), theirs, leaves, least=next(iter(leaves)))


def remembered(memory: Tensor, head: int, query: Tensor) -> Tensor:
    """[V] one query's term in one head."""
    return torch.where(query > 0, query, query.exp() - 1) @ memory[head]


def position_shift(family: str, model: PreTrainedModel) -> ExitStack:
    """The position tables of BART's kin count for themselves: move them by P."""
    stack, first = ExitStack(), FAMILIES[family].first_position
    for table in map(model.base_model.get_submodule, FAMILIES[family].table):
        name = "weight" if isinstance(table, nn.Embedding) else "weights"
        weight = getattr(table, name)
        moved = torch.cat([weight[:first], weight[first + P :]]).detach()
        stack.callback(setattr, table, name, weight)
        setattr(table, name, nn.Parameter(moved, requires_grad=False) if name == "weight" else moved)
    return stack


@pytest.mark.parametrize(("family", "task", "method"), cases(("infix",), tasks=(CAUSAL_LM,)))
@pytest.mark.parametrize("side", ["right", "left"])
def test_infix_is_seen_from_the_token_before_the_answer(family: str, task: str, method: str, side: str) -> None:
    model, base = adapted(family, task, method), base_model(family, task)
    rows, begins = texts(family, CAUSAL_LM), (4, 2, 1)
    labels = [torch.where(torch.arange(len(r)) < b, -100, r) for r, b in zip(rows, begins, strict=True)]
    width = max(len(r) for r in rows)
    edges = [(0, width - len(r)) if side == "right" else (width - len(r), 0) for r in rows]
    padded = torch.stack([nn.functional.pad(x, e, value=-100) for x, e in zip(labels, edges, strict=True)])
    ours = rows_of(model, CAUSAL_LM, rows, side, labels=padded)
    flat, leaves = prompt_of(model)
    theirs = []
    names = FAMILIES[family].layers()
    pairs = dict(zip([n for n, _ in names], prefixes.split(flat, [s for _, s in names]), strict=True))
    for row, begin in zip(rows, begins, strict=True):
        positions = torch.arange(len(row)) + P * (torch.arange(len(row)) >= begin)
        with prefixes.naive_prefixes(base, pairs, hidden_before=begin - 1) as naive:
            inputs = {
                "input_ids": row[None],
                "attention_mask": torch.ones_like(row[None]),
            }  # no mask would mean packed rows
            theirs.append(naive(**inputs, position_ids=positions[None], use_cache=False).logits[0])
    compare(model, ours, theirs, leaves)


@pytest.mark.parametrize(("family", "task", "method"), cases(("bitfit", "bitfit_added")))
def test_bitfit_trains_biases(family: str, task: str, method: str) -> None:
    """Changes at outputs act as changed biases, and get the gradients that the biases themselves would get."""
    model, base = adapted(family, task, method), base_model(family, task)
    with_head(model, base)
    inputs = {**batch(texts(family, task)), **answers(task, 3)}
    changes = dict(model.prompt_encoder["default"].changes.items())
    mine = {name: bias_of(base, family, name.replace("/", "."), len(change)) for name, change in changes.items()}
    for name, change in changes.items():
        if mine[name] is None:
            change.data.zero_()  # convolutions have no place for a bias
        else:
            bias, index = mine[name]
            bias.data[index] += change.detach()
    own = {bias for bias, _ in filter(None, mine.values())}
    for bias in own:
        bias.requires_grad_()
    ours, theirs = model(**inputs).logits, base(**inputs).logits
    if task == CAUSAL_LM:  # OPT gives padding a position of its own
        ours, theirs = (x[inputs["attention_mask"].bool()] for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    for name, change in changes.items():
        if mine[name] is not None:
            bias, index = mine[name]
            gradient = bias.grad[index]
            scale = float(gradient.abs().max())
            torch.testing.assert_close(change.grad, gradient, rtol=1e-5, atol=1e-5 * max(scale, 1.0))


def bias_of(base: PreTrainedModel, family: str, path: str, width: int) -> tuple[nn.Parameter, Tensor] | None:
    """The bias that a change stands for, and the change's places in it; a new one, at zero, where there is none."""
    parent, _, last = path.rpartition(".")
    fused = last in ("query", "key", "value") and not hasattr(base.get_submodule(parent), last)
    module = base.get_submodule(parent if fused else path)
    if getattr(module, "bias", None) is None:
        if isinstance(module, nn.Conv1d):
            return None
        add_by_hand(module)
    size = len(module.bias)
    index = FAMILIES[family].fused(size)[last] if fused else torch.arange(size)
    assert len(index) == width
    return module.bias, index


def add_by_hand(module: nn.Module) -> None:
    """Give a module a bias at zero: linear layers have a place for it, RMS norms have none."""
    module.bias = nn.Parameter(torch.zeros(len(module.weight)))
    if not isinstance(module, nn.Linear | nn.LayerNorm):
        module.register_forward_hook(lambda module, args, output: output + module.bias)


@pytest.mark.promise(6, methods=("prefix_last",))
@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].window])
def test_the_window_does_not_end_the_prefix(family: str) -> None:
    """In the last layer alone, the last of many tokens sees a prefix in front of the first."""
    task = CAUSAL_LM if "decoder" in FAMILIES[family].attention else TOKEN_CLS
    model = adapted(family, task, "prefix_last")
    (row,) = texts(family, task, (20,))
    before = model(input_ids=row[None]).logits[0, -1]
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(-1)
    assert (model(input_ids=row[None]).logits[0, -1] - before).abs().max() > 0.01


@pytest.mark.promise(6, methods=("prefix",))
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_equal_lengths_of_both_sequences_do_not_share_a_mask(family: str) -> None:
    """Without padding neither attention has a mask, and only one of the two is causal."""
    model = adapted(family, SEQ_2_SEQ_LM, "prefix")
    (row,) = texts(family, SEQ_2_SEQ_LM, (4,))
    ids = answers(SEQ_2_SEQ_LM, 1, 4)["decoder_input_ids"]
    alone = model(input_ids=row[None], decoder_input_ids=ids).logits
    mask = torch.ones_like(row[None])
    padded = batch([row], width=6)
    torch.testing.assert_close(alone, model(**padded, decoder_input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        alone, model(input_ids=row[None], attention_mask=mask, decoder_input_ids=ids).logits, atol=1e-5, rtol=1e-5
    )
