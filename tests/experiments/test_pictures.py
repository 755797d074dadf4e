"""Pictures can be read: their ink, their legends and the numbers on their axes."""

from __future__ import annotations

import re

import pytest

from softtune.experiments.pictures import INK, LIGHT_INK, Point, curves, places, scatter


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg)


def contrast(one: str, other: str) -> float:
    """WCAG's, from 1 to 21."""

    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_ink_is_legible_in_print_and_on_dark_screens() -> None:
    svg = curves("", {"": [Point(1, 1), Point(2, 2)]}, across="x", up="y").svg
    assert "@media screen and (prefers-color-scheme: dark)" in svg
    assert INK in svg
    assert LIGHT_INK in svg
    assert contrast(INK, "#ffffff") > 4.5 < contrast(LIGHT_INK, "#14181c")


@pytest.mark.parametrize(("most", "shown"), [(5e-3, ["0.001", "0.003"]), (1.0, ["0.001", "0.01", "0.1", "1"])])
def test_numbers_across_are_few_and_plain(most: float, shown: list[str]) -> None:
    picture = scatter("", {"a": (1e-3, 0.25), "b": (most, 0.25)}, across="share", up="quality")
    assert texts(picture.svg.split("matplotlib.axis_")[1]) == [*shown, "share"]


def test_dollars_are_no_formula() -> None:
    assert ">$$<" in places("tokens", {"tokens": [("$$", 0.0, 0.0), ("$x_", 1.0, 1.0)]}, across="x", up="y").svg


def test_long_names_stand_below_the_axes() -> None:
    def plot(name: str) -> float:
        svg = curves("", {f"{name} {i}": [Point(1, i), Point(2, i)] for i in range(3)}, across="x", up="y").svg
        left, right = map(float, re.findall(r'id="patch_2">\s*<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+) ', svg)[0])
        return right - left

    assert plot("label the sentiment of each review") > plot("label the") + 50
