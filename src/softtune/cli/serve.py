"""``softtune serve``: serve folders of adapters over HTTP."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import ceil
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET, socket
from typing import Annotated, Any, Literal

import typer
import uvicorn

from softtune.cli.console import console, quiet
from softtune.cli.flags import flag, with_load_flags
from softtune.errors import ConfigError
from softtune.extras import require
from softtune.pretrained import LoadOptions, locate_base_model
from softtune.serving.engine_config import EngineConfig
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.app import Settings, create_app
from softtune.serving.replicas import run
from softtune.serving.service import Service

KEYS, ADMIN_KEYS = "SOFTTUNE_API_KEYS", "SOFTTUNE_ADMIN_KEYS"
"""Environment variables with keys, separated by commas. No flags, since other users of a machine see command lines."""

OldFlag = Annotated[int | None, typer.Option(hidden=True, min=1)]
OldSlots = Annotated[int | None, typer.Option("--slots", hidden=True, min=64)]
OldHot = Annotated[int | None, typer.Option("--hot", hidden=True, min=0)]
NEW_FLAGS = {
    "rows": "max_num_seqs",
    "waiting": "max_num_waiting",
    "tokens": "max_num_batched_tokens",
    "slots": "num_kv_slots",
    "hot": "adapter_cache_mb",
}
"""The new names of flags by their old ones, which still work for one release."""


@with_load_flags
def command(
    model: Annotated[str, typer.Option(help="Base model: a folder, a hub name, smollm2-135m or minilm.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder with a folder for each adapter, or an adapter's own; also an address such as "
            "s3://bucket/adapters or hf://user/adapter. May be repeated."
        ),
    ] = None,
    follow: Annotated[
        float | None,
        typer.Option(min=0.1, help="Seconds between two looks for adapters that are new, changed or gone."),
    ] = None,
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="What writes texts; vllm for GPUs and many users at once.")
    ] = "transformers",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share each layer; with --engine vllm.")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Requests in the running batch.")
    ] = EngineConfig.max_num_seqs,
    max_num_waiting: Annotated[
        int, typer.Option(min=1, help="Requests that wait for a place in it.")
    ] = EngineConfig.max_num_waiting,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a step.")
    ] = EngineConfig.max_num_batched_tokens,
    num_kv_slots: Annotated[
        int, typer.Option(min=64, help="Tokens in memory of all requests together.")
    ] = EngineConfig.num_kv_slots,
    adapter_cache_mb: Annotated[int, typer.Option(min=0, help="Megabytes of adapters to keep in memory.")] = (
        EngineConfig.adapter_cache_bytes // 2**20
    ),
    prepack_weights: Annotated[
        bool, typer.Option(help="Copy the base model's weights in the layout of the CPU's kernels.")
    ] = EngineConfig.prepack_weights,
    threads: Annotated[
        int, typer.Option(min=0, help="Threads of the CPU; 0 for as many as half a second's try finds fastest.")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = Settings.seconds,
    replicas: Annotated[int, typer.Option(min=1, help="Servers beside each other, by Ray Serve where several.")] = 1,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that answers have at shutdown.")] = Settings.grace,
    rows: OldFlag = None,
    waiting: OldFlag = None,
    tokens: OldFlag = None,
    slots: OldSlots = None,
    hot: OldHot = None,
    *,
    load: Mapping[str, Any],
) -> None:
    """Serve adapters on one base model over HTTP: OpenAI's API, labels and tags, and a page to try them.

    Keys come by the environment: SOFTTUNE_API_KEYS for those who may ask, SOFTTUNE_ADMIN_KEYS for those who may load
    and unload adapters, several with commas between them.
    """
    quiet()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    sizes = {
        "max_num_seqs": max_num_seqs,
        "max_num_waiting": max_num_waiting,
        "max_num_batched_tokens": max_num_batched_tokens,
        "num_kv_slots": num_kv_slots,
        "adapter_cache_mb": adapter_cache_mb,
    }
    sizes |= _renamed(rows=rows, waiting=waiting, tokens=tokens, slots=slots, hot=hot)
    engine_config = EngineConfig(
        adapter_cache_bytes=sizes.pop("adapter_cache_mb") * 2**20,
        prepack_weights=prepack_weights,
        threads=threads,
        **sizes,
    )
    settings = Settings(keys=_keys(KEYS), admin_keys=_keys(ADMIN_KEYS), seconds=seconds, grace=grace, follow=follow)
    made = _engine(engine, model, gpus, LoadOptions(**load))
    if engine == "vllm":  # which computes in processes of its own
        engine_config = replace(engine_config, threads=None)
    _check_port(host, port)
    if replicas > 1:
        console.print(f"{replicas} servers of {model} start: http://{host}:{port}", soft_wrap=True)
        run(model, adapters or [], engine_config, settings, replicas=replicas, host=host, port=port, **made)
        return
    folder = AdapterFolder(*adapters or [])
    with console.status("loading"):
        service = Service(model, engine_config, **made)
        if engine == "vllm":  # raises if vLLM has not started: it could serve no adapter
            console.print(f"vLLM runs {model}: texts of {service.engine.max_model_len} tokens at most", soft_wrap=True)
        folder.follow(service.registry)
    served = len(service.registry.versions)
    adapter = "adapter" if served == 1 else "adapters"
    console.print(
        f"{served} {adapter} on {model}: http://{host}:{port}, its API http://{host}:{port}/docs", soft_wrap=True
    )
    config = uvicorn.Config(
        create_app(service, folder, settings),
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=ceil(grace) + 1,  # by then all responses have ended, except to stalled clients
    )
    _Server(config, service, grace).run()


def _renamed(**given: int | None) -> dict[str, int]:
    """Values given by old flags, under the new names; logs a warning for each."""
    for name in (name for name, value in given.items() if value is not None):
        logging.warning("%s is %s now, and will go: use that", flag(name), flag(NEW_FLAGS[name]))
    return {NEW_FLAGS[name]: value for name, value in given.items() if value is not None}


class _Server(uvicorn.Server):
    """A uvicorn server that, at shutdown, ends the requests before uvicorn waits for their connections."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service = service
        self._grace = grace

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        # Not in the signal handler, which may have interrupted code that holds the locks.
        self._service.thread.end(self._grace)
        await super().shutdown(sockets)


def _engine(name: str, model: str, gpus: int, options: LoadOptions) -> dict[str, Any]:
    """The arguments of a ``Service`` for its engine and its base model.

    vLLM loads a base model of its own. The one beside it, by which adapters are exported, leaves the GPUs to it.

    Raises:
        MissingExtraError: the engine's package is not installed, or a quantisation's.
        ConfigError: the engine does not support several GPUs, or there is no such device.
    """
    if name == "transformers" and gpus > 1:
        raise ConfigError("the engine transformers takes one GPU", "add --engine vllm, or --device-map auto")
    if name == "transformers":
        options.check_machine()
        return {"options": options}
    if options.model_fields_set:
        given = flag(min(options.model_fields_set))
        raise ConfigError(f"vLLM loads its base model itself, and takes no {given}", "leave it out")
    require("vllm")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # by default vLLM sends them without asking
    from softtune.serving.vllm.engine import VllmEngine

    return {"engine": partial(VllmEngine, locate_base_model(model), gpus=gpus), "options": LoadOptions(device="cpu")}


def _check_port(host: str, port: int) -> None:
    """Check that a server can listen, before it loads anything.

    Raises:
        ConfigError: the address cannot be bound.
    """
    family = AF_INET6 if ":" in host else AF_INET
    with socket(family) as probe:
        probe.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"nobody can listen at {host}:{port} ({error.strerror})", "name another --port"
            ) from error


def _keys(variable: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in os.environ.get(variable, "").split(",") if key.strip())
