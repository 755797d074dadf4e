"""Checks that two commits give bit-identical results: forward passes, gradients, generated texts, folders of trained
adapters and exported prompts, and a server's responses.

``python benchmarks/identical.py COMMIT`` compares the working tree with a commit in five minutes. It only uses the
public API, so that internal names can change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import socket
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES: dict[str, dict[str, Any]] = {
    "prefix": {"method": "PREFIX_TUNING", "options": {"num_virtual_tokens": 3, "prefix_projection": True}},
    "words": {"method": "PROMPT_TUNING", "options": {"num_virtual_tokens": 3}, "ensemble": 2},
    "trunk": {"method": "PREFIX_TUNING", "options": {"num_virtual_tokens": 2, "layers": [1]}, "trunk_cache": 8},
    "biases": {"method": "BITFIT", "options": {"add_missing": True}},
    "classifier": {"model": "bert", "task": "SEQ_CLS", "method": "P_TUNING_V2", "options": {"num_virtual_tokens": 3}},
    "written": {"model": "t5", "task": "SEQ_2_SEQ_LM", "method": "PREFIX_TUNING", "options": {"num_virtual_tokens": 3}},
}
TIMES = ("seconds", "tokens_per_second", "memory", "created")
"""Parts of JSON keys whose values differ between any two runs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", help="what the working tree is compared with")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record:
        args.record.write_text(json.dumps({**calls(), **runs()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "other")
        subprocess.run(["git", "worktree", "add", "--detach", other, args.commit], cwd=ROOT, check=True)
        try:
            found = [recorded(tree, Path(folder, f"{n}.json")) for n, tree in enumerate((other, ROOT))]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    names = sorted({*found[0], *found[1]})
    differ = [name for name in names if found[0].get(name) != found[1].get(name)]
    print("\n".join([f"{len(names)} things recorded, {len(differ)} differ from {args.commit}", *differ]))
    sys.exit(bool(differ))


def recorded(tree: Path, file: Path) -> dict[str, str]:
    """The digests recorded with the package of a tree."""
    paths = os.pathsep.join(map(str, (tree / "src", ROOT)))
    environment = {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(file.parent / "cache"),
    }
    subprocess.run([sys.executable, __file__, "--record", file], env={**os.environ, **environment}, check=True)
    found: dict[str, str] = json.loads(file.read_text())
    return found


def digest(*things: Any) -> str:
    """Digest of the bytes of tensors, or of things as JSON."""
    import torch

    total = hashlib.sha256()
    for thing in things:
        is_tensor = isinstance(thing, torch.Tensor)
        plain = (
            thing.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            if is_tensor
            else json.dumps(thing).encode()
        )
        total.update(plain)
    return total.hexdigest()[:16]


def of_folder(folder: Path) -> dict[str, str]:
    """Digests of a folder's files, without times and without the folder's path."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        content = file.read_bytes()
        if file.suffix == ".json":
            content = json.dumps(without_times(json.loads(content))).encode()
        if file.suffix not in (".html", ".png", ".md", ".svg"):
            found[name] = digest(list(content.replace(str(folder).encode(), b"")))
    return found


def without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: without_times(v) for k, v in content.items() if not any(part in k for part in TIMES)}
    return [without_times(x) for x in content] if isinstance(content, list) else content


def calls() -> dict[str, str]:
    """Digests of forward passes, gradients and texts of tiny models, with each kind of adapter and all mixed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    import softtune

    tokens = {"num_virtual_tokens": 3}
    methods = {
        "prefix": lambda task: softtune.PrefixTuningConfig(task_type=task, **tokens),
        "projection": lambda task: softtune.PrefixTuningConfig(task_type=task, prefix_projection=True, **tokens),
        "prompt": lambda task: softtune.PromptTuningConfig(task_type=task, **tokens),
        "p_tuning": lambda task: softtune.PromptEncoderConfig(task_type=task, encoder_hidden_size=8, **tokens),
        "lstm": lambda task: softtune.PromptEncoderConfig(
            task_type=task, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **tokens
        ),
        "deep": lambda task: softtune.PTuningV2Config(task_type=task, **tokens),
        "biases": lambda task: softtune.BitFitConfig(task_type=task, add_missing=True),
    }
    heads = {
        "CAUSAL_LM": AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
        "SEQ_CLS": AutoModelForSequenceClassification,
    }
    ids = torch.tensor([[5, 6, 7, 8, 9], [6, 7, 8, 0, 0], [9, 9, 5, 0, 0]])
    left = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 6, 7, 8], [0, 0, 9, 9, 5]])
    found = {}
    for family, (task, config) in architectures().items():
        names = [name for name in methods if takes(family, name)]
        torch.manual_seed(0)
        model = softtune.PeftModel(heads[task].from_config(config))
        for number, name in enumerate(names):
            torch.manual_seed(number)
            model.add_adapter(name, methods[name](task))
        model.train()
        for name in [*names, "all"]:
            model.set_adapter(names[0] if name == "all" else name)
            if name == "all":
                model.set_requires_grad(names)
            for side, text in {"right": ids, "left": left}.items():
                mixed = {"adapter_names": [names[n % len(names)] for n in (0, 2, 4)]} if name == "all" else {}
                labels = torch.tensor([0, 1, 0]) if task == "SEQ_CLS" else text
                torch.manual_seed(1)
                output = model(input_ids=text, attention_mask=(text != 0).long(), labels=labels, **mixed)
                model.zero_grad()
                output.loss.backward()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                found[f"{family} {name} {side}"] = digest(output.logits, output.loss, *gradients)
                if model.base_model.can_generate():
                    for sampled in (False, True):
                        torch.manual_seed(2)
                        written = model.eval().generate(
                            input_ids=text,
                            attention_mask=(text != 0).long(),
                            max_new_tokens=6,
                            do_sample=sampled,
                            **mixed,
                        )
                        found[f"{family} {name} {side} {'sampled' if sampled else 'greedy'}"] = digest(written)
                        model.train()
            if name != "all":
                with tempfile.TemporaryDirectory() as folder:
                    model.save_pretrained(folder, selected_adapters=[name])
                    found |= {f"{family} {name} {file}": x for file, x in of_folder(Path(folder)).items()}
    return found


def architectures() -> dict[str, tuple[str, Any]]:
    from transformers import (
        BertConfig,
        BloomConfig,
        DebertaV2Config,
        GPT2Config,
        LlamaConfig,
        Qwen3NextConfig,
        T5Config,
    )

    size = {"vocab_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24, "pad_token_id": 0}
    inner = {**size, "intermediate_size": 32}
    return {
        "llama": ("CAUSAL_LM", LlamaConfig(**inner, num_key_value_heads=2)),
        "gpt2": ("CAUSAL_LM", GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=4, pad_token_id=0)),
        "bloom": ("CAUSAL_LM", BloomConfig(**size)),
        "bert": ("SEQ_CLS", BertConfig(**inner)),
        "deberta": ("SEQ_CLS", DebertaV2Config(**inner, relative_attention=True, pos_att_type=["c2p"])),
        "hybrid": (
            "CAUSAL_LM",
            Qwen3NextConfig(
                **inner,
                num_key_value_heads=2,
                num_experts=0,
                head_dim=6,
                layer_types=["linear_attention", "full_attention"],
            ),
        ),
        "t5": (
            "SEQ_2_SEQ_LM",
            T5Config(vocab_size=31, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0),
        ),
    }


def takes(family: str, method: str) -> bool:
    """Whether rows with the method can be mixed with others in a batch of the model family."""
    return (family, method) != ("deberta", "biases")


def runs() -> dict[str, str]:
    """Digests of the files that the command line writes and of a server's responses."""
    from tests.tiny import LABELS, TEMPLATE, save_models, write_rows

    found = {}
    with tempfile.TemporaryDirectory() as name, working_in(Path(name)) as folder:
        models = save_models(Path("models"), attention_dropout=0.0)
        plain = {
            "train": write_rows(Path("rows.csv"), 16),
            "test_size": 4,
            "template": TEMPLATE,
            "label_column": "label",
            "labels": list(LABELS),
            "max_length": 24,
            "batch_size": 4,
            "epochs": 2,
        }
        for recipe, fields in RECIPES.items():
            content = {**plain, **fields, "model": models[fields.get("model", "llama")], "output": f"runs/{recipe}"}
            Path(f"{recipe}.yaml").write_text(json.dumps(content))
        softtune("train", "prefix.yaml", "biases.yaml")
        for recipe in ("words", "trunk", "classifier", "written"):
            softtune("train", f"{recipe}.yaml")
        for recipe in RECIPES:
            softtune("predict", f"runs/{recipe}", "rows.csv", "--output", f"predicted/{recipe}.csv")
        softtune("bake", "runs/prefix", "--model", models["llama"], "--to", "baked")
        softtune("compare", "trunk.yaml", "--output", "compared", "--entries", "bitfit,head,few-shot", "--seeds", "1")
        for part in ("runs", "predicted", "baked", "compared"):
            found |= {f"{part}/{file}": x for file, x in of_folder(folder / part).items()}
        found |= {f"served {request}": x for request, x in served(models).items()}
    return found


@contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def softtune(*arguments: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


COMMAND = (sys.executable, "-c", "import softtune_command; softtune_command.main()")


def served(models: Mapping[str, str]) -> dict[str, str]:
    """Digests of the responses of two servers: one with adapters that generate, one with a classifier."""
    text = {"prompt": "the sky is", "max_tokens": 9, "logprobs": 2}
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        "greedy": ("completions", {"model": "prefix", "temperature": 0, **text}),
        "drawn": ("completions", {"model": "biases", "temperature": 0.8, "top_p": 0.9, "seed": 3, **text}),
        "base": ("completions", {"model": models["llama"], "temperature": 1, "seed": 4, **text}),
        "labels": ("classify", {"model": "trunk", "input": "red good"}),
    }
    head_requests = {"head": ("classify", {"model": "classifier", "input": "red good"})}
    return {
        **answers(models["llama"], ["prefix", "biases", "trunk", "words"], requests),
        **answers(models["bert"], ["classifier"], head_requests),
    }


def answers(model: str, adapters: list[str], requests: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, str]:
    import httpx

    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [part for name in adapters for part in ("--adapters", f"runs/{name}")]
    server = subprocess.Popen(
        [*COMMAND, "serve", "--model", model, "--port", str(port), *folders], stdout=subprocess.DEVNULL
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait(client, server)
            found = {}
            for name, (endpoint, body) in requests.items():
                answer = client.post(f"/v1/{endpoint}", json=body).json()
                for key in ("id", "created", "system_fingerprint"):
                    answer.pop(key, None)
                found[name] = digest(answer)
                assert "error" not in answer, answer
            return found
    finally:
        server.terminate()
        server.wait()


def wait(client: Any, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server responds."""
    import httpx

    while server.poll() is None:
        with suppress(httpx.TransportError):
            client.get("/healthz").raise_for_status()
            return
        time.sleep(0.2)
    raise SystemExit("the server ended before it answered")


if __name__ == "__main__":
    main()
