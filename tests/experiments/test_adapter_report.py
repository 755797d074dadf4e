"""The pages of adapters, and every kind of page in a browser."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from softtune.experiments import report
from tests.cli.test_cli import run, write_recipe
from tests.tiny import save_models

BROWSER = shutil.which("chromium")
PHONE, DESKTOP = 390, 1280
FRAME = """<!doctype html><iframe width="{width}" height="800" style="border: 0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{ const own = document.querySelector("iframe").contentDocument;
  const hidden = [...own.querySelectorAll(".wide")].map(table => table.scrollWidth - table.clientWidth);
  const first = own.querySelector("td:nth-child(2)").getBoundingClientRect().right;
  document.body.dataset.seen = [own.documentElement.clientWidth, own.documentElement.scrollWidth,
    own.querySelectorAll("figure svg").length, ...hidden, Math.round(first)].join(" "); }});
</script>"""
"""A page in a window as narrow as a phone's, which browsers do not open, and what is to be seen of it: its width,
pictures, how far tables go on beyond what is shown, and where the first number ends."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("changes", "pictures"),
    [
        ({}, ["loss_while_training.svg", "norms_of_the_prefix_by_layer.svg"]),
        ({"method": "PROMPT_TUNING"}, ["loss_while_training.svg", "virtual_tokens_and_their_nearest_words.svg"]),
        ({"method": "BITFIT"}, ["loss_while_training.svg", "mean_absolute_change_of_the_biases.svg"]),
        ({"method": "IA3"}, ["loss_while_training.svg", "mean_distance_of_the_factors_from_1.svg"]),
        ({"ensemble": 2, "patience": 3, "save_steps": 1}, ["loss_while_training.svg"]),
    ],
)
def test_an_adapter_has_a_page(
    models: dict[str, str], tmp_path: Path, changes: dict[str, Any], pictures: list[str]
) -> None:
    out = tmp_path / "out"
    assert run("train", write_recipe(tmp_path / "recipe.yaml", models["llama"], out, **changes)) == 0
    assert run("report", str(out)) == 0
    markdown = (out / report.MARKDOWN_NAME).read_text(encoding="utf-8")
    assert re.findall(r"\]\((.*?)\)", markdown) == pictures
    assert all((out / picture).read_text(encoding="utf-8").startswith("<svg") for picture in pictures)
    if "patience" in changes:
        assert "validation loss of 2" in (out / pictures[0]).read_text(encoding="utf-8")


@pytest.mark.skipif(BROWSER is None, reason="needs the browser chromium")
@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_a_browser_shows_the_page_without_errors_at_any_width(
    models: dict[str, str], tmp_path: Path, command: str
) -> None:
    recipe, out = write_recipe(tmp_path / "recipe.yaml", models["llama"], tmp_path / "out"), str(tmp_path / "out")
    options = {
        "train": [],
        "compare": ["--entries", "prefix-tuning,full,zero-shot", "--seeds", "2", "--output", out],
        "sweep": ["--over", "{learning_rate: [0.01, 0.1], options.num_virtual_tokens: [2, 3]}", "--output", out],
    }
    assert run(command, recipe, *options[command]) == 0
    assert run("report", out) == 0
    page = (tmp_path / "out" / report.PAGE_NAME).read_text(encoding="utf-8")
    for size in (PHONE, DESKTOP):
        frame = tmp_path / "frame.html"
        frame.write_text(FRAME.format(width=size, page=html.escape(page)), encoding="utf-8")
        seen = browse(frame, tmp_path / "profile")
        inner, width, shown, *hidden, first = map(int, re.findall(r'data-seen="([\d ]+)"', seen.stdout)[0].split())
        assert width == inner <= size
        assert shown == page.count("<figure>") > 0
        assert first < width or command == "train"
        assert size == PHONE or not any(hidden)
        assert "CONSOLE" not in seen.stderr


def browse(page: Path, profile: Path) -> subprocess.CompletedProcess[str]:
    """The page's elements as a phone's browser has them, and what it writes to its console."""
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    place = [f"--user-data-dir={profile}", "--enable-logging=stderr", page.as_uri()]
    return subprocess.run([str(BROWSER), *switches, *place], capture_output=True, text=True, check=True, timeout=60)
