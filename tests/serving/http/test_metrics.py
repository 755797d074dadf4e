"""Metrics count what has happened, show what there is, and forget adapters that are gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from softtune.serving.http.metrics import SECONDS, Metrics


def engine(waiting: int, running: int, nbytes: int) -> Any:
    batch = SimpleNamespace(
        queue=[None] * waiting, running=[None] * running, adapter_cache=SimpleNamespace(nbytes=nbytes)
    )
    return SimpleNamespace(batch=batch)


@pytest.fixture
def service() -> Any:
    versions = [SimpleNamespace(name=name) for name in ("one", "two")]
    thread = SimpleNamespace(engines=[engine(3, 2, 100), engine(1, 0, 20)])
    return SimpleNamespace(name="base", thread=thread, registry=SimpleNamespace(versions=versions, composed=[]))


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Values by the sample's name and its labels' values, without the times of creation."""
    families = text_string_to_metric_families(metrics.text.decode())
    found = [sample for family in families for sample in family.samples]
    return {(one.name, *one.labels.values()): one.value for one in found if not one.name.endswith("_created")}


def test_gauges_are_sums_over_the_engines_of_the_moment(service: Any) -> None:
    metrics = Metrics(service)
    names = ("softtune_waiting", "softtune_running", "softtune_adapters", "softtune_adapter_bytes")
    assert [samples(metrics)[(name,)] for name in names] == [4, 2, 2, 120]
    service.thread.engines.append(engine(1, 1, 1))
    service.registry.versions.clear()
    assert [samples(metrics)[(name,)] for name in names] == [5, 3, 0, 121]


def test_requests_and_tokens_are_counted_by_adapter(service: Any) -> None:
    metrics = Metrics(service)
    metrics.ended("one", "/v1/completions", 200, 0.02)
    metrics.ended("one", "/v1/completions", 200, 7.0)
    metrics.ended("one", "/v1/completions", 429, 100.0)
    metrics.ended("", "unknown", 404, 0.0)
    metrics.read("one", 5)
    metrics.read("one", 6)
    metrics.read("base", 2)
    for _ in range(3):
        metrics.wrote("two")
    found = samples(metrics)
    requests = {key[1:]: value for key, value in found.items() if key[0] == "softtune_requests_total"}
    assert requests == {
        ("one", "/v1/completions", "200"): 2,
        ("one", "/v1/completions", "429"): 1,
        ("", "unknown", "404"): 1,
    }
    tokens = {key[1:]: value for key, value in found.items() if key[0] == "softtune_tokens_total"}
    assert tokens == {("one", "read"): 11, ("base", "read"): 2, ("two", "written"): 3}


def test_times_fall_into_their_buckets(service: Any) -> None:
    metrics, seconds = Metrics(service), (0.01, 0.02, 7.0, 100.0)
    for number in seconds:
        metrics.ended("one", "/v1/completions", 200, number)
        metrics.began_to_write("two", number)
    found = samples(metrics)
    for name, adapter in (("softtune_request_seconds", "one"), ("softtune_first_token_seconds", "two")):
        for bound in SECONDS:
            key = (f"{name}_bucket", adapter, str(float(bound)))
            assert found[key] == sum(number <= bound for number in seconds)
        assert found[f"{name}_bucket", adapter, "+Inf"] == 4
        assert found[f"{name}_sum", adapter] == pytest.approx(sum(seconds))


def test_what_is_no_longer_served_is_forgotten(service: Any) -> None:
    metrics = Metrics(service)
    for adapter in ("one", "two", "base", ""):
        metrics.ended(adapter, "/v1/completions", 200, 0.1)
        metrics.read(adapter, 1)
        metrics.wrote(adapter)
        metrics.began_to_write(adapter, 0.1)
    assert {key[1] for key in samples(metrics) if len(key) > 1} == {"one", "two", "base", ""}
    del service.registry.versions[0]
    assert {key[1] for key in samples(metrics) if len(key) > 1} == {"two", "base", ""}
    service.registry.versions.append(SimpleNamespace(name="one"))
    assert ("softtune_tokens_total", "one", "read") not in samples(metrics)  # its counts begin anew


def test_servers_count_apart(service: Any) -> None:
    one, other = Metrics(service), Metrics(service)
    one.read("one", 5)
    assert ("softtune_tokens_total", "one", "read") not in samples(other)
