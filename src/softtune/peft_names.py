"""Attributes and methods of PEFT's models that softtune does not need itself, under PEFT's names.

Letters: B rows, P virtual tokens, D embedding size, W values of one virtual token over all layers.

Internal.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softtune.adapter_context import BatchAdapters
from softtune.backbone.quantization import num_weights
from softtune.card import CARD_NAME, model_card
from softtune.compat import DynamicCache
from softtune.errors import AdapterError
from softtune.methods.initialization import PROMPT_KEY
from softtune.peft_types import PeftType
from softtune.state import AdapterState

NO_LAYERS = "soft prompts are no layers: see active_adapters, peft_config and print_trainable_parameters()"


class PeftNames(AdapterState):
    """A base model and its adapters, with what scripts written for PEFT use."""

    @property
    def peft_type(self) -> PeftType | None:
        """The method of the active adapter, even while adapters are disabled; None if there is none."""
        return self.active_peft_config.peft_type if self.active_adapter else None

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names in the configs of the modules that are trained beside the prompts; None if there are none."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype:
        """The base model's precision."""
        return self.get_base_model().dtype

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The base model's word embedding."""
        return self.backbone.embedding

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        """Indices [P] of each adapter's virtual tokens, for adapters that have some."""
        sizes = {name: getattr(config, "num_virtual_tokens", 0) for name, config in self.peft_config.items()}
        return {name: torch.arange(size) for name, size in sizes.items() if size}

    def get_prompt(self, batch_size: int, task_ids: Any = None, max_cache_len: int | None = None) -> Any:
        """The active adapter's prompt for a batch: vectors [B, P, D], or a cache of keys and values.

        Args:
            batch_size: B.
            task_ids: [B] each row's task, for an adapter with several.
            max_cache_len: unused; PEFT has it for caches of old versions of transformers.

        Raises:
            AdapterError: no adapter is active, it has no virtual tokens or several methods, or its prefix is for some
                layers only or for an encoder-decoder, so that no cache of one stack can hold it.
        """
        name = next(iter(self.active_adapters), None)
        if name is None:
            raise AdapterError("no adapter is active", "set one by set_adapter")
        self._check_single(name)
        batch = BatchAdapters.from_names([name], self.adapter, task_ids)
        prompts = [adapter.prompt() for (adapter,) in batch.adapters.values()]
        prompt = prompts[0]
        if batch.rows is not None:
            return torch.stack([prompts[row].vectors for row in batch.rows.tolist()])
        if prompt.vectors is not None:
            return prompt.vectors.expand(batch_size, -1, -1)
        layers = self.backbone.attention_layers
        if set(prompt.prefixes) != {layer.place for layer in layers} or self.backbone.is_encoder_decoder:
            raise AdapterError(f"no cache holds the prompt of {name!r}", f"read get_prompt_embedding_to_save({name!r})")
        cache = DynamicCache()
        for layer in layers:
            pair = prompt.prefixes[layer.place]
            key, value = (part.expand(batch_size, -1, -1, -1).to(self.base_model_torch_dtype) for part in pair)
            cache.update(key, value, layer.index)
        return cache

    def prepare_model_for_gradient_checkpointing(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make a base model's input embeddings require gradients, unless it is quantised.

        Soft prompts do not need this: they reach checkpointed layers without it.
        """
        if not getattr(model, "is_quantized", False):
            model.enable_input_require_grads()
        return model

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the active adapter's model card into a folder; text that others wrote into it is kept."""
        path = Path(output_dir) / CARD_NAME
        adapter = self.adapter(self.active_adapter)
        model_card(path, adapter.config, self.backbone, adapter.num_trained).save(path)

    def get_layer_status(self) -> Any:
        """Not supported for prompts, as in PEFT: they are not layers.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"get_layer_status() got an invalid PeftModel instance; {NO_LAYERS}")

    def get_model_status(self) -> Any:
        """Not supported for prompts, as in PEFT: they are not layers.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"get_model_status() got an invalid PeftModel instance; {NO_LAYERS}")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter can be turned into a LoRA: never."""
        return False

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The adapter's computed prompt on the CPU: [P, W] keys and values, or [P, D] vectors.

        Raises:
            AdapterError: no such adapter, or it has no virtual tokens or several methods.
        """
        self._check_single(adapter_name)
        state = self.adapter(adapter_name).inference_state()
        if PROMPT_KEY not in state:
            raise AdapterError(f"{adapter_name!r} has no virtual tokens", "read get_peft_model_state_dict instead")
        prompt: Tensor = state[PROMPT_KEY].cpu()
        return prompt

    def _check_single(self, adapter_name: str) -> None:
        """Check that an adapter's prompt can be one tensor or cache.

        Raises:
            AdapterError: no such adapter, or it has several methods.
        """
        adapter = self.adapter(adapter_name)
        if len(adapter.config.single(adapter.module)) > 1:
            raise AdapterError(
                f"{adapter_name!r} combines methods, of which no one tensor holds the prompt",
                "read get_peft_model_state_dict instead",
            )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trained parameters, and of all parameters, to which frozen virtual tokens count too."""
        tied = {f"base_model.{name}" for name in getattr(self.get_base_model(), "all_tied_weights_keys", None) or ()}
        counts = [(num_weights(p), p.requires_grad) for name, p in self.named_parameters() if name not in tied]
        frozen_tokens = sum(
            buffer.numel()
            for part in self.prompt_encoder.modules()
            for name, buffer in part.named_buffers(recurse=False)
            if name not in part._non_persistent_buffers_set
        )
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts) + frozen_tokens

    def print_trainable_parameters(self) -> None:
        """Print both counts and the trained share, in PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")
