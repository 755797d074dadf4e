"""The support matrix claims what was tested and held, and nothing else."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from tests.families import FAMILIES, KINDS, METHODS
from tests.matrix import CENSUS, COLUMNS, REFUSED

pytest_plugins = ["pytester"]
ALL = "1, 2, 3, 4, 5, 6, 7, 8"


def run(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    """Run a suite of this source, without the plugins that are slow to begin."""
    pytester.makepyfile(f"import pytest\n{source}")
    pytester.makeini("[pytest]\nmarkers =\n    promise\n    slow\n")
    plugins = ("-p", "tests.matrix", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    return pytester.runpytest_inprocess(*plugins, "--matrix", "folder/support.md", *options)


def table(pytester: pytest.Pytester, source: str, *options: str) -> dict[tuple[str, str], str]:
    """The cells that a suite of this source makes, by family and column."""
    run(pytester, source, *options)
    lines = (pytester.path / "folder" / "support.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    return {(row[0].strip("`"), c): cell for row in rows for c, cell in zip(COLUMNS, row[1:], strict=True)}


def suite(promises: str = ALL, body: str = "pass", method: str = "prefix", family: str = "gpt2", mark: str = "") -> str:
    return f"""
@pytest.mark.promise({promises})
@pytest.mark.parametrize(("family", "method"), [("{family}", "{method}")])
{mark}
def test_{method}_{abs(hash((promises, body, family, mark)))}(family, method):
    {body}
"""


def test_every_family_and_method_has_a_cell(pytester: pytest.Pytester) -> None:
    cells = table(pytester, "def test_nothing(): pass")
    assert {family for family, _ in cells} == set(FAMILIES)
    assert sorted(m for methods in COLUMNS.values() for m in methods) == sorted(METHODS)
    assert set(cells.values()) == {"?"}


def test_what_was_tested_is_claimed_for_that_family_and_method_alone(pytester: pytest.Pytester) -> None:
    cells = table(pytester, suite())
    assert cells.pop(("gpt2", "prefix")) == "✓"
    assert set(cells.values()) == {"?"}


def test_promises_without_a_test_are_not_claimed(pytester: pytest.Pytester) -> None:
    assert table(pytester, suite("1") + suite("4, 6"))["gpt2", "prefix"] == "1 4 6"


@pytest.mark.parametrize("body", ["assert False", "raise ValueError", "pytest.fail()"])
def test_a_failing_test_turns_the_cell(pytester: pytest.Pytester, body: str) -> None:
    assert table(pytester, suite() + suite("2, 3", body))["gpt2", "prefix"] == "✗ 2 3"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failing_fixture_turns_the_cell(pytester: pytest.Pytester, when: str) -> None:
    fixture = "@pytest.fixture\ndef broken():\n    " + (
        "raise OSError\n" if when == "before" else "yield\n    raise OSError\n"
    )
    cells = table(pytester, fixture + suite() + suite("5", mark='@pytest.mark.usefixtures("broken")'))
    assert cells["gpt2", "prefix"] == "✗ 5"


@pytest.mark.parametrize(
    ("body", "mark", "expected"),
    [
        ("pytest.skip('not here')", "", "1 2 3 4 5 6 7"),
        ("pass", "@pytest.mark.skip", "1 2 3 4 5 6 7"),
        ("pass", "@pytest.mark.slow", "1 2 3 4 5 6 7"),
        ("assert False", "@pytest.mark.xfail", "✗ 8"),
    ],
)
def test_tests_that_did_not_run_or_may_fail(pytester: pytest.Pytester, body: str, mark: str, expected: str) -> None:
    cells = table(pytester, suite() + suite("8", body, mark=mark), "-m", "not slow")
    assert cells["gpt2", "prefix"] == expected


def test_a_column_of_two_methods_claims_what_holds_for_both(pytester: pytest.Pytester) -> None:
    cells = table(pytester, suite(method="p_tuning_mlp") + suite("1, 2", method="p_tuning_lstm"))
    assert cells["gpt2", "P-tuning"] == "1 2"


@pytest.mark.parametrize(("body", "expected"), [("pass", REFUSED), ("assert False", "✗ 7"), ("pytest.skip()", "?")])
def test_a_refusal_that_was_tested(pytester: pytest.Pytester, body: str, expected: str) -> None:
    cells = table(pytester, suite("7", body, method="infix", family="bert") + suite("2", method="infix", family="t5"))
    assert cells["bert", "infix"] == expected
    assert cells["t5", "infix"] == "?"


def test_a_mark_names_what_a_test_runs_over_by_itself(pytester: pytest.Pytester) -> None:
    source = f"""
pytestmark = pytest.mark.promise(3)

@pytest.mark.promise(2, methods={KINDS!r})
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_rows(family): pass

@pytest.mark.promise(4, methods=lambda family: ("prefix",) if family == "gpt2" else ())
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_chosen_rows(family): pass

def test_of_no_family(): assert False
"""
    cells = table(pytester, source)
    assert cells.pop(("gpt2", "prefix")) == "4"
    kinds = {column for column, methods in COLUMNS.items() if methods[0] in KINDS}
    assert {place for place, cell in cells.items() if cell != "?"} == {
        *(("llama", kind) for kind in kinds),
        *(("mamba", kind) for kind in kinds - {"prefix", "infix", "chosen layers", "IA3", "memory", "combined"}),
    }
    assert {cells["llama", kind] for kind in kinds} == {"2"}


@pytest.mark.parametrize("mark", ["0", "9", "", "'2'", "2, family='gpt2'"])
def test_a_mark_without_a_promise_is_an_error(pytester: pytest.Pytester, mark: str) -> None:
    assert run(pytester, suite(mark)).ret == pytest.ExitCode.USAGE_ERROR
    assert not (pytester.path / "folder").exists()


def test_what_the_census_wrote_stays(pytester: pytest.Pytester) -> None:
    run(pytester, suite())
    path = pytester.path / "folder" / "support.md"
    alone = path.read_text(encoding="utf-8")
    section = f"{CENSUS}\n\nA table.\n"
    path.write_text(f"{alone.rstrip()}\n\n{section}", encoding="utf-8")  # as tests/census.py writes it
    before = path.read_text(encoding="utf-8")
    run(pytester, suite())
    assert path.read_text(encoding="utf-8") == before == f"{alone}\n{section}"


@pytest.mark.parametrize(("body", "is_tested"), [("pass", True), ("assert False", False)])
def test_classes_that_held_are_noted_beside_other_versions(
    body: str, is_tested: bool, pytester: pytest.Pytester
) -> None:
    path = pytester.path / "tested.json"
    path.write_text('{"9.0.0": ["Other"], "5.2.0": []}')
    run(pytester, suite(body=body), "--tested", "tested.json")
    found = json.loads(path.read_text())
    assert list(found) == ["5.2.0", version("transformers"), "9.0.0"]
    assert found["9.0.0"] == ["Other"]
    expected = ["GPT2ForSequenceClassification", "GPT2LMHeadModel"] if is_tested else []
    assert found[version("transformers")] == expected
