"""Converts a request into vLLM requests: one that generates, or several that score the tokens of answers.

In vLLM 0.32 (model runner V1), if any request of a step sets ``logprob_token_ids``, no request of that step gets its
top log-probabilities. So while a generation with top log-probabilities runs, answers are scored token by token, each
token as the only allowed one. And such a generation starts only when no running request sets ``logprob_token_ids``;
those finish within a few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import vllm
from vllm import sampling_params
from vllm.sampling_params import RequestOutputKind

from softtune.serving.requests import GenerationRequest, LoglikelihoodRequest
from softtune.serving.sampling import SampledToken, SamplingParams


@dataclass(frozen=True, eq=False)
class VllmRequest:
    """A request to vLLM."""

    tail: tuple[int, ...]
    """Token ids after the input of the request it belongs to."""
    params: vllm.SamplingParams
    take: Callable[[Any], None]
    """Called with each ``CompletionOutput``, which has only the new tokens."""


def may_begin(request: GenerationRequest | LoglikelihoodRequest, running: Iterable[VllmRequest]) -> bool:
    """Whether vLLM can run a request beside those that are running."""
    wants_top_logprobs = isinstance(request, GenerationRequest) and bool(request.params.logprobs)
    return not wants_top_logprobs or not any(call.params.logprob_token_ids for call in running)


def vllm_requests(
    request: GenerationRequest | LoglikelihoodRequest, adapter: str | None, running: Iterable[VllmRequest]
) -> list[VllmRequest]:
    """The vLLM requests of a request.

    Args:
        request: the request.
        adapter: the adapter's name for the connector; None for the base model, or for virtual tokens that are passed
            as input embeddings.
        running: the vLLM requests that are running.
    """
    common = {
        "detokenize": False,
        "ignore_eos": True,  # those in the config: the request has its own stop tokens
        "extra_args": None if adapter is None else {"kv_transfer_params": {"adapter": adapter}},
    }
    if isinstance(request, GenerationRequest):
        return [VllmRequest((), _writing(request.params, request.ends, common), lambda output: _add(request, output))]
    return _scoring(request, common, singly=any(call.params.logprobs for call in running))


def _writing(params: SamplingParams, ends: frozenset[int], common: dict[str, Any]) -> vllm.SamplingParams:
    return vllm.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        seed=params.seed,
        logprobs=params.logprobs,
        stop_token_ids=[*ends],
        output_kind=RequestOutputKind.DELTA,
        **common,
    )


def _add(request: GenerationRequest, output: Any) -> None:
    rows = output.logprobs or [None] * len(output.token_ids)
    for token, row in zip(output.token_ids, rows, strict=True):
        if not request.is_done:
            request.add(SampledToken(token) if row is None else _token(token, row, request.params.logprobs or 0))


def _token(token: int, row: Any, count: int) -> SampledToken:
    """A token with its log-probability, and those of the ``count`` likeliest.

    vLLM's row has the sampled token in any case, also where it is not among the likeliest.
    """
    best = sorted(((other, found.logprob) for other, found in row.items()), key=lambda pair: -pair[1])
    return SampledToken(token, row[token].logprob, dict(best[:count]))


def _scoring(request: LoglikelihoodRequest, common: dict[str, Any], *, singly: bool) -> list[VllmRequest]:
    """Requests for each distinct beginning of an answer, which score as many of its next tokens as vLLM allows."""
    following: dict[tuple[int, ...], set[int]] = {}
    for answer in request.answers:
        for count, token in enumerate(answer):
            following.setdefault(tuple(answer[:count]), set()).add(token)
    logprobs: dict[tuple[int, ...], float] = {}

    def take(beginning: tuple[int, ...], tokens: Sequence[int], output: Any) -> None:
        for token in tokens:
            logprobs[(*beginning, token)] = output.logprobs[0][token].logprob
        if len(logprobs) == sum(map(len, following.values())):
            request.end([_score(answer, logprobs) for answer in request.answers])

    def call(beginning: tuple[int, ...], tokens: list[int]) -> VllmRequest:
        options = {"allowed_token_ids": tokens, "logprobs": 0} if singly else {"logprob_token_ids": tokens}
        params = vllm.SamplingParams(max_tokens=1, temperature=0, **options, **common)
        return VllmRequest(beginning, params, lambda output: take(beginning, tokens, output))

    most = 1 if singly else sampling_params.MAX_LOGPROB_TOKEN_IDS
    return [
        call(beginning, sorted(tokens)[first : first + most])
        for beginning, tokens in following.items()
        for first in range(0, len(tokens), most)
    ]


def _score(answer: Sequence[int], logprobs: dict[tuple[int, ...], float]) -> float:
    return sum(logprobs[tuple(answer[: count + 1])] for count in range(len(answer)))
