"""Trains an adapter by accelerate, in as many processes as it is started in, and saves it in the folder named."""

from __future__ import annotations

import faulthandler
import sys

import torch
from accelerate import Accelerator
from tests.families import CAUSAL_LM, METHODS, VOCABULARY, base_model, scramble

from softtune import get_peft_model

PATIENCE = 150
"""Seconds after which a process that waits for ever shows where it does, and ends."""


def main(method: str, folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = scramble(get_peft_model(base_model("gpt2", CAUSAL_LM), METHODS[method](task_type=CAUSAL_LM)))
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, VOCABULARY, (6,), generator=generator) for _ in range(12)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4 // accelerator.num_processes)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for ids in loader:
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.unwrap_model(model).save_pretrained(
        folder, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    main(*sys.argv[1:])
