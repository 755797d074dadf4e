"""A page as HTML: texts are no markup wherever they stand, and pictures are embedded as they are."""

from __future__ import annotations

from html.parser import HTMLParser

from softtune.experiments.page import Page, Table, as_html
from softtune.experiments.pictures import Bar, Picture, bars

BAD = "<script>alert('a' & \"b\")</script>"


class Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def parsed(page: Page) -> Parser:
    parser = Parser()
    parser.feed(as_html(page))
    parser.close()
    return parser


def test_no_text_is_markup() -> None:
    picture = Picture(BAD, "<svg></svg>", BAD)
    table = Table(head=["", BAD], lines=[[BAD, "1"]])
    found = parsed(Page(title=BAD, texts=[BAD], tables=[table], notes=[BAD], pictures=[picture]))
    assert "script" not in found.tags
    assert found.texts.count(BAD) == 8  # the title twice


def test_names_in_pictures_are_no_markup() -> None:
    found = parsed(Page(title="names", pictures=[bars("Bars", [Bar("<script>", 1.0)], unit="<script>")]))
    assert "script" not in found.tags
    assert found.texts.count("<script>") == 2


def test_pictures_are_embedded_as_they_are_and_have_a_caption_only_with_a_text() -> None:
    one, other = (
        Picture("One", '<svg id="one"><text>a &amp; b</text></svg>\n'),
        Picture("Other", "<svg></svg>", "Less."),
    )
    text = as_html(Page(title="two", pictures=[one, other]))
    assert one.svg in text
    assert text.count("<figcaption>") == 1
    assert text.index(other.svg) < text.index("<figcaption>Less.</figcaption>")
