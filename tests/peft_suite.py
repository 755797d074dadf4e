"""PEFT's own tests of its prompt methods, run with softtune in PEFT's place: how complete "change one import" is.

A pytest plugin that ``make peft-suite`` runs on the tests of PEFT's source distribution, unpacked as the package
``peft_tests``. What these tests import from ``peft`` is softtune's where ``softtune.__all__`` has the name, and PEFT's
elsewhere. No other module's imports change. ``--with-peft`` leaves PEFT's in all places.

A test is selected when it builds a config of prompt tuning, prefix tuning or P-tuning and none of another method. The
config classes that a test builds are those among its parameters; where there are none, those that its code names, or
the code of the suite's functions that it calls. Tests that PEFT's suite skips are not counted.
``tests/peft_differences.py`` lists the tests that are left out, and those that are expected to fail.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from tests.peft_differences import EXPECTED, LEFT_OUT

SUITE = "peft_tests"
METHODS = {"PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "CartridgeConfig"}
BUILD = Path(__file__).parent.parent / "build" / "peft-suite"
CACHE = BUILD / f"hub-{version('transformers')}"
DEPRECATED = (".gradient_checkpointing_enable. is deprecated", ".is_gradient_checkpointing. is deprecated")
"""Warnings of names that the suite calls and transformers 5.23 has renamed; its settings turn them into errors."""
os.environ |= {
    "HF_HUB_CACHE": str(CACHE),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "XDG_CACHE_HOME": str(BUILD / "cache"),
}

# Imports


class Substitute(ModuleType):
    """A module of PEFT, with softtune's objects in place of PEFT's of the same name."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        import softtune

        return getattr(softtune if name in softtune.__all__ else self._module, name)


def substitute_imports() -> None:
    """Give softtune's objects to the suite's modules, and to no others, where they import from ``peft``."""
    load = builtins.__import__

    def import_for(
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: tuple[str, ...] | None = (),
        level: int = 0,
    ) -> ModuleType:
        module = load(name, globals, locals, fromlist or (), level)
        asked_by_suite = globals is not None and globals.get("__package__") == SUITE
        is_peft = level == 0 and name.partition(".")[0] == "peft"
        return Substitute(module) if asked_by_suite and is_peft else module

    builtins.__import__ = import_for


# Selection


def configs_of(item: pytest.Function) -> set[str]:
    """Names of PEFT's config classes among a test's parameters or, where none is, in its code."""
    import peft

    known = {name for name in dir(peft) if name.endswith("Config")} - {"PeftConfig", "PromptLearningConfig"}
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    given = {value.__name__ if isinstance(value, type) else type(value).__name__ for value in values}
    return given & known or set(names_in(item.function, item)) & known


def names_in(function: FunctionType, item: pytest.Function, seen: set[FunctionType] | None = None) -> Iterator[str]:
    """The names that a function of the suite reads, and those that functions of the suite read that it names."""
    seen = set() if seen is None else seen
    seen.add(function)
    for name in names_of(function.__code__):
        yield name
        called = getattr(item.cls, name, None) or getattr(item.module, name, None)
        if isinstance(called, FunctionType) and called.__module__.startswith(SUITE) and called not in seen:
            yield from names_in(called, item, seen)


def names_of(code: CodeType) -> Iterator[str]:
    """The names that code and the functions in it read."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_of(inner)


def reason(table: Mapping[str, str], test: str) -> str | None:
    """The reason that a table of ``tests/peft_differences.py`` has for a test; None where it has none."""
    return next((why for pattern, why in table.items() if re.search(pattern, test)), None)


# Outcomes


class Suite:
    """Selects the tests, and records and reports their outcomes."""

    def __init__(self, with_peft: bool) -> None:
        self.with_peft = with_peft
        self.began = time.monotonic()
        self.outcomes: dict[str, str] = {}
        """By a test's id: passed, failed, expected (it failed, as it should) or skipped."""
        self.errors: dict[str, str] = {}
        """By the id of a test that did not pass, the first line of its error or the reason why it was skipped."""

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Ignore files that name none of the methods; importing some of them takes packages that are not installed."""
        if collection_path.suffix != ".py" or collection_path.name == "__init__.py":
            return None
        named = set(re.findall(r"\w+", collection_path.read_text(encoding="utf-8"))) & METHODS
        return None if named and not reason(LEFT_OUT, collection_path.name) else True

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        counted, others = [], []
        for item in items:
            configs = configs_of(item) if isinstance(item, pytest.Function) else set()
            is_counted = configs and configs <= METHODS and not reason(LEFT_OUT, item.nodeid)
            (counted if is_counted else others).append(item)
        items[:] = counted
        config.hook.pytest_deselected(items=others)
        for item in () if self.with_peft else items:
            if why := reason(EXPECTED, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=why, strict=True))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome = "expected" if hasattr(report, "wasxfail") else report.outcome
        self.outcomes[report.nodeid] = outcome
        if outcome != "passed":
            self.errors[report.nodeid] = first_line(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput") or session.config.option.collectonly:
            return
        path = BUILD / f"{'peft' if self.with_peft else 'softtune'}-{version('transformers')}.json"
        path.write_text(json.dumps(self.record(), indent=1) + "\n", encoding="utf-8")

    def record(self) -> dict[str, Any]:
        return {
            "versions": {name: version(name) for name in ("peft", "transformers", "torch")},
            "with_peft": self.with_peft,
            "seconds": round(time.monotonic() - self.began),
            "counts": dict(Counter(self.outcomes.values())),
            "tests": {
                test: {"outcome": outcome, "error": self.errors.get(test)}
                for test, outcome in sorted(self.outcomes.items())
            },
        }

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.outcomes:
            return
        line = terminalreporter.write_line
        counts = Counter(self.outcomes.values())
        counted = counts.total() - counts["skipped"]
        whose = "PEFT" if self.with_peft else "softtune"
        terminalreporter.section(f"PEFT's tests with {whose} and transformers {version('transformers')}")
        line(f"{counts['passed']} of {counted} passed, {counts['failed']} failed, {counts['expected']} as expected")
        failed = [test for test, outcome in self.outcomes.items() if outcome == "failed"]
        for title, group in (("by test", function_of), ("by error", self.errors.__getitem__)):
            if failed:
                line(f"\nFailures {title}:")
            for name, number in Counter(map(group, failed)).most_common():
                line(f"{number:5}  {name}")


def function_of(test: str) -> str:
    """A test's id without its parameters."""
    return test.partition("[")[0].removeprefix(f"{SUITE}/")


def first_line(report: pytest.TestReport) -> str:
    """The first line of a test's error, of a bare assert with its place; or the reason why the test was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    message = (crash.message if crash else str(report.longrepr)).partition("\n")[0][:160]
    is_bare = crash is not None and re.match(r"(AssertionError: )?assert", message)
    return f"{message} ({Path(crash.path).name}:{crash.lineno})" if is_bare else message


# Hooks


class Everything(defaultdict[str, int]):
    """Stands in for the suite's record of the models that it has downloaded: it contains every name, so none is."""

    def __contains__(self, key: object) -> bool:
        return True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--with-peft", action="store_true", help="leave PEFT in its place")


def pytest_configure(config: pytest.Config) -> None:
    with_peft = config.getoption("--with-peft")
    if not hasattr(config, "workerinput"):
        from tests.peft_hub import fill

        fill(CACHE)
    if not with_peft:
        substitute_imports()
    config.pluginmanager.register(Suite(with_peft), "softtune-peft-suite")
    for warning in DEPRECATED:
        config.addinivalue_line("filterwarnings", f"ignore:{warning}:FutureWarning")
    pytest.register_assert_rewrite(SUITE)
    sys.path.insert(0, str(config.rootpath))


def pytest_sessionstart() -> None:
    """Replace what reaches the hub in the module that the suite's modules share, before they import it."""
    from tests.peft_hub import load_dataset

    shared: Any = importlib.import_module(f"{SUITE}.testing_utils")
    shared.load_dataset = load_dataset
    shared._HUB_MODEL_ACCESSES = Everything(int)
