"""Counts how often calls of models wait for their device or copy to it, on a device that stands in for a GPU.

Prints counts as lines of JSON, of models with two layers and with six; run by ``tests/test_transfers.py`` in a process
of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from softtune import PeftModel, get_peft_model
from softtune.injection.kv_pool import KVPool
from softtune.serving.prompt_export import export_prompt
from softtune.serving.sequence import LoadedPrompt, ScheduledChunk, TokenSequence, run_chunks
from tests import fake_gpu
from tests.families import CAUSAL_LM, METHODS, SEQ_CLS, base_model, batch, labels_for, texts

ALONE, CONTROL = "", "prefix, and every layer waits"
"""The base model without an adapter, and with one beside a hook on every layer that looks at its numbers."""
CASES = {
    "llama": [
        *(ALONE, CONTROL, "prompt", "prompt_suffix", "p_tuning_mlp", "prefix", "infix"),
        *("p_tuning_v2", "bitfit_added", "prefix and prompt"),
    ],
    "gpt2": [ALONE, "prompt", "prefix", "bitfit", "bitfit and bitfit_added", "ia3", "ia3 and bitfit"],
    "bert": [ALONE, "prompt", "prefix", "bitfit", "bitfit and bitfit_added"],
}
"""By family, what is counted: methods, or two of which each row of a batch has one."""
LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer", "bert": "num_hidden_layers"}
"""What a family's config calls the number of layers."""
DEPTHS = (2, 6)
STEPS = 3
"""Decoding steps behind the first one."""

Action = Callable[[], Any]


def main() -> None:
    device = fake_gpu.install()
    with fake_gpu.Device() as gpu:
        for family, cases in CASES.items():
            for case in cases:
                for depth in DEPTHS:
                    for action, run in actions(family, case, depth, device):
                        run()  # what is observed of a model once, and the first backward pass
                        with gpu.counting() as places:
                            run()
                        key = {"family": family, "case": case, "depth": depth, "action": action}
                        print(json.dumps({**key, "places": places}), flush=True)


def actions(family: str, case: str, depth: int, device: torch.device) -> Iterator[tuple[str, Action]]:
    """What is counted of a case, by name."""
    task = SEQ_CLS if family == "bert" else CAUSAL_LM
    base = base_model(family, task, attn_implementation="eager", **{LAYERS[family]: depth}).to(device)
    names = [name for name in case.split(", ")[0].split(" and ") if name]
    model: Any = with_adapters(base, names, task) if names else base
    if case == CONTROL:
        for layer in model.backbone.stacks[0].layers:
            layer.register_forward_hook(lambda module, args, output: output if bool(output.any()) else None)
    inputs = batch(texts(family, task), "left")
    labels = labels_for(task, inputs).to(device)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    rows = {"adapter_names": [names[row % 2] for row in range(len(labels))]} if len(names) > 1 else {}
    yield "training", lambda: model.train()(**inputs, **rows, labels=labels).loss.backward()
    model.eval()
    yield "forward", lambda: without_gradients(model, inputs | rows)
    if task == CAUSAL_LM:
        yield "first step", lambda: generated(model, inputs | rows, 1)
        yield "all steps", lambda: generated(model, inputs | rows, 1 + STEPS)
        if names:
            yield "serving", serving(model, names)


def with_adapters(base: Any, names: list[str], task: str) -> PeftModel:
    model = get_peft_model(base, METHODS[names[0]](task_type=task), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, METHODS[name](task_type=task))
    model.set_requires_grad(names)
    return model


@torch.no_grad()
def without_gradients(model: Any, inputs: dict[str, Any]) -> None:
    model(**inputs)


def generated(model: Any, inputs: dict[str, Any], tokens: int) -> None:
    model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None)


def serving(model: PeftModel, names: list[str]) -> Action:
    """A step of a server that reads three texts."""
    backbone = model.backbone
    pool = KVPool(backbone, slots=256)
    exported = [export_prompt(backbone, model.adapter(name), as_kv=True) for name in names]
    prompts = [LoadedPrompt.from_prompt(pool, prompt) for prompt in exported]

    def step() -> None:
        rows = [(prompts[number % len(prompts)], list(range(3, 3 + n))) for number, n in enumerate((9, 7, 6))]
        sequences = [TokenSequence.from_input_ids(prompt, ids) for prompt, ids in rows]
        run_chunks(backbone, pool, [ScheduledChunk(s, s.num_pending_tokens, 1) for s in sequences])
        for sequence in sequences:
            pool.free(sequence.slots)

    return step


if __name__ == "__main__":
    main()
