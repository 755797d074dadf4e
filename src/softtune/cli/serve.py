"""``softtune serve``: a folder of adapters as an HTTP server."""

from __future__ import annotations

import logging
import os
from functools import partial
from importlib.util import find_spec
from math import ceil
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET, socket
from typing import Annotated, Any, Literal

import typer
import uvicorn

from softtune.cli.console import console, quiet
from softtune.errors import ConfigError
from softtune.pretrained import locate_base_model
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.app import Settings, create_app
from softtune.serving.limits import Limits
from softtune.serving.replicas import run
from softtune.serving.service import Service

KEYS, ADMIN_KEYS = "SOFTTUNE_API_KEYS", "SOFTTUNE_ADMIN_KEYS"
"""Environment variables with keys, several with commas between them: other users of a machine see command lines."""


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
    rows: Annotated[int, typer.Option(min=1, help="Requests in the running batch.")] = Limits.rows,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that wait for a place in it.")] = Limits.waiting,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = Limits.tokens,
    slots: Annotated[int, typer.Option(min=64, help="Tokens in memory of all requests together.")] = Limits.slots,
    hot: Annotated[int, typer.Option(min=0, help="Megabytes of adapters to keep in memory.")] = Limits.hot // 2**20,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = Settings.seconds,
    replicas: Annotated[int, typer.Option(min=1, help="Servers beside each other, by Ray Serve where several.")] = 1,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that answers have at shutdown.")] = Settings.grace,
) -> None:
    """Serve adapters on one base model over HTTP: OpenAI's API, labels and tags, and a page to try them.

    Keys come by the environment: SOFTTUNE_API_KEYS for those who may ask, SOFTTUNE_ADMIN_KEYS for those who may load
    and unload adapters, several with commas between them.
    """
    quiet()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    limits = Limits(rows=rows, waiting=waiting, tokens=tokens, slots=slots, hot=hot * 2**20)
    settings = Settings(keys=_keys(KEYS), admin_keys=_keys(ADMIN_KEYS), seconds=seconds, grace=grace, follow=follow)
    made = _engine(engine, model, gpus)
    _check_port(host, port)
    if replicas > 1:
        console.print(f"{replicas} servers of {model} start: http://{host}:{port}", soft_wrap=True)
        run(model, adapters or [], limits, settings, replicas=replicas, host=host, port=port, **made)
        return
    folder = AdapterFolder(*adapters or [])
    with console.status("loading"):
        service = Service(model, limits, **made)
        if engine == "vllm":  # what keeps it from starting keeps it for every adapter
            console.print(f"vLLM runs {model}: texts of {service.engine.longest} tokens at most", soft_wrap=True)
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
        timeout_graceful_shutdown=ceil(grace) + 1,  # by then all answers have ended, and who stalls is left
    )
    _Server(config, service, grace).run()


class _Server(uvicorn.Server):
    """Lets requests end, or fail, from the signal on that ends it; uvicorn waits for their connections."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service = service
        self._grace = grace

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self._service.loop.end(self._grace)  # not in the signal's handler, which may have interrupted who has the locks
        await super().shutdown(sockets)


def _engine(name: str, model: str, gpus: int) -> dict[str, Any]:
    """How a service's engine is made, where it is not its own. Raises ConfigError where the package is missing."""
    if name == "transformers" and gpus > 1:
        raise ConfigError("the engine transformers takes one GPU: add --engine vllm")
    if name == "transformers":
        return {}
    if find_spec("vllm") is None:
        raise ConfigError("the engine vllm comes with a package that is not installed: pip install 'softtune[vllm]'")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it asks nobody whether it may send them
    from softtune.serving.vllm.engine import VllmEngine

    return {"engine": partial(VllmEngine, locate_base_model(model), gpus=gpus)}


def _check_port(host: str, port: int) -> None:
    """Raise ConfigError where a server cannot listen, before it loads anything."""
    family = AF_INET6 if ":" in host else AF_INET
    with socket(family) as probe:
        probe.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"nobody can listen at {host}:{port} ({error.strerror}): name another --port") from error


def _keys(variable: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in os.environ.get(variable, "").split(",") if key.strip())
