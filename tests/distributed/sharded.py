"""Trains a step of an adapter over a base model that is whole or sharded in each process: the work of the tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from softtune import (
    BitFitConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

CONFIGS: dict[str, PeftConfig] = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix with an MLP": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "P-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    "BitFit": BitFitConfig(task_type="CAUSAL_LM", add_missing=True),
}
WAYS = ("DDP", "sharded before", "sharded after", "sharded before and after", "sharded after by accelerate")
"""When the base model is sharded, relative to the adapter."""
Step = tuple[float, dict[str, Tensor], list[int], dict[str, Tensor]]
"""The loss, the gradients by the name of the parameter, generated ids, and the tensors of the saved adapter."""


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=48, initializer_range=0.2, **size)).eval()


def adapted(base: LlamaForCausalLM, method: str) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base, CONFIGS[method])


def batch() -> dict[str, Tensor]:
    """Four rows with as many labels in the first two as in the last two, one of each padded."""
    ids = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1:3, 3] = -100  # padding precedes it
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def whole_step(method: str, folder: Path) -> Step:
    """The step of one process."""
    return _step(adapted(base_model(), method), batch(), folder)


def shared_step(way: str, method: str, folder: Path, precision: str | None = None, *, offload: bool = False) -> Step:
    """The same step, shared by the processes."""
    policies: dict[str, Any] = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    if precision is not None:
        policies["mp_policy"] = MixedPrecisionPolicy(param_dtype=getattr(torch, precision))
    base = base_model()
    if "before" in way:
        _shard(base, base, **policies)
    model = adapted(base, method)
    if way.endswith("accelerate"):
        sharded_by_accelerate(model, **policies)
    elif "after" in way:
        _shard(base, model, **policies)
    rank, size = dist.get_rank(), dist.get_world_size()
    own = {name: rows.chunk(size)[rank] for name, rows in batch().items()}
    loss, gradients, written, saved = _step(DistributedDataParallel(model) if way == "DDP" else model, own, folder)
    if way == "sharded before":  # the adapter is whole in each process
        gradients = {name: _mean(gradient) for name, gradient in gradients.items()}
    return float(_mean(torch.tensor(loss))), gradients, written, saved


def sharded_by_accelerate(model: Any, *, early: bool = False, **policies: Any) -> None:
    """Shard a model as an ``Accelerator`` does, which would ask for a GPU.

    Args:
        model: the model with its adapter.
        early: by ``cpu_ram_efficient_loading``.
        policies: of ``fully_shard``.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=early,
        cpu_offload=policies.get("offload_policy", False),
        mixed_precision_policy=policies.get("mp_policy"),
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    rank = dist.get_rank()
    settings = {"mixed_precision": "no", "is_main_process": rank == 0, "device": torch.device("cpu")}
    fsdp2_prepare_model(SimpleNamespace(state=state, **settings), model)


def interrupted_losses(way: str, method: str, folder: Path | None) -> list[float]:
    """The losses of four steps; with a folder, the last two are of a model that goes on from what is saved there."""
    model, optimizer = _begun(way, method)
    losses = [_update(model, optimizer) for _ in range(2)]
    if folder is not None:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
        model, optimizer = _begun(way, method)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return [*losses, _update(model, optimizer), _update(model, optimizer)]


def _begun(way: str, method: str) -> tuple[Any, torch.optim.Optimizer]:
    base = base_model()
    if "before" in way:
        _shard(base, base)
    model = adapted(base, method)
    if "after" in way:
        _shard(base, model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def _update(model: Any, optimizer: torch.optim.Optimizer) -> float:
    """A step on the same rows in every process."""
    optimizer.zero_grad()
    loss = model.train()(**batch()).loss
    loss.backward()
    optimizer.step()
    return float(loss.item())


def _shard(base: LlamaForCausalLM, root: nn.Module, **policies: Any) -> None:
    for layer in base.model.layers:
        if not hasattr(layer, "unshard"):
            fully_shard(layer, **policies)
    fully_shard(root, **policies)


def _step(model: Any, rows: dict[str, Tensor], folder: Path) -> Step:
    """A step, after another whose gradients are thrown away, and what the adapter then writes and saves."""
    own = model.module if isinstance(model, DistributedDataParallel) else model
    for _ in range(2):
        model.train().zero_grad()
        loss = model(**rows).loss
        loss.backward()
    assert all(p.grad is None for p in own.parameters() if not p.requires_grad)
    gradients = {name: whole(p.grad) for name, p in own.named_parameters() if p.requires_grad}
    written = own.eval().generate(input_ids=batch()["input_ids"][:1], max_new_tokens=5, do_sample=False)
    own.save_pretrained(folder, is_main_process=not dist.is_initialized() or dist.get_rank() == 0)
    if dist.is_initialized():
        dist.barrier()
    saved = {f"{file.name}: {k}": x for file in folder.glob("*.safetensors") for k, x in load_file(file).items()}
    return loss.item(), gradients, written[0].tolist(), saved


def whole(tensor: Any) -> Tensor:
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().clone()


def _mean(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()
