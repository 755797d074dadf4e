"""Whatever is sent, the server answers with what its schema says, or refuses it: it never fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.serving.test_http import ADMIN, serving


@pytest.fixture(scope="module")
def api(llama: str, adapters: Path) -> Iterator[Any]:
    with serving(llama, adapters, seconds=5.0) as client:
        yield schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_breaks_the_server(api: Any, mode: GenerationMode) -> None:
    operations = [operation for found in api.get_all_operations() if (operation := found.ok()).body]
    assert len(operations) == 6
    for operation in operations:

        @settings(
            max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "prefix"  # else all would be unknown
            assert case.call(headers=ADMIN).status_code < 500

        ask()
