"""A step that two processes share has the loss, the gradients and the adapter of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from softtune import PromptTuningConfig, get_peft_model
from softtune.errors import UnsupportedModelError
from softtune.pretrained import LoadOptions
from tests.distributed.processes import Processes
from tests.distributed.sharded import (
    CONFIGS,
    WAYS,
    adapted,
    base_model,
    batch,
    interrupted_losses,
    sharded_by_accelerate,
    shared_step,
    whole_step,
)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance * float(tensor.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_a_shared_step_is_the_step_of_one_process(processes: Processes, way: str, method: str, tmp_path: Path) -> None:
    loss, gradients, written, saved = whole_step(method, tmp_path / "one")
    for found in processes.run(shared_step, way, method, tmp_path / "two"):
        assert found[0] == pytest.approx(loss, rel=1e-6)
        assert_close(found[1], gradients, 5e-6)
        assert found[2] == written
        assert_close(found[3], saved, 0)


@pytest.mark.parametrize("way", WAYS[1:])
def test_sharded_weights_on_the_cpu_change_nothing(processes: Processes, way: str, tmp_path: Path) -> None:
    loss, gradients, written, _ = whole_step("P-tuning", tmp_path / "one")
    for found in processes.run(_offloaded, way, tmp_path / "two"):
        assert found[0] == pytest.approx(loss, rel=1e-6)
        assert_close(found[1], gradients, 5e-6)
        assert found[2] == written


def _offloaded(way: str, folder: Path) -> object:
    return shared_step(way, "P-tuning", folder, offload=True)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("way", WAYS[1:])
def test_mixed_precision_stays_as_close_as_bfloat16_is(
    processes: Processes, way: str, method: str, tmp_path: Path
) -> None:
    loss, gradients, *_ = whole_step(method, tmp_path / "one")
    for found in processes.run(shared_step, way, method, tmp_path / "two", "bfloat16"):
        assert found[0] == pytest.approx(loss, rel=1e-2)
        assert_close(found[1], gradients, 0.15)


@pytest.mark.parametrize("way", ["sharded before", "sharded after"])
def test_training_goes_on_from_a_sharded_checkpoint(processes: Processes, way: str, tmp_path: Path) -> None:
    expected = processes.run(interrupted_losses, way, "P-tuning", None)
    assert processes.run(interrupted_losses, way, "P-tuning", tmp_path / "checkpoint") == expected
    assert expected[0][-1] < expected[0][0]


def test_weights_that_come_later_are_refused(processes: Processes) -> None:
    for message in processes.run(_early):
        assert message == (
            "a model with adapters cannot be sharded before its weights are there: "
            "switch cpu_ram_efficient_loading off, or shard the base model as it is loaded"
        )


def _early() -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        sharded_by_accelerate(adapted(base_model(), "prefix"), early=True)
    return str(caught.value)


def test_each_process_holds_a_part_of_the_weights(processes: Processes, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path)
    total = sum(p.numel() for p in base_model().parameters())
    for held in processes.run(_held, tmp_path):
        assert held == total // 2


def _held(folder: Path) -> int:
    """The numbers that a process holds, after a step, of a base model that it has loaded sharded."""
    config = AutoConfig.from_pretrained(folder)
    arguments = LoadOptions(fsdp=True).arguments(config)
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    trained = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    trained.train()(**batch()).loss.backward()
    return sum(p.to_local().numel() for p in model.parameters())


def test_tied_weights_count_once(processes: Processes, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **size))
    base.save_pretrained(tmp_path)
    expected = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for counts in processes.run(_counts, tmp_path):
        assert counts == expected.get_nb_trainable_parameters()


def _counts(folder: Path) -> tuple[int, int]:
    arguments = LoadOptions(fsdp=True).arguments(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    trained = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    return trained.get_nb_trainable_parameters()
