"""Several servers behind Ray Serve, on one machine or a cluster, each with the base model and the adapters' folder.

A request goes to the replica with the fewest running requests. Replicas know nothing of each other: each follows the
folder, so an adapter that is added or removed there is soon added or removed in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from softtune.errors import ConfigError
from softtune.extras import missing
from softtune.serving.engine_config import EngineConfig
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.app import Settings, create_app
from softtune.serving.service import Service

FOLLOW = 5.0
"""Seconds between two scans of the folder, where the settings set no interval."""


def run(
    model: str,
    adapters: Sequence[str],
    config: EngineConfig,
    settings: Settings,
    *,
    replicas: int,
    host: str,
    port: int,
    **made: Any,
) -> None:
    """Start replicas and wait for Ctrl-C.

    Args:
        model: the base model's name, available on every machine.
        adapters: their paths, see ``AdapterFolder``; the same on every machine.
        config: engine limits of each replica.
        settings: server settings of each replica, without admin keys.
        replicas: number of replicas.
        host: address to listen on.
        port: port to listen on.
        made: further arguments of ``Service``.

    Raises:
        MissingExtraError: the extra ``ray`` is not installed.
        ConfigError: the settings have admin keys.
    """
    if settings.admin_keys:
        raise ConfigError(
            "a request reaches one of the replicas", "put adapters into their folder, and drop the admin keys"
        )
    try:
        from ray import serve
    except ImportError as error:
        raise missing("ray[serve]", "ray") from error
    serve.start(http_options={"host": host, "port": port})
    app = application(model, adapters, config, settings, replicas=replicas, **made)
    serve.run(app, name="softtune", blocking=True)


def application(
    model: str, adapters: Sequence[str], config: EngineConfig, settings: Settings, *, replicas: int, **made: Any
) -> Any:
    """The Ray Serve application; see ``run``."""
    from ray import serve
    from ray.serve.config import BackpressureConfig

    replica_settings = replace(settings, follow=settings.follow or FOLLOW)

    @serve.deployment(
        name="softtune",
        num_replicas=replicas,
        max_ongoing_requests=config.max_num_seqs + config.max_num_waiting,
        max_queued_requests=config.max_num_waiting,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
    )
    @serve.ingress()
    class Replica:
        """One server."""

        def __init__(self) -> None:
            self._service, self._folder = Service(model, config, **made), AdapterFolder(*adapters)
            self._folder.follow(self._service.registry)

        def __serve_build_asgi_app__(self) -> Any:
            return create_app(self._service, self._folder, replica_settings)

        def check_health(self) -> None:
            """Check that requests are still run; otherwise Ray replaces the replica.

            Raises:
                RuntimeError: the engine or its thread has stopped.
            """
            if not self._service.is_alive:
                raise RuntimeError("nothing works on requests")

    bound: Any = Replica
    return bound.bind()
