"""Several servers behind Ray Serve, as a user starts them."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from softtune.errors import ConfigError, MissingExtraError
from softtune.serving.engine_config import EngineConfig
from softtune.serving.http.app import Settings
from softtune.serving.replicas import run
from tests.serving.processes import started, wait_for
from tests.serving.test_http import complete, generated

FOLLOWING = 60
"""Seconds to wait."""


@pytest.mark.slow
def test_replicas_answer_and_follow_the_folder(llama: str, adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "prefix", tmp_path / "one")
    with started("--model", llama, "--adapters", str(tmp_path), "--replicas", "2", "--follow", "0.5") as (client, _):
        expected = generated(llama, adapters / "prefix", "the sky is", 9)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: complete(client, model="one", max_tokens=9), range(24)))
        assert {one.json()["choices"][0]["text"] for one in found} == {expected}
        shutil.copytree(adapters / "prompt", tmp_path / "two")

        def is_everywhere() -> bool:
            return all(complete(client, model="two", max_tokens=2).status_code == 200 for _ in range(10))

        wait_for(is_everywhere, FOLLOWING)


@pytest.mark.slow
def test_more_than_replicas_take_are_refused(llama: str) -> None:
    options = ("--model", llama, "--replicas", "2", "--rows", "1", "--waiting", "1")
    with started(*options) as (client, _), ThreadPoolExecutor(24) as threads:
        found = list(threads.map(lambda _: complete(client, model=llama, max_tokens=40), range(48)))
    assert {one.status_code for one in found} == {200, 429}
    assert all(one.headers["Retry-After"] == "1" for one in found if one.status_code == 429)


def test_requests_do_not_load_adapters_into_one_of_several() -> None:
    with pytest.raises(ConfigError, match="a request reaches one of the replicas: put adapters into their folder"):
        run("any", [], EngineConfig(), Settings(admin_keys=("boss",)), replicas=2, host="127.0.0.1", port=1)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"running on Ray needs ray\[serve\]: pip install 'softtune\[ray\]'"):
        run("any", [], EngineConfig(), Settings(), replicas=2, host="127.0.0.1", port=1)
