"""The support matrix: which promise was tested for which family and method, and held.

A pytest plugin: ``pytest -p tests.matrix --matrix docs/support.md --tested src/softtune/tested.json``. A test says by
``pytest.mark.promise(2, 6)`` what it tests, and by its parameters ``family`` and ``method`` of what; the mark's
``families`` and ``methods`` (names, or a function from family to methods) say what a test runs over alone. A promise
is claimed where tests of it ran, and every one that was collected ran and passed. The second file has the classes of
models that were tested with each version of transformers, which softtune does not check by itself.

Knows nothing of what the tests do.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

PROMISES = {
    1: "Frozen: training changes the adapter alone, and no tensor of the base model.",
    2: "Invariance: a row's outputs are the same alone, padded on either side, in a batch and beside rows of other "
    "adapters; cached generation is the uncached.",
    3: "Alignment: logits, hidden states and loss line up with the caller's tokens and labels.",
    4: "Lossless: what is saved and loaded has the same outputs to the last bit, and its training goes on as if never "
    "interrupted; folders go to PEFT and come from it.",
    5: "Baked equals trained: the form for inference, without MLP or LSTM, computes the same.",
    6: "Parity: outputs and gradients are those of slow, obvious implementations, and PEFT's where PEFT is right.",
    7: "Refuse: an adapter of another base model, or a text beyond the model's positions, is an error.",
    8: "Evaluation leaves no trace: training after an evaluation has the same gradients.",
}
COLUMNS = {
    "prompt": ("prompt",),
    "suffix": ("prompt_suffix",),
    "P-tuning": ("p_tuning_mlp", "p_tuning_lstm"),
    "prefix": ("prefix",),
    "projection": ("prefix_projection",),
    "infix": ("infix",),
    "embedding only": ("embedding_only",),
    "chosen layers": ("prefix_last",),
    "P-tuning v2": ("p_tuning_v2",),
    "BitFit": ("bitfit",),
    "BitFit, added": ("bitfit_added",),
    "BEFT": ("beft",),
    "IA3": ("ia3",),
    "cartridge": ("cartridge",),
    "LLaMA-Adapter": ("adaption_prompt",),
    "memory": ("memory",),
    "combined": ("combined",),
    "CPT": ("cpt",),
    "MPT": ("multitask",),
}
REFUSED = "\N{EN DASH}"
CENSUS = "## Every architecture"
"""The heading of what ``make census`` has written, which stays."""
HEAD = """# What is tested

Written by `make matrix` from a run of all contract tests with transformers {transformers}, torch {torch} and PEFT
{peft}. The rows are the families of `tests/families.py`: tiny random models, each as a language model (causal or
sequence to sequence) and as a classifier of texts, where the table of families names these tasks. Encoders tag tokens
and find spans too.

- **✓** every promise was tested, and all of its tests passed.
- **digits** these promises were tested and held, the others were not tested, or not in full.
- **✗ and digits** tests of these promises failed.
- **{refused}** the family cannot take the method, and refuses it with an error that says what to do; that is tested.
- **?** nothing was tested.

The promises:

{promises}

The methods: prompt tuning with its virtual tokens in front of the text or as a suffix; P-tuning with an MLP and with an
LSTM; prefix tuning plain, with its MLP (projection), as an infix, with embeddings only and in chosen layers; P-tuning
v2; BitFit on the model's own biases, and with biases added where there are none; BEFT; IA3; cartridges; CPT, of
causal language models; MPT of one task; LLaMA-Adapter
with a gate for each head; PrefixMemory-Tuning; a prefix, virtual tokens, biases, factors and a memory combined. Batches
of several adapters (promise 2) mix prompt, suffix, prefix, infix, chosen layers, BitFit with added biases, IA3, memory
and combined adapters.
"""

Cell = tuple[str, str, int]
"""Family, method and promise."""


class Matrix:
    """Who tests what, and with which outcome."""

    def __init__(self, path: Path, tested: Path | None = None) -> None:
        self.path = path
        self.tested = tested
        self.tests: dict[Cell, list[str]] = defaultdict(list)
        """Ids of the tests that were collected, before any were deselected."""
        self.outcomes: dict[str, str] = {}
        """By a test's id: passed, failed or skipped; nothing where it did not run."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for cell in cells_of(item):
                self.tests[cell].append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        expected_failure = report.skipped and hasattr(report, "wasxfail")
        if report.failed or expected_failure:
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped or report.when == "call":
            self.outcomes.setdefault(report.nodeid, report.outcome)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Hear from a process of pytest-xdist what it has collected, as all of them have."""
        for name, cells in node.workeroutput.get("matrix", {}).items():
            for cell in cells:
                self.tests[tuple(cell)].append(name)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(session.config, "workeroutput"):
            collected: dict[str, list[Cell]] = defaultdict(list)
            for cell, names in self.tests.items():
                for name in names:
                    collected[name].append(cell)
            session.config.workeroutput["matrix"] = dict(collected)
        elif exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            _, heading, census = before.partition(CENSUS)
            kept = f"\n{heading}{census}" if heading else ""
            self.path.write_text(self.page() + kept, encoding="utf-8")
            if self.tested is not None:
                self.note_classes(self.tested)

    def note_classes(self, path: Path) -> None:
        """Put the classes of the families of which tests held and none failed into a file, by transformers' version."""
        from softtune.compat import class_name
        from tests.families import AUTO, FAMILIES, family_config

        outcomes: dict[str, set[str | None]] = defaultdict(set)
        for cell in self.tests:
            outcomes[cell[0]].add(self.outcome(cell))
        names = {
            class_name(AUTO[task]._model_mapping[type(config)], config)
            for family, row in FAMILIES.items()
            for config in [family_config(family)]
            for task in row.tasks
            if "held" in outcomes[family] and "failed" not in outcomes[family]
        }
        versions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        versions[version("transformers")] = sorted(names)
        ordered = {number: versions[number] for number in sorted(versions, key=Version)}
        path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")

    def outcome(self, cell: Cell) -> str | None:
        """``held`` or ``failed``; None where a test of it did not run, or there is none."""
        outcomes = {self.outcomes.get(test) for test in self.tests.get(cell, ())}
        if "failed" in outcomes:
            return "failed"
        return "held" if outcomes == {"passed"} else None

    def mark(self, family: str, methods: tuple[str, ...]) -> str:
        """What the table says of a family and methods that share a column."""
        from tests.families import takes

        taken = [m for m in methods if takes(family, m)]
        if not taken:
            states = {self.outcome((family, m, 7)) for m in methods}
            return "✗ 7" if "failed" in states else REFUSED if states == {"held"} else "?"
        found = {n: {self.outcome((family, m, n)) for m in taken} for n in PROMISES}
        if failed := [str(n) for n, states in found.items() if "failed" in states]:
            return f"✗ {' '.join(failed)}"
        held = [str(n) for n, states in found.items() if states == {"held"}]
        return "✓" if len(held) == len(PROMISES) else " ".join(held) or "?"

    def page(self) -> str:
        from tests.families import FAMILIES

        versions = {name: version(name).partition("+")[0] for name in ("transformers", "torch", "peft")}
        promises = "\n".join(f"{n}. {text}" for n, text in PROMISES.items())
        groups: dict[str, list[str]] = {}
        for family in FAMILIES:
            groups.setdefault(group(family), []).append(family)
        tables = []
        for title, families in groups.items():
            rows = [[f"`{f}`", *(self.mark(f, methods) for methods in COLUMNS.values())] for f in families]
            lines = [["family", *COLUMNS], ["---"] * (1 + len(COLUMNS)), *rows]
            tables.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        return "\n".join([HEAD.format(promises=promises, refused=REFUSED, **versions), *tables])


def cells_of(item: pytest.Item) -> set[Cell]:
    """What a test tests."""
    from tests.families import FAMILIES, METHODS

    values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    own = {"families": (values.get("family"),), "methods": (values.get("method"),)}
    found: set[tuple[Any, Any, int]] = set()
    for mark in item.iter_markers("promise"):
        if not mark.args or not set(mark.args) <= set(PROMISES) or not set(mark.kwargs) <= set(own):
            raise pytest.UsageError(f"{item.nodeid}: promise{mark.args}{mark.kwargs or ''} names no promise")
        named = {**own, **mark.kwargs}
        for family in named["families"]:
            methods = named["methods"](family) if callable(named["methods"]) else named["methods"]
            found |= {(family, m, n) for m in methods for n in mark.args}
    return {(f, m, n) for f, m, n in found if f in FAMILIES and m in METHODS}


def group(family: str) -> str:
    from tests.families import FAMILIES, SEQ_2_SEQ_LM, is_decoder_only

    row = FAMILIES[family]
    if SEQ_2_SEQ_LM in row.tasks:
        return "Encoder-decoders"
    if not is_decoder_only(family):
        return "Encoders"
    hybrid = len(row.layers()) < row.sizes.get("num_hidden_layers", 0)
    return "Hybrid and state-space decoders" if hybrid else "Decoders"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, metavar="FILE", help="write the support matrix to this file")
    parser.addoption("--tested", type=Path, metavar="FILE", help="note in this file which classes were tested")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--matrix"):
        folder, tested = Path(config.invocation_params.dir), config.getoption("--tested")
        config.pluginmanager.register(Matrix(folder / path, tested and folder / tested), "softtune-matrix")
