"""Tokens per second of ``softtune serve`` with its own engine and with vLLM's, for the same requests.

SmolLM2-135M in fp32. Run alone on an idle machine that has vLLM: ``make bench-vllm``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from scale import listening
from timing import measure, report

from serving import MODEL, TEXTS, save_adapter
from softtune import PrefixTuningConfig, TaskType
from softtune.pretrained import load_base_model

LENGTHS = (20, 33, 46, 59)
"""Virtual tokens of each adapter."""
REQUESTS, WRITTEN, ROUNDS = 30, 48, 3
ENGINES = ("transformers", "vllm")


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        base, _ = load_base_model(MODEL)
        for length in LENGTHS:
            config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length)
            save_adapter(base, Path(folder, str(length)), config)
        found = {engine: answers("--adapters", folder, "--engine", engine) for engine in ENGINES}
    (ours, texts), (theirs, others) = (found[engine] for engine in ENGINES)
    different = sum(a != b for a, b in zip(texts, others, strict=True))
    report(
        "engines",
        [
            measure("30 requests of 48 tokens, 4 adapters and the base model: tokens/s by vLLM", theirs, None),
            measure("the same by softtune's own engine", ours, None),
            measure("texts that differ between the two", different, 0),
        ],
    )


def answers(*options: str) -> tuple[float, list[str]]:
    """Tokens per second, the median of several rounds, and the texts, for concurrent requests to a server."""
    names = [*map(str, LENGTHS), MODEL]

    def ask(number: int) -> dict[str, Any]:
        body = {"model": names[number % len(names)], "prompt": f"{TEXTS[number % len(TEXTS)]} {number}"}
        body |= {"max_tokens": WRITTEN, "temperature": 0}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status().json()

    with listening(*options) as url, ThreadPoolExecutor(REQUESTS) as threads:
        list(threads.map(ask, range(REQUESTS)))
        rates = []
        for _ in range(ROUNDS):
            clock = time.perf_counter()
            found = list(threads.map(ask, range(REQUESTS)))
            tokens = sum(answer["usage"]["completion_tokens"] for answer in found)
            rates.append(tokens / (time.perf_counter() - clock))
    return statistics.median(rates), [answer["choices"][0]["text"] for answer in found]


if __name__ == "__main__":
    main()
