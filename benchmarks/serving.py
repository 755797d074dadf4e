"""Serving many adapters: throughput against PEFT's and the base model's, time to first token, memory, and correctness
while adapters are replaced.

SmolLM2-135M in fp32. Run alone on an idle machine: ``make bench-serve``.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import uvicorn
from safetensors.torch import load_file, save_file
from timing import measure, ratio, report
from transformers import PreTrainedModel

from softtune import PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType
from softtune.pretrained import load_base_model
from softtune.serving.engine_config import EngineConfig
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.app import Settings, create_app
from softtune.serving.sampling import SamplingParams
from softtune.serving.service import Service

MODEL = "smollm2-135m"
ADAPTERS, EACH, WRITTEN, ROUNDS = 16, 4, 32, 5
MANY, USED = 1000, 200
REQUESTS, CLIENTS, SERVED, SHORT = 1000, 32, 50, 12
TEXTS = [
    "The weather in the north is",
    "My favourite book begins with a",
    "To bake a loaf of bread you first",
    "She opened the door and saw",
]


def main() -> None:
    if sys.argv[1:] == ["memory"]:
        print(json.dumps(memory()))
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        prefixes = Path(folder, "prefixes")
        base, _ = load_base_model(MODEL)
        save_adapter(base, prefixes / "0", PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20))
        for number in range(1, SERVED):
            vary(prefixes / "0", prefixes / str(number), number)
        prompt = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=100)
        save_adapter(base, Path(folder, "prompt", "one"), prompt)
        measures = [*speed(prefixes), *first_token(Path(folder, "prompt")), *in_memory(), *replaced(prefixes)]
    report("serving", measures)


def save_adapter(base: PreTrainedModel, folder: Path, config: Any) -> None:
    PeftModel(base, config).save_pretrained(folder)


def vary(source: Path, target: Path, seed: int) -> None:
    """Copy an adapter, with other weights of similar magnitude."""
    if source != target:
        shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    states = {name: t[torch.randperm(len(t), generator=generator)] for name, t in load_file(file).items()}
    noisy = {name: t * (1 + 0.1 * torch.randn(t.shape, generator=generator)) for name, t in states.items()}
    save_file(noisy, target / "new", metadata={"format": "pt"})
    (target / "new").replace(file)


@contextmanager
def served(folder: Path, config: EngineConfig | None = None) -> Iterator[Service]:
    """Serve the adapters of a folder. No text ends early, so that all sides generate the same number of tokens."""
    service = Service(MODEL, config)
    AdapterFolder(str(folder)).follow(service.registry)
    service.engine.backbone.model.generation_config.eos_token_id = None
    service.start()
    yield service
    service.close(1)


async def written(service: Service, name: str | None, input_ids: list[int], tokens: int) -> float:
    """Seconds to the first token; the text is generated to its end."""
    clock, first = time.perf_counter(), 0.0
    version = None if name is None else service.registry.lease(name)
    async for _ in service.generate(version, input_ids, SamplingParams(max_tokens=tokens)):
        first = first or time.perf_counter() - clock
    if version is not None:
        service.registry.release(version)
    return first


def speed(folder: Path) -> Iterator[dict[str, Any]]:
    """Throughput of 64 concurrent requests to 16 adapters."""
    with served(folder) as service:
        input_ids = [service.tokenize(f"{TEXTS[i % len(TEXTS)]} {i}") for i in range(ADAPTERS * EACH)]

        async def all_at_once() -> None:
            pairs = [(str(i % ADAPTERS), ids) for i, ids in enumerate(input_ids)]
            await asyncio.gather(*(written(service, name, ids, WRITTEN) for name, ids in pairs))

        base, tokenizer = load_base_model(MODEL)
        base.generation_config.eos_token_id = None
        theirs = by_peft(load_base_model(MODEL)[0], folder, input_ids, tokenizer.pad_token_id)

        def engine() -> None:
            asyncio.run(all_at_once())

        by_adapter, peft_takes, ours = ratio(theirs, engine, rounds=ROUNDS)
        plain = ratio(lambda: generate(base, input_ids, tokenizer.pad_token_id), engine, rounds=ROUNDS)[0]
    tokens = len(input_ids) * WRITTEN
    yield measure(
        "16 adapters x 4 requests of 32 tokens: tokens/s / PEFT's, adapter by adapter", by_adapter, 3.0, at_least=True
    )
    yield measure("the same / one batch of the base model alone", plain, 0.85, at_least=True)
    yield measure("tokens/s", tokens / ours, None)
    yield measure("PEFT's tokens/s", tokens / peft_takes, None)


def by_peft(base: PreTrainedModel, folder: Path, input_ids: list[list[int]], pad: int) -> Callable[[], None]:
    """Generation by PEFT: one adapter after the other, each with a batch of its requests."""
    import peft  # not installed beside vLLM

    base.generation_config.eos_token_id = None
    model = peft.PeftModel.from_pretrained(base, folder / "0", adapter_name="0").eval()
    for number in range(1, ADAPTERS):
        model.load_adapter(folder / str(number), adapter_name=str(number))

    def run() -> None:
        for number in range(ADAPTERS):
            model.set_adapter(str(number))
            generate(model, input_ids[number::ADAPTERS], pad)

    return run


def generate(model: Any, rows: list[list[int]], pad: int, tokens: int = WRITTEN, **options: Any) -> torch.Tensor:
    """[B, tokens] greedy continuations of a batch of texts."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad, **options
        )
    return found[:, width:]


def first_token(folder: Path) -> Iterator[dict[str, Any]]:
    """Time to first token of a text of 20 tokens, after a prompt of 100 virtual tokens and after 100 tokens of text."""
    with served(folder) as service:
        input_ids = [(service.tokenize(TEXTS[0]) * 10)[:20], (service.tokenize(" ".join(TEXTS)) * 10)[:120]]
        sides = [(("one", input_ids[0])), ((None, input_ids[1]))]
        both: dict[int, list[float]] = defaultdict(list)
        for _ in range(4 * ROUNDS):
            for side, (name, ids) in enumerate(sides):
                both[side].append(asyncio.run(written(service, name, ids, 1)))
    ours, theirs = (statistics.median(both[side][1:]) for side in range(2))
    yield measure("first token behind 100 virtual tokens / behind as many tokens of text", ours / theirs, 0.6)
    yield measure("milliseconds until that first token", 1000 * ours, None)


def in_memory() -> Iterator[dict[str, Any]]:
    """Memory and loading times, measured in a separate process, whose memory nothing else has used."""
    found = subprocess.run([sys.executable, __file__, "memory"], capture_output=True, text=True, check=True)
    numbers = json.loads(found.stdout.splitlines()[-1])
    yield measure("MB of 1,000 prefix adapters of 20 virtual tokens, beyond the model", numbers["megabytes"], 150)
    yield measure("milliseconds until a cold one of them is loaded, median", numbers["median"], 20)
    yield measure("milliseconds until a cold one of them is loaded, longest of 200", numbers["longest"], None)
    yield measure("seconds to check and bake the 1,000", numbers["seconds"], None)


def memory() -> dict[str, float]:
    """Memory and loading times of 1,000 adapters, 200 of which get requests, with an adapter cache of 64 MB."""
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder, "many")
        base, _ = load_base_model(MODEL)
        save_adapter(base, many / "0", PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20))
        del base
        for number in range(1, MANY):
            vary(many / "0", many / str(number), number)
        Path(folder, "none").mkdir()
        with served(Path(folder, "none"), EngineConfig(adapter_cache_bytes=64 * 2**20, num_kv_slots=4096)) as service:
            input_ids = service.tokenize(TEXTS[0])
            asyncio.run(written(service, None, input_ids, 4))
            before, clock = psutil.Process().memory_info().rss, time.perf_counter()
            AdapterFolder(str(many)).follow(service.registry)
            seconds = time.perf_counter() - clock
            for number in range(USED):
                asyncio.run(written(service, str(number), input_ids, 1))
            grown = psutil.Process().memory_info().rss - before
            loads = [loaded(service, str(number)) for number in range(USED)]
    return {
        "megabytes": grown / 1e6,
        "median": 1000 * statistics.median(loads),
        "longest": 1000 * max(loads),
        "seconds": seconds,
    }


def loaded(service: Service, name: str) -> float:
    """Seconds to load an adapter that is not in memory."""
    service.engine.batch.adapter_cache.shrink(0)
    version, clock = service.registry.lease(name), time.perf_counter()
    service.engine.batch.adapter_cache.use(version)
    seconds = time.perf_counter() - clock
    service.engine.batch.adapter_cache.done(version)
    service.registry.release(version)
    return seconds


def replaced(folder: Path) -> Iterator[dict[str, Any]]:
    """1,000 requests from 32 clients, one of 50 adapters replaced every second; answers are checked by ``generate``."""
    kept = folder.parent / "kept"
    with served(folder) as service:
        for version in service.registry.versions:
            shutil.copytree(folder / version.name, kept / f"{version.name}@{version.number}")
        app = create_app(service, AdapterFolder(str(folder)), Settings())
        with listening(app) as url, replacing(service, folder, kept) as count, ThreadPoolExecutor(CLIENTS) as threads:
            clock = time.perf_counter()
            found = list(threads.map(lambda i: ask(url, i), range(REQUESTS)))
            seconds = time.perf_counter() - clock
    wrong = sum(1 for _ in differing(found, kept))
    yield measure("1,000 requests from 32 clients over 50 adapters: errors", sum(a is None for _, a in found), 0)
    yield measure("answers that are not those of generate with the version that they name", wrong, 0)
    yield measure("adapters replaced meanwhile", count(), None)
    yield measure("requests a second", REQUESTS / seconds, None)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@contextmanager
def replacing(service: Service, folder: Path, kept: Path) -> Iterator[Callable[[], int]]:
    """Replace the weights of one adapter every second; yields a function that returns how many were replaced."""
    ended, draw = threading.Event(), random.Random(0)
    done: list[str] = []

    def replace() -> None:
        while not ended.wait(1):
            name = str(draw.randrange(SERVED))
            vary(folder / name, folder / name, 1000 + len(done))
            version = AdapterFolder(str(folder)).load(name, service.registry)
            shutil.copytree(folder / name, kept / f"{name}@{version.number}")
            done.append(name)

    thread = threading.Thread(target=replace)
    thread.start()
    yield lambda: len(done)
    ended.set()
    thread.join()


def ask(url: str, number: int) -> tuple[int, dict[str, Any] | None]:
    """The index of a text, and the server's answer to it; None for an error."""
    text = number % len(TEXTS)
    body = {"model": str(number * 7 % SERVED), "prompt": TEXTS[text], "max_tokens": SHORT, "temperature": 0}
    try:
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
    except httpx.HTTPError:
        return text, None
    return text, response.json() if response.status_code == 200 else None


def differing(found: list[tuple[int, dict[str, Any] | None]], kept: Path) -> Iterator[dict[str, Any]]:
    """Answers that are not those of ``generate``."""
    base, tokenizer = load_base_model(MODEL)
    base.generation_config.eos_token_id = None
    input_ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    answers = [(text, answer) for text, answer in found if answer is not None]
    for version in {answer["system_fingerprint"] for _, answer in answers}:
        model = PeftModel.from_pretrained(base, kept / version)
        rows = generate(model, input_ids, tokenizer.pad_token_id, SHORT)
        expected = tokenizer.batch_decode(rows, skip_special_tokens=True)
        for text, answer in answers:
            if answer["system_fingerprint"] == version and answer["choices"][0]["text"] != expected[text]:
                yield answer


if __name__ == "__main__":
    main()
