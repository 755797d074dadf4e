"""What softtune does with every architecture of the installed transformers: ``python -m tests.census docs/support.md``.

Each class of the auto mappings is built tiny and random (``tests/architectures.py``), and each method is put on it as a
user would, with the check of models that were not tested. Then all promises are checked, also those that a model's
first use does not wait for.

- *holds*: every promise holds.
- *refused*: it is said in one line that the model cannot take the method.
- *wrong*: anything else. There must be none.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from softtune import (
    BitFitConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PTuningV2Config,
    SofttuneError,
)
from softtune.compat import INSTALLED
from softtune.promises import PROMISES, Broken
from softtune.self_check import check
from tests.architectures import TASKS, architectures, build
from tests.matrix import CENSUS

METHODS: dict[str, Callable[..., PeftConfig]] = {
    "prefix": PrefixTuningConfig,
    "prompt": PromptTuningConfig,
    "P-tuning": PromptEncoderConfig,
    "P-tuning v2": PTuningV2Config,
    "BitFit": lambda **options: BitFitConfig(add_missing=True, **options),
}
COLUMNS = {"P-tuning": (1, 3)}
"""Where a template has virtual tokens among the three words of a text."""
HOLDS, REFUSED, WRONG, UNBUILT = "holds", "refused", "wrong", "unbuilt"
MARKS = {HOLDS: "✓", REFUSED: "\N{EN DASH}", WRONG: "✗"}


class Case(NamedTuple):
    """What came of a class and a method."""

    task: str
    model_type: str
    class_name: str
    method: str
    outcome: str
    why: str = ""


def examine(task: str, model_type: str, class_name: str) -> list[Case]:
    """What comes of a class with every method."""
    try:
        build(model_type, class_name)
    except Exception as error:
        return [Case(task, model_type, class_name, name, UNBUILT, _line(error)) for name in METHODS]
    return [
        Case(task, model_type, class_name, name, *outcome(build(model_type, class_name), task, name))
        for name in METHODS
    ]


def outcome(model: PreTrainedModel, task: str, method: str) -> tuple[str, str]:
    """Whether a method holds on a model, is refused or is wrong, and why."""
    config = METHODS[method](task_type=None if task == "MASKED_LM" else task)
    columns = COLUMNS.get(method)
    try:
        adapted = PeftModel(model, config)
        found = check(adapted.backbone, config, PeftModel.with_adapter, thorough=True, columns=columns)
    except SofttuneError as error:
        return REFUSED, _line(error)
    except Exception as error:
        return WRONG, _line(error)
    broken = {name: how for name, how in found.items() if isinstance(how, Broken)}
    if not broken:
        return HOLDS, ""
    # With the places of a template, which the check before the first use does not try.
    is_refused = columns is not None and all(PROMISES[name].is_quick for name in broken)
    name, how = next(iter(broken.items()))
    return WRONG, f"{name}: {how.how}" + (" (with a template)" if is_refused else "")


def census(classes: Iterable[tuple[str, str, str]], processes: int = 2) -> list[Case]:
    """What comes of each class; one process for each core."""
    with ProcessPoolExecutor(processes, initializer=_quiet) as pool:
        found = pool.map(examine, *zip(*classes, strict=True), chunksize=4)
        return [case for cases in found for case in cases]


def page(cases: Sequence[Case]) -> str:
    """The section of docs/support.md."""
    lines = [
        CENSUS,
        "",
        f"Written by `make census`: every class of the auto mappings of transformers {INSTALLED}, built tiny and "
        f"random, with torch {torch.__version__.partition('+')[0]}. **✓** every promise of `softtune check` holds, "
        "**\N{EN DASH}** the model is refused in one line, **✗** it is wrong. BitFit adds the biases that are "
        "missing, and P-tuning has its virtual tokens among the words, as a template does.",
        "",
        "| task | classes | built | " + " | ".join(METHODS) + " |",
        "| --- | --- | --- |" + " --- |" * len(METHODS),
    ]
    for task in TASKS:
        own = [case for case in cases if case.task == task]
        if own:
            lines.append(f"| {task} | {' | '.join(_counts(own))} |")
    lines += ["", "The numbers are how many classes hold, are refused and are wrong.", ""]
    for task in TASKS:
        own = [case for case in cases if case.task == task]
        if own:
            lines += [f"<details><summary>{task}</summary>", "", *_table(own), "", "</details>", ""]
    return "\n".join(lines)


def _counts(cases: Sequence[Case]) -> list[str]:
    names = {case.class_name for case in cases}
    built = {case.class_name for case in cases if case.outcome != UNBUILT}
    cells = [str(len(names)), str(len(built))]
    for method in METHODS:
        count = Counter(case.outcome for case in cases if case.method == method)
        cells.append(" / ".join(str(count[kind]) for kind in (HOLDS, REFUSED, WRONG)))
    return cells


def _table(cases: Sequence[Case]) -> list[str]:
    rows: dict[str, dict[str, str]] = {}
    for case in cases:
        rows.setdefault(case.class_name, {})[case.method] = MARKS.get(case.outcome, "not built")
    lines = ["| class | " + " | ".join(METHODS) + " |", "| --- |" + " --- |" * len(METHODS)]
    return [*lines, *(f"| {name} | {' | '.join(row[m] for m in METHODS)} |" for name, row in sorted(rows.items()))]


def write(cases: Sequence[Case], path: Path) -> None:
    """Put the section at the end of a page, in place of an earlier one."""
    before = path.read_text(encoding="utf-8").partition(CENSUS)[0].rstrip() if path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}\n\n{page(cases)}", encoding="utf-8")


def _line(error: Any) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def main(path: str) -> int:
    """Write the section, and tell what is wrong; 1 where anything is."""
    cases = census([*architectures()])
    for case in cases:
        if case.outcome in (WRONG, UNBUILT) and (case.outcome == WRONG or case.method == "prefix"):
            print(f"{case.outcome}: {case.class_name}, {case.method}: {case.why}")
    print(dict(Counter(case.outcome for case in cases)))
    write(cases, Path(path))
    return int(any(case.outcome == WRONG for case in cases))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
