"""Training under DeepSpeed's ZeRO-2 and ZeRO-3: the losses and the saved adapter of one process.

``make test-zero`` runs these in an environment of its own. DeepSpeed runs on a CPU too, over gloo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from softtune.errors import UnsupportedModelError
from tests.distributed.processes import Processes
from tests.distributed.sharded import CONFIGS, adapted, base_model, batch

pytest.importorskip("deepspeed", reason="see make test-zero")
STEPS = 3
ZERO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 4,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 0.0,
}


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def trained(model: Any, folder: Path) -> list[float]:
    """The losses of a few steps of one process, which then saves the adapter."""
    optimizer, losses = sgd(model), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model.train()(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    return losses


def trained_by_zero(stage: int, method: str, folder: Path) -> list[float]:
    """The same, shared by processes."""
    engine, model = engine_of(stage, method)
    rank, losses = dist.get_rank(), []
    rows = {name: own.chunk(dist.get_world_size())[rank] for name, own in batch().items()}
    for _ in range(STEPS):
        loss = engine(**rows).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    model.save_pretrained(folder, is_main_process=rank == 0)
    dist.barrier()
    return losses


def engine_of(stage: int, method: str) -> tuple[Any, Any]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = adapted(base_model(), method)
    settings = {**ZERO, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    return deepspeed.initialize(model=model, optimizer=sgd(model), config=settings)[0], model


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_shared_run_is_the_run_of_one_process(
    processes: Processes,
    stage: int,
    method: str,
    tmp_path: Path,
) -> None:
    expected = trained(adapted(base_model(), method), tmp_path / "one")
    for losses in processes.run(trained_by_zero, stage, method, tmp_path / "two"):
        assert losses == pytest.approx(expected, rel=1e-5)
    for file in (tmp_path / "one").glob("*.safetensors"):
        tensors = load_file(tmp_path / "two" / file.name)
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=1e-4)


def test_what_one_process_cannot_save_is_refused(processes: Processes) -> None:
    for message in processes.run(_refusal):
        assert message.startswith("what ZeRO-3 shards is saved by all processes together")


def _refusal() -> str:
    _, model = engine_of(3, "prefix")
    with pytest.raises(UnsupportedModelError) as caught:
        model.save_pretrained("nowhere", state_dict={})
    return str(caught.value)
