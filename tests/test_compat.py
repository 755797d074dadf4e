"""What transformers may rename is spelled in one file, and a call goes by softtune's names whatever a version's are."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import DynamicCache

import softtune
from softtune import DataError, UnsupportedModelError, compat
from softtune.compat import ARGUMENTS, INSTALLED, OLDEST, Name
from tests.families import CAUSAL_LM, adapted, batch, texts

SOURCE = Path(softtune.__file__).parent
FILES = [path for path in SOURCE.rglob("*.py") if path.name != "compat.py"]
IDS = torch.tensor([[5, 6, 7, 8]])
OTHERS = {
    "self._get_connector_metadata",  # vLLM's, which is pinned
    "configs.PeftConfigMixin._get_peft_version",  # PEFT's
    "metric._extract_corpus_statistics",  # sacreBLEU's
    "metric._compute_score_from_stats",
    "function._schema",  # torch's
    "torch.autograd.Variable._execution_engine",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",  # those that torch's compiler calls
    "torch.ops.mkldnn._linear_pointwise",
    "torch.ops.mkldnn._reorder_linear_weight",
    "m._forward_hooks",
    "m._forward_pre_hooks",
    "tensor._version",
    "part._non_persistent_buffers_set",
    "state._is_root",  # FSDP2's
    "state._lazy_init",
    "state._state_ctx",
    "_state(unit)._fsdp_param_groups",
}
"""Private attributes of other libraries."""
WITH_PEFTS_NAMES = (
    *("compat.py", "kv_prefix.py", "peft_suite.py"),
    *("test_compat.py", "test_peft.py", "test_peft_names.py", "test_pretrained.py"),
)
"""Files that have arguments by the names that PEFT gives them."""
OWN_FIELDS = {"gradient_checkpointing"}
"""Fields of recipes that are called as PEFT's users call them."""


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in FILES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_modules_of_transformers_are_named_in_one_file() -> None:
    """Public names come from the package itself; a module may move."""
    found = [
        f"{path.name}: {node.module}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.")
    ]
    assert not found


def test_private_attributes_are_softtunes_own() -> None:
    names = [
        re.escape(name)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in defined(node)
        if name.startswith("_")
    ]
    own = re.compile(rf"\b({'|'.join(names)})$")
    strays = {
        text
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
        for text in (ast.unparse(node),)
        if not own.search(text)
    }
    assert strays <= OTHERS, strays - OTHERS


def defined(node: ast.AST) -> list[str]:
    """The names that a piece of code defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr] if ast.unparse(node.value) in ("self", "own") else []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize("folder", [SOURCE, Path(__file__).parent], ids=["src", "tests"])
def test_what_was_renamed_is_spelled_in_one_file(folder: Path) -> None:
    renamed = {s.name for spellings in ARGUMENTS.values() for s in spellings} - {*ARGUMENTS, "state"} - OWN_FIELDS
    private = {"_gradient_checkpointing_func", "_can_checkpoint_with_cache", "gradient_checkpointing_enable"}
    pattern = re.compile("(?<!from_)(?:" + "|".join({*renamed, *private}) + ")")  # from_ begins PEFT's functions
    found = [
        f"{path.name}:{number}: {match.group()}"
        for path in folder.rglob("*.py")
        if path.name not in WITH_PEFTS_NAMES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if (match := pattern.search(line))
    ]
    assert not found


def test_these_tests_can_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stray = tmp_path / "stray.py"
    lines = [
        "from transformers.cache_utils import DynamicLayer",
        "model._attn_implementation",
        "past_key_values_length",
    ]
    stray.write_text("\n".join(lines))
    monkeypatch.setattr(sys.modules[__name__], "FILES", [stray])
    for test in (test_modules_of_transformers_are_named_in_one_file, test_private_attributes_are_softtunes_own):
        with pytest.raises(AssertionError):
            test()
    with pytest.raises(AssertionError):
        test_what_was_renamed_is_spelled_in_one_file(tmp_path)


def test_the_oldest_version_is_that_of_the_package() -> None:
    text = (SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    allowed = SpecifierSet(re.search(r'"transformers(>=[^"]*)"', text).group(1))
    assert OLDEST in allowed
    major, minor = Version(OLDEST).release[:2]
    assert f"{major}.{minor - 1}" not in allowed


def test_a_version_that_is_too_old_is_one_line() -> None:
    old = "import importlib.metadata as m; own = m.version; "
    old += "m.version = lambda name: '4.57.1' if name == 'transformers' else own(name); "
    needs = f"softtune needs transformers {OLDEST} or newer, and 4.57.1 is installed: pip install -U transformers"
    done = subprocess.run([sys.executable, "-c", f"{old}import softtune"], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == f"ImportError: {needs}"
    command = f"{old}from softtune_command import main; main(['check', 'minilm'])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"softtune: {needs}\n")


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_under_either_name(name: str) -> None:
    model, cache = adapted("llama", CAUSAL_LM, "prefix"), DynamicCache()
    with torch.no_grad():
        expected = model(IDS).logits
        model(IDS[:, :3], **{name: cache})
        found = model(IDS[:, 3:], **{name: cache}).logits
    torch.testing.assert_close(found, expected[:, 3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_a_cache_under_both_names(how: str) -> None:
    model = adapted("llama", CAUSAL_LM, "prefix")
    with pytest.raises(DataError, match=r"cache under two names, .*: give one"):
        getattr(model, how)(IDS, cache=DynamicCache(), past_key_values=DynamicCache())


def test_one_of_two_names_is_none() -> None:
    model, cache = adapted("llama", CAUSAL_LM, "prefix"), DynamicCache()
    model(IDS, cache=None, past_key_values=cache)
    assert cache.get_seq_length() == 4


def test_a_version_that_calls_it_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (Name("memory", since="99"), Name("cache", since="5.24"), Name("past_key_values", until="5.24"))
    monkeypatch.setitem(ARGUMENTS, "cache", names)
    assert compat.spelled("cache") == ("cache" if Version("5.24") <= INSTALLED else "past_key_values")
    assert compat.spelled("cache", {"memory", "cache"}) == "memory"
    assert compat.spelled("labels", {"labels"}) == "labels"


def test_a_stack_that_reads_another_name_is_refused() -> None:
    """A keyword argument that nobody reads would lose the prompt without a word."""
    model = adapted("gpt2", CAUSAL_LM, "prompt_suffix")
    stack = model.backbone.stacks[0]
    parameters = [p for n, p in stack.signature.parameters.items() if n != "inputs_embeds"]
    stack.signature = stack.signature.replace(parameters=parameters)
    with pytest.raises(UnsupportedModelError, match=rf"of transformers {INSTALLED} takes no inputs_embeds"):
        model(IDS)


def test_a_trainer_that_calls_another_method_is_refused() -> None:
    hooks = dict.fromkeys(("save_adapter", "load_adapter", "load_best"))
    with pytest.raises(UnsupportedModelError, match="has no _save"):
        compat.trainer_hooks(type("Ours", (object,), hooks))


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What transformers logs in a test; Python's warnings are errors in all of them."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    type(transformers.logging.get_logger("transformers")).warning_once.cache_clear()
    transformers.logging.add_handler(handler)
    yield found
    transformers.logging.remove_handler(handler)
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba"])
def test_no_warning_of_softtunes_own(family: str, logged: list[str]) -> None:
    model = adapted(family, CAUSAL_LM, "prompt")
    inputs = batch(texts(family, CAUSAL_LM), "left")
    model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=1)
    compat.enable_checkpointing(model, use_reentrant=False)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [line for line in logged if "deprecated" in line] == []


def test_a_warning_would_be_seen(logged: list[str]) -> None:
    logger = transformers.logging.get_logger("transformers.models.llama.modeling_llama")
    for _ in range(2):
        logger.warning_once("`past` is deprecated")
    assert logged == ["`past` is deprecated"]


def test_a_cache_is_found_in_outputs_and_put_back() -> None:
    output = adapted("llama", CAUSAL_LM, "prefix")(IDS, use_cache=True)
    cache = compat.cache_of(output)
    assert isinstance(cache, DynamicCache)
    other = DynamicCache()
    compat.set_cache(output, other)
    assert compat.cache_of(output) is other
    assert compat.cache_of({"past_key_values": None, "cache": cache}) is cache
    assert compat.cache_of({"state": [1]}) == [1]
    assert compat.cache_of({}) is None
