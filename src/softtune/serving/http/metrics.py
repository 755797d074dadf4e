"""Metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from softtune.serving.service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Bounds of the histograms' buckets."""


class Metrics:
    """The metrics of one server.

    Args:
        service: the service whose queues, batches and adapters are measured.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._all = all_ = CollectorRegistry()
        self._requests = Counter("softtune_requests", "Ended requests.", ("adapter", "path", "status"), registry=all_)
        self._tokens = Counter("softtune_tokens", "Tokens read and written.", ("adapter", "kind"), registry=all_)
        self._seconds, self._first = (
            Histogram(f"softtune_{name}_seconds", text, ("adapter",), buckets=SECONDS, registry=all_)
            for name, text in (("request", "Until a request's end."), ("first_token", "Until a text's first token."))
        )
        gauges: dict[str, tuple[str, Callable[[], int]]] = {
            "waiting": (
                "Requests that wait for a place.",
                lambda: sum(len(engine.batch.queue) for engine in service.thread.engines),
            ),
            "running": (
                "Requests in the batch.",
                lambda: sum(len(engine.batch.running) for engine in service.thread.engines),
            ),
            "adapters": ("Adapters that are served.", lambda: len(service.registry.versions)),
            "adapter_bytes": (
                "Bytes of adapters in memory.",
                lambda: sum(engine.batch.adapter_cache.nbytes for engine in service.thread.engines),
            ),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"softtune_{name}", text, registry=all_).set_function(value)

    @property
    def text(self) -> bytes:
        """All metrics in Prometheus' text format, without those of adapters that are no longer served."""
        registry = self._service.registry
        served = {"", self._service.name, *(version.name for version in [*registry.versions, *registry.composed])}
        for counts in (self._requests, self._tokens, self._seconds, self._first):
            samples = [sample.labels for family in counts.collect() for sample in family.samples]
            gone = [labels for labels in samples if labels["adapter"] not in served]
            for labels in {tuple(labels[name] for name in labels if name != "le") for labels in gone}:
                counts.remove(*labels)
        return generate_latest(self._all)

    def ended(self, adapter: str, path: str, status: int, seconds: float) -> None:
        """Record a finished request with its HTTP status and duration."""
        self._requests.labels(adapter, path, str(status)).inc()
        self._seconds.labels(adapter).observe(seconds)

    def read(self, adapter: str, tokens: int) -> None:
        """Count tokens that the model has read."""
        self._tokens.labels(adapter, "read").inc(tokens)

    def began_to_write(self, adapter: str, seconds: float) -> None:
        """Record the time to the first generated token."""
        self._first.labels(adapter).observe(seconds)

    def wrote(self, adapter: str) -> None:
        """Count one generated token."""
        self._tokens.labels(adapter, "written").inc()
