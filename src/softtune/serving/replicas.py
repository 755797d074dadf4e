"""Several servers behind Ray Serve, on one machine or a cluster's, each with the base model and the adapters' folder.

Requests go to the replica that has the fewest. Replicas know nothing of each other: each follows the folder, so that
what is put there, or taken away, is soon the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from softtune.errors import ConfigError
from softtune.serving.folder import AdapterFolder
from softtune.serving.http.app import Settings, create_app
from softtune.serving.limits import Limits
from softtune.serving.service import Service

FOLLOW = 5.0
"""Seconds between two looks at the folder, where the settings name none."""


def run(
    model: str,
    adapters: Sequence[str],
    limits: Limits,
    settings: Settings,
    *,
    replicas: int,
    host: str,
    port: int,
    **made: Any,
) -> None:
    """Start replicas and wait for Ctrl-C.

    Args:
        model: the base model's name, which every machine finds.
        adapters: their paths, see ``AdapterFolder``; every machine finds the same there.
        limits: of each replica.
        settings: of each replica, but that nobody may load adapters into one alone.
        replicas: how many.
        host: address to listen at.
        port: port to listen at.
        made: what else a ``Service`` is made with.

    Raises:
        ConfigError: Ray Serve is not installed, or adapters are to be loaded by requests.
    """
    if settings.admin_keys:
        raise ConfigError(
            "a request reaches one of the replicas: put adapters into their folder, and drop the admin keys"
        )
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(
            "replicas need the package of Ray Serve: pip install 'softtune[ray]', or serve one"
        ) from error
    serve.start(http_options={"host": host, "port": port})
    app = application(model, adapters, limits, settings, replicas=replicas, **made)
    serve.run(app, name="softtune", blocking=True)


def application(
    model: str, adapters: Sequence[str], limits: Limits, settings: Settings, *, replicas: int, **made: Any
) -> Any:
    """What Ray Serve runs; see ``run``."""
    from ray import serve
    from ray.serve.config import BackpressureConfig

    own = replace(settings, follow=settings.follow or FOLLOW)

    @serve.deployment(
        name="softtune",
        num_replicas=replicas,
        max_ongoing_requests=limits.rows + limits.waiting,
        max_queued_requests=limits.waiting,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
    )
    @serve.ingress()
    class Replica:
        """A server of its own."""

        def __init__(self) -> None:
            self._service, self._folder = Service(model, limits, **made), AdapterFolder(*adapters)
            self._folder.follow(self._service.registry)

        def __serve_build_asgi_app__(self) -> Any:
            return create_app(self._service, self._folder, own)

        def check_health(self) -> None:
            """Raise RuntimeError where nothing works on requests any more: Ray starts another one."""
            if not self._service.is_alive:
                raise RuntimeError("nothing works on requests")

    bound: Any = Replica
    return bound.bind()
