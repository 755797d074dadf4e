from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.processes import Processes, joined_processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    with joined_processes() as started:
        yield started
