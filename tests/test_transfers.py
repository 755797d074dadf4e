"""How often softtune waits for a GPU or copies to it: a few times a call, however many layers the model has.

Counted on a device that stands in for a GPU (``tests/fake_gpu.py``), on which tensors of the CPU do not mix with its
own. So nothing, such as a mask, is made on the CPU and used on the device without a copy that is counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.transfers import ALONE, CASES, CONTROL, DEPTHS, STEPS

pytest.importorskip("torch.utils.backend_registration")
MOST = {"training": 32, "forward": 8, "first step": 8, "serving": 14}
"""Waits and copies of a call, beyond the base model's. A batch is packed for training, by its rows' lengths and common
beginnings; a server's step brings its tokens' ids and places."""
MOST_OF_A_STEP = 4
"""The same of one more token that ``generate`` writes."""
CHECKED = [(family, case) for family, cases in CASES.items() for case in cases if case not in (ALONE, CONTROL)]

Counts = dict[tuple[str, str, int], dict[str, Counter[str]]]


@pytest.fixture(scope="module")
def counts() -> Counts:
    """By family, case and depth: each action's waits and copies, by the kind and the line that asks for it."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.transfers"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: Counts = {}
    for line in map(json.loads, done.stdout.splitlines()):
        key = line["family"], line["case"], line["depth"]
        found.setdefault(key, {})[line["action"]] = Counter(" ".join(place) for place in line["places"])
    return found


@pytest.mark.parametrize(("family", "case"), CHECKED)
def test_no_layer_waits_for_the_device(counts: Counts, family: str, case: str) -> None:
    few, many = (counts[family, case, depth] for depth in DEPTHS)
    for action in few:
        assert few[action] == many[action], action


@pytest.mark.parametrize(("family", "case"), CHECKED)
def test_a_call_waits_a_few_times(counts: Counts, family: str, case: str) -> None:
    own, alone = counts[family, case, DEPTHS[0]], counts[family, ALONE, DEPTHS[0]]
    for action in own.keys() & MOST.keys():
        beyond = own[action].total() - alone.get(action, Counter()).total()
        assert beyond <= MOST[action], (action, own[action])
    if "all steps" in own:
        step, of_base = (by["all steps"].total() - by["first step"].total() for by in (own, alone))
        assert (step - of_base) / STEPS <= MOST_OF_A_STEP, own["all steps"] - own["first step"]


def test_a_layer_that_waits_is_seen(counts: Counts) -> None:
    few, many = (counts["llama", CONTROL, depth] for depth in DEPTHS)
    for action in few:
        assert many[action].total() - few[action].total() >= DEPTHS[1] - DEPTHS[0], action
