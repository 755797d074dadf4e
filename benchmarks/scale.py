"""How serving scales: time of a step by running requests, virtual tokens and adapters, and requests per second of one
server and of two side by side.

SmolLM2-135M in fp32, one thread per server. Run alone on an idle machine: ``make bench-serve``.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from timing import RESULTS, save

from serving import MODEL, TEXTS, save_adapter, served, vary
from softtune import PrefixTuningConfig, TaskType
from softtune.pretrained import load_base_model
from softtune.serving.request_queue import RequestHandle
from softtune.serving.requests import GenerationRequest
from softtune.serving.sampling import IncrementalDetokenizer, SamplingParams
from softtune.serving.service import Service

PAGE = """# Scale

What a server costs as it grows: `python benchmarks/scale.py`, SmolLM2-135M in fp32, {cpu}, {threads} thread,
torch {torch}, commit `{commit}`.

## Measured

{rows}

{lengths}

{adapters}

Two servers beside each other answer {two:.2f} requests a second on two cores, and one {one:.2f}: {times:.2f}
times as many.

## What follows

- **Requests.** From 8 to 64 of them, each adds {each:.1f} ms to a step: the layers' products for one more
  token, and its attention. The first ones share the reading of the weights.
- **Virtual tokens.** One adds {virtual:.1f} µs to a step for each request that sees it: its share of attention
  in every layer. It is held once for all of them.
- **Adapters.** 64 requests of 64 adapters take {mixed:.2f} times as long as 64 of one.
- **Memory.** A token takes {token:,} bytes in all layers (layers · 2 · key heads · head size · bytes of a
  number), and a prefix of 20 virtual tokens {prefix:.2f} MB: `--adapter-cache-mb 64` keeps {held} of them, and
  `--num-kv-slots 16384` takes {full:.0f} MB when all are in use. On disk an adapter takes as much, and again in
  the server's own copy. The mask takes a byte for each pair of tokens of the longest text so far: 67 MB for 8,192.
- **Larger models, computed and not measured.** With 32 layers, 8 key heads of 128 and 2 bytes a number, a token
  takes 131 kB, a prefix of 20 virtual tokens 2.6 MB, and 1,000 such adapters 2.6 GB on disk; 1 GB in memory
  keeps 380.
- **More machines.** Servers share nothing but the folder, so that their number multiplies requests a second as
  far as there are cores or GPUs for them.
"""

ROWS, LENGTHS, ADAPTERS = (1, 2, 4, 8, 16, 32, 64), (0, 20, 50, 100, 200), (1, 4, 16, 64)
STEPS, REQUESTS, WRITTEN = 12, 96, 24


def main() -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, _ = load_base_model(MODEL)
        for length in LENGTHS[1:]:
            config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length)
            save_adapter(base, root / "lengths" / f"p{length}", config)
        for number in range(max(ADAPTERS)):
            vary(root / "lengths" / "p20", root / "many" / str(number), number)
        with served(root / "lengths") as service:
            found["rows"] = {rows: milliseconds(service, ["p20"] * rows) for rows in ROWS}
            found["virtual tokens"] = {
                length: milliseconds(service, [f"p{length}" if length else None] * 16) for length in LENGTHS
            }
            found["bytes of a token"] = service.engine.scheduler.pool.token_bytes
        with served(root / "many") as service:
            found["adapters"] = {
                count: milliseconds(service, [str(i % count) for i in range(64)]) for count in ADAPTERS
            }
        found["requests a second"] = {count: throughput(root / "many", count) for count in (1, 2)}
    save("scale", found)
    write_page(json.loads((RESULTS / "scale.json").read_text(encoding="utf-8")))


def write_page(found: dict[str, Any]) -> None:
    """Write ``docs/scale.md``: the measurements, and what follows for other models and numbers."""
    rows, lengths, adapters = (found[name] for name in ("rows", "virtual tokens", "adapters"))
    token, (one, two) = found["bytes of a token"], found["requests a second"].values()
    text = PAGE.format(
        **found["hardware"],
        commit=found["commit"],
        rows=table("requests in the batch", rows, "milliseconds of a step that writes a token for each"),
        lengths=table("virtual tokens before 16 requests", lengths, "milliseconds of a step"),
        adapters=table("adapters of 64 requests", adapters, "milliseconds of a step"),
        one=one,
        two=two,
        times=two / one,
        each=(rows["64"] - rows["8"]) / 56,
        virtual=(lengths["200"] - lengths["0"]) / 200 / 16 * 1000,
        mixed=adapters["64"] / adapters["1"],
        token=token,
        prefix=20 * token / 1e6,
        held=64 * 2**20 // (20 * token),
        full=16384 * token / 1e6,
    )
    (RESULTS.parents[1] / "docs" / "scale.md").write_text(text, encoding="utf-8")


def table(what: str, found: dict[str, float], how: str) -> str:
    lines = [
        f"| {what} | {' | '.join(found)} |",
        "| --- " * (len(found) + 1) + "|",
        f"| {how} | {' | '.join(f'{value:.1f}' for value in found.values())} |",
    ]
    return "\n".join(lines)


def milliseconds(service: Service, names: list[str | None]) -> float:
    """Median milliseconds of a step that generates one token for each request. The thread of the service is idle."""
    engine, detokenizer = service.engine, lambda: IncrementalDetokenizer(service.tokenizer, ())
    for number, name in enumerate(names):
        version = None if name is None else service.registry.lease(name)
        input_ids = service.tokenize(f"{TEXTS[number % len(TEXTS)]} {number}")
        request = GenerationRequest(
            input_ids, SamplingParams(max_tokens=STEPS + 8), detokenizer(), frozenset(), lambda *_: None
        )
        release = (lambda: None) if version is None else (lambda v=version: service.registry.release(v))
        engine.submit(RequestHandle(version, request, print, release))
    while any(handle.request.num_pending_tokens != 1 for handle in engine.batch.running) or len(engine.batch.queue):
        engine.step()
    seconds = []
    for _ in range(STEPS // 2):
        clock = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - clock)
    while engine.batch.running:
        engine.step()
    return round(1000 * statistics.median(seconds), 2)


def throughput(folder: Path, replicas: int) -> float:
    """Requests per second of ``replicas`` servers, with 32 clients that request 24 tokens each time."""
    with listening("--adapters", str(folder), "--replicas", str(replicas)) as url:

        def ask(number: int) -> int:
            body = {"model": str(number % 64), "prompt": TEXTS[number % 4], "max_tokens": WRITTEN, "temperature": 0}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=600).status_code

        with ThreadPoolExecutor(32) as threads:
            list(threads.map(ask, range(8)))
            clock = time.perf_counter()
            statuses = list(threads.map(ask, range(REQUESTS)))
            seconds = time.perf_counter() - clock
    assert set(statuses) == {200}
    return round(REQUESTS / seconds, 2)


@contextmanager
def listening(*options: str) -> Iterator[str]:
    """Run ``softtune serve`` in a separate process; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = "from softtune_command import main; main()"
    command = [sys.executable, "-c", code, "serve", "--model", MODEL, "--port", port, *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/healthz").status_code == 200:
                        break
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
