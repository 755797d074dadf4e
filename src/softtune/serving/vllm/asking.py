"""What vLLM is asked for a job: one request that writes, or some that tell how likely an answer's tokens are.

In a step of vLLM 0.32 (model runner V1) where a request names tokens to tell the log-probabilities of, none is told its
likeliest ones. So beside a text that is told them answers are scored token by token, each the only one that may be
written; and such a text begins when no request names tokens: those are over in a few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams, sampling_params
from vllm.sampling_params import RequestOutputKind

from softtune.serving.jobs import Scoring, Writing
from softtune.serving.sampling import Choice, Sampling


@dataclass(frozen=True, eq=False)
class Part:
    """One request to vLLM."""

    tail: tuple[int, ...]
    """Tokens behind the job's text."""
    params: SamplingParams
    take: Callable[[Any], None]
    """Told of each ``CompletionOutput``, with the tokens that are new in it."""


def may_begin(job: Writing | Scoring, running: Iterable[Part]) -> bool:
    """Whether vLLM can do what a job asks beside what it does."""
    is_told_likeliest = isinstance(job, Writing) and bool(job.asked.logprobs)
    return not is_told_likeliest or not any(part.params.logprob_token_ids for part in running)


def parts_of(job: Writing | Scoring, adapter: str | None, running: Iterable[Part]) -> list[Part]:
    """All that a job asks, of an adapter whose virtual tokens the connector writes, or of none, beside what is done."""
    common = {
        "detokenize": False,
        "ignore_eos": True,  # of the ends that the config names: a job knows them
        "extra_args": None if adapter is None else {"kv_transfer_params": {"adapter": adapter}},
    }
    if isinstance(job, Writing):
        return [Part((), _writing(job.asked, job.ends, common), lambda output: _add(job, output))]
    return _scoring(job, common, singly=any(part.params.logprobs for part in running))


def _writing(asked: Sampling, ends: frozenset[int], common: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=asked.seed,
        logprobs=asked.logprobs,
        stop_token_ids=[*ends],
        output_kind=RequestOutputKind.DELTA,
        **common,
    )


def _add(job: Writing, output: Any) -> None:
    rows = output.logprobs or [None] * len(output.token_ids)
    for token, row in zip(output.token_ids, rows, strict=True):
        if not job.is_done:
            job.add(Choice(token) if row is None else _choice(token, row, job.asked.logprobs or 0))


def _choice(token: int, row: Any, count: int) -> Choice:
    """A token with its log-probability, and those of the likeliest; vLLM names the chosen one among these in any
    case."""
    best = sorted(((other, found.logprob) for other, found in row.items()), key=lambda pair: -pair[1])
    return Choice(token, row[token].logprob, dict(best[:count]))


def _scoring(job: Scoring, common: dict[str, Any], *, singly: bool) -> list[Part]:
    """Each different beginning of an answer, with the tokens that go on from it: as many in a request as vLLM takes."""
    following: dict[tuple[int, ...], set[int]] = {}
    for answer in job.answers:
        for count, token in enumerate(answer):
            following.setdefault(tuple(answer[:count]), set()).add(token)
    found: dict[tuple[int, ...], float] = {}

    def take(beginning: tuple[int, ...], tokens: Sequence[int], output: Any) -> None:
        for token in tokens:
            found[(*beginning, token)] = output.logprobs[0][token].logprob
        if len(found) == sum(map(len, following.values())):
            job.end([_score(answer, found) for answer in job.answers])

    def part(beginning: tuple[int, ...], tokens: list[int]) -> Part:
        asked = {"allowed_token_ids": tokens, "logprobs": 0} if singly else {"logprob_token_ids": tokens}
        params = SamplingParams(max_tokens=1, temperature=0, **asked, **common)
        return Part(beginning, params, lambda output: take(beginning, tokens, output))

    most = 1 if singly else sampling_params.MAX_LOGPROB_TOKEN_IDS
    return [
        part(beginning, sorted(tokens)[first : first + most])
        for beginning, tokens in following.items()
        for first in range(0, len(tokens), most)
    ]


def _score(answer: Sequence[int], found: dict[tuple[int, ...], float]) -> float:
    return sum(found[tuple(answer[: count + 1])] for count in range(len(answer)))
