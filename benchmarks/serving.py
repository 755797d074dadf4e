"""Serving many adapters: speed beside PEFT's and the base model's alone, the first token, memory, and answers while
adapters are replaced.

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
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.app import Settings, create_app
from softtune.serving.limits import Limits
from softtune.serving.sampling import Sampling
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
    """A copy of an adapter with other numbers of the same size."""
    if source != target:
        shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    states = {name: t[torch.randperm(len(t), generator=generator)] for name, t in load_file(file).items()}
    noisy = {name: t * (1 + 0.1 * torch.randn(t.shape, generator=generator)) for name, t in states.items()}
    save_file(noisy, target / "new", metadata={"format": "pt"})
    (target / "new").replace(file)


@contextmanager
def served(folder: Path, limits: Limits | None = None) -> Iterator[Service]:
    """Adapters that never end a text by themselves, so that all sides write as much."""
    service = Service(MODEL, limits)
    AdapterFolder(str(folder)).follow(service.registry)
    service.engine.backbone.model.generation_config.eos_token_id = None
    service.start()
    yield service
    service.close(1)


async def written(service: Service, name: str | None, words: list[int], tokens: int) -> float:
    """Seconds until the first token of a text that is written to its end."""
    clock, first = time.perf_counter(), 0.0
    version = None if name is None else service.registry.lease(name)
    async for _ in service.write(version, words, Sampling(max_tokens=tokens)):
        first = first or time.perf_counter() - clock
    if version is not None:
        service.registry.release(version)
    return first


def speed(folder: Path) -> Iterator[dict[str, Any]]:
    """64 requests of 16 adapters at once."""
    with served(folder) as service:
        words = [service.tokenized(f"{TEXTS[i % len(TEXTS)]} {i}") for i in range(ADAPTERS * EACH)]

        async def all_at_once() -> None:
            pairs = [(str(i % ADAPTERS), own) for i, own in enumerate(words)]
            await asyncio.gather(*(written(service, name, own, WRITTEN) for name, own in pairs))

        base, tokenizer = load_base_model(MODEL)
        base.generation_config.eos_token_id = None
        theirs = by_peft(load_base_model(MODEL)[0], folder, words, tokenizer.pad_token_id)

        def engine() -> None:
            asyncio.run(all_at_once())

        by_adapter, peft_takes, ours = ratio(theirs, engine, rounds=ROUNDS)
        plain = ratio(lambda: generate(base, words, tokenizer.pad_token_id), engine, rounds=ROUNDS)[0]
    tokens = len(words) * WRITTEN
    yield measure(
        "16 adapters x 4 requests of 32 tokens: tokens/s / PEFT's, adapter by adapter", by_adapter, 3.0, at_least=True
    )
    yield measure("the same / one batch of the base model alone", plain, 0.85, at_least=True)
    yield measure("tokens/s", tokens / ours, None)
    yield measure("PEFT's tokens/s", tokens / peft_takes, None)


def by_peft(base: PreTrainedModel, folder: Path, words: list[list[int]], pad: int) -> Callable[[], None]:
    """One adapter after the other, each with a batch of its requests."""
    import peft  # missing where vLLM is

    base.generation_config.eos_token_id = None
    model = peft.PeftModel.from_pretrained(base, folder / "0", adapter_name="0").eval()
    for number in range(1, ADAPTERS):
        model.load_adapter(folder / str(number), adapter_name=str(number))

    def run() -> None:
        for number in range(ADAPTERS):
            model.set_adapter(str(number))
            generate(model, words[number::ADAPTERS], pad)

    return run


def generate(model: Any, words: list[list[int]], pad: int, tokens: int = WRITTEN, **options: Any) -> torch.Tensor:
    """[B, tokens] what a batch of texts goes on with, the likeliest tokens."""
    width = max(map(len, words))
    ids = torch.tensor([[pad] * (width - len(own)) + own for own in words])
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in words])
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad, **options
        )
    return found[:, width:]


def first_token(folder: Path) -> Iterator[dict[str, Any]]:
    """A baked prompt of 100 virtual tokens beside 100 tokens of text, before a text of 20."""
    with served(folder) as service:
        words = [(service.tokenized(TEXTS[0]) * 10)[:20], (service.tokenized(" ".join(TEXTS)) * 10)[:120]]
        sides = [(("one", words[0])), ((None, words[1]))]
        both: dict[int, list[float]] = defaultdict(list)
        for _ in range(4 * ROUNDS):
            for side, (name, own) in enumerate(sides):
                both[side].append(asyncio.run(written(service, name, own, 1)))
    ours, theirs = (statistics.median(both[side][1:]) for side in range(2))
    yield measure("first token behind 100 virtual tokens / behind as many tokens of text", ours / theirs, 0.6)
    yield measure("milliseconds until that first token", 1000 * ours, None)


def in_memory() -> Iterator[dict[str, Any]]:
    """In a process of its own, whose memory nothing else has used."""
    found = subprocess.run([sys.executable, __file__, "memory"], capture_output=True, text=True, check=True)
    numbers = json.loads(found.stdout.splitlines()[-1])
    yield measure("MB of 1,000 prefix adapters of 20 virtual tokens, beyond the model", numbers["megabytes"], 150)
    yield measure("milliseconds until a cold one of them is loaded, median", numbers["median"], 20)
    yield measure("milliseconds until a cold one of them is loaded, longest of 200", numbers["longest"], None)
    yield measure("seconds to check and bake the 1,000", numbers["seconds"], None)


def memory() -> dict[str, float]:
    """Of 1,000 adapters, 200 of which are asked, with 64 MB of them in memory."""
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder, "many")
        base, _ = load_base_model(MODEL)
        save_adapter(base, many / "0", PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=20))
        del base
        for number in range(1, MANY):
            vary(many / "0", many / str(number), number)
        Path(folder, "none").mkdir()
        with served(Path(folder, "none"), Limits(hot=64 * 2**20, slots=4096)) as service:
            words = service.tokenized(TEXTS[0])
            asyncio.run(written(service, None, words, 4))
            before, clock = psutil.Process().memory_info().rss, time.perf_counter()
            AdapterFolder(str(many)).follow(service.registry)
            seconds = time.perf_counter() - clock
            for number in range(USED):
                asyncio.run(written(service, str(number), words, 1))
            grown = psutil.Process().memory_info().rss - before
            loads = [loaded(service, str(number)) for number in range(USED)]
    return {
        "megabytes": grown / 1e6,
        "median": 1000 * statistics.median(loads),
        "longest": 1000 * max(loads),
        "seconds": seconds,
    }


def loaded(service: Service, name: str) -> float:
    """Seconds until an adapter that is not in memory is there."""
    service.engine.hot.shrink(0)
    version, clock = service.registry.lease(name), time.perf_counter()
    service.engine.hot.use(version)
    seconds = time.perf_counter() - clock
    service.engine.hot.done(version)
    service.registry.release(version)
    return seconds


def replaced(folder: Path) -> Iterator[dict[str, Any]]:
    """1,000 requests from 32 clients, one of 50 adapters replaced every second; every answer beside ``generate``'s."""
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
    """Put other numbers in the place of one adapter every second; tells how many it were."""
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
    """The number of a text, and the answer to it; None for an error."""
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
    words = [tokenizer(text)["input_ids"] for text in TEXTS]
    answers = [(text, answer) for text, answer in found if answer is not None]
    for version in {answer["system_fingerprint"] for _, answer in answers}:
        model = PeftModel.from_pretrained(base, kept / version)
        rows = generate(model, words, tokenizer.pad_token_id, SHORT)
        expected = tokenizer.batch_decode(rows, skip_special_tokens=True)
        for text, answer in answers:
            if answer["system_fingerprint"] == version and answer["choices"][0]["text"] != expected[text]:
                yield answer


if __name__ == "__main__":
    main()
