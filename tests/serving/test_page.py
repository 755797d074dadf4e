"""The page, in a browser of a phone's width: texts and labels side by side, by the keyboard alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.serving.test_http import generated, serving
from tests.serving.test_tasks import LABELLED, ROWS, trained
from tests.tiny import save_chat_model
from tests.training.test_recipe_task import recipe

BROWSER = shutil.which("chromium")
TEMPLATE = "{prompt:3} {{red}} {x} text : "
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture
def folder(llama: str, adapters: Path, tmp_path: Path) -> Path:
    """Three adapters that write, one of them by a template, and one that labels."""
    texts: dict[str, Any] = {
        "template": TEMPLATE,
        "label_column": "y",
        "max_new_tokens": 8,
        "method": "PROMPT_TUNING",
        "options": {},
    }
    kinds = {"labels": recipe(tmp_path, llama, ROWS, **LABELLED), "told": recipe(tmp_path, llama, ROWS, **texts)}
    folder = trained(tmp_path / "adapters", kinds)
    for kind in ("prefix", "prompt"):
        shutil.copytree(adapters / kind, folder / kind)
    return folder


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser.new_page(viewport={"width": 390, "height": 844})
        browser.close()


@pytest.mark.skipif(BROWSER is None, reason="needs the browser chromium")
def test_the_page_shows_answers_side_by_side(page: Page, llama: str, folder: Path) -> None:
    problems: list[Any] = []
    page.on("pageerror", lambda error: problems.append(error))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    with serving(llama, folder) as client:
        page.goto(str(client.base_url))
        page.wait_for_selector("#choices input:checked")
        for box in page.query_selector_all("#choices input:not(:checked)"):
            box.focus()
            page.keyboard.press("Space")
        for column in ("text", "x"):
            page.get_by_label(column, exact=True).fill("the sky is")
        page.get_by_label("Tokens at most").fill("9")
        page.keyboard.press("Control+Enter")
        page.wait_for_function("document.querySelectorAll('article').length === 5 && !asking")
        cards = {
            card.query_selector("h2").inner_text(): card.inner_text() for card in page.query_selector_all("article")
        }
        asked = {llama: "the sky is", "prefix": "the sky is", "prompt": "the sky is", "told": "{red} the sky is text :"}
        for name, text in asked.items():
            expected = generated(llama, None if name == llama else folder / name, text, 9)
            assert cards[name].split("\n")[1].split() == expected.split()
        assert "tokens/s" in cards["prefix"]
        assert [bar.inner_text()[-1] for bar in page.query_selector_all(".bar")] == ["%", "%"]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not problems


@pytest.mark.skipif(BROWSER is None, reason="needs the browser chromium")
def test_the_page_asks_for_a_key_and_shows_errors(page: Page, llama: str, folder: Path) -> None:
    with serving(llama, folder, keys=("mine",)) as client:
        page.goto(str(client.base_url))
        page.get_by_label("API key").fill("mine")
        page.keyboard.press("Tab")
        page.wait_for_selector("#choices input")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("article .wrong")
        assert "the text is empty: write some words" in page.inner_text("#answers")


@pytest.mark.skipif(BROWSER is None, reason="needs the browser chromium")
def test_the_page_takes_one_choice_a_line(page: Page, llama: str, tmp_path: Path) -> None:
    rows = [{"x": "red", "options": ["warm", "cold"], "y": "warm"}] * 8
    own = recipe(tmp_path, llama, rows, template="{x} : ", label_column="y", choices="options")
    with serving(llama, trained(tmp_path / "adapters", {"chosen": own})) as client:
        assert client.get("/v1/models/chosen").json()["choices"] == "options"
        page.goto(str(client.base_url))
        page.wait_for_selector("#choices input:checked")
        assert "1 adapter on" in page.inner_text("#about")
        page.get_by_label("x", exact=True).fill("blue")
        page.get_by_label("options", exact=True).fill("the sky\n\n bad\nis\n")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".bar")
        shown = [bar.inner_text() for bar in page.query_selector_all(".bar span")]
        assert sorted(shown) == ["bad", "is", "the sky"]


@pytest.mark.skipif(BROWSER is None, reason="needs the browser chromium")
def test_the_page_asks_adapters_for_conversations_by_the_chat_template(page: Page, tmp_path: Path) -> None:
    model, rows = save_chat_model(tmp_path / "model"), [{"x": "red", "y": "warm"}] * 8
    own = recipe(tmp_path, model, rows, template="the {x}", label_column="y", chat=True, system="text")
    with serving(model, trained(tmp_path / "adapters", {"talk": own})) as client:
        messages = [{"role": "system", "content": "text"}, {"role": "user", "content": "the blue"}]
        asked = {"model": "talk", "messages": messages, "temperature": 0, "max_tokens": 9}
        expected = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
        page.goto(str(client.base_url))
        page.wait_for_selector("#choices input:checked")
        page.get_by_label("x", exact=True).fill("blue")
        page.get_by_label("Tokens at most").fill("9")
        page.keyboard.press("Control+Enter")
        page.wait_for_function("document.querySelectorAll('article').length === 1 && !asking")
        shown = page.query_selector("article pre")
        assert shown is not None
        assert shown.inner_text().split() == expected.split()
        assert expected
