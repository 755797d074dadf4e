"""Inserts a batch's prompts into the base model's forward, and removes their places from the outputs.

Hooks rewrite the calls of the base model's stacks for the length of a ``with`` block, and leave nothing behind. Each
call has an ``Injection`` of its own.

Internal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from softtune.backbone import Backbone, counting_words, keeping_caches
from softtune.backbone.interface import flash_refusal, takes_padding
from softtune.errors import DataError, UnsupportedModelError
from softtune.injection.frozen_layer_cache import FrozenLayerCache
from softtune.injection.prefix_mask import PrefixMask
from softtune.injection.provenance import AdapterNames, tag_provenance
from softtune.injection.stack import StackInjection, align_outputs
from softtune.injection.step import Call, Step
from softtune.methods.prompt import Prompt


class Injection:
    """The prompts of a batch, injected into one base model.

    Args:
        backbone: the base model.
        prompts: the prompt of each adapter of the batch.
        rows: [B] index of each row's prompt; None where there is only one.
        columns: [B, N] the input column before which each virtual token stands; by default in front of the text, or at
            its end where the prompt has ``after_text``.
        text_ends: [B] the column where each text ends; by default behind its last token.
        prefix_mask: [B, P] which virtual tokens of its prefix a row sees, those of a shorter prefix in the last
            columns; by default all, less those that dropout hides.
        packs: whether a decoder's batch may be packed into one row, which only attention separates into rows again.
        layer_cache: hidden states below the prompts, cached from call to call; None where every call runs all layers.
        encoder_adapters: the active adapters of an encoder-decoder's encoder, which its outputs are tagged with.

    Raises:
        DataError: there are columns, but no virtual tokens at the input, or another number of them; ``prefix_mask``
            does not fit.
        UnsupportedModelError: virtual tokens of a prefix are to be hidden, and the base model takes it as a cache.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Prompt],
        rows: Tensor | None = None,
        *,
        columns: Tensor | None = None,
        text_ends: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        packs: bool = True,
        layer_cache: FrozenLayerCache | None = None,
        encoder_adapters: AdapterNames = (),
    ) -> None:
        if columns is not None:
            _check_columns(columns, prompts)
        self.backbone = backbone
        self.prompts = prompts
        self.encoder_adapters = encoder_adapters
        self.has_called = False
        """Whether the base model has been called."""
        mask = PrefixMask(backbone, prompts, rows, prefix_mask)
        self.stacks = [
            StackInjection(backbone, s, prompts, rows, columns, text_ends, packs, layer_cache, mask)
            for s in backbone.stacks
        ]

    @property
    def num_among(self) -> int:
        """Number of virtual tokens at the input of the first stack."""
        vectors = self.stacks[0].prompts.vectors
        return 0 if vectors is None else vectors.shape[1]

    @property
    def is_prefix(self) -> bool:
        """Whether all prompts are prefixes in front of a decoder's text, which may then be prefilled in chunks."""
        first = self.stacks[0]
        return self.backbone.is_decoder_only and first.prompts.vectors is None and not first.prompts.has_infix

    def check_parts(self, options: Mapping[str, Any]) -> None:
        """Check that ``generate`` does not prefill in chunks, unless all prompts are prefixes.

        Raises:
            UnsupportedModelError: it does, and each chunk would be taken for the whole text.
        """
        config = options.get("generation_config")
        in_parts = options.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        if in_parts and not self.is_prefix:
            raise UnsupportedModelError(
                "prefill_chunk_size is for decoders that take virtual tokens as a prefix in front of the text",
                "leave it out",
            )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks that rewrite the base model's calls, for the length of the block."""
        backbone = self.backbone
        handles = [backbone.model.register_forward_pre_hook(self._note_call)]
        if backbone.is_encoder_decoder:
            encoder, decoder = (stack.module for stack in backbone.stacks)
            handles.append(encoder.register_forward_hook(self._tag_encoder))
            handles.append(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
            if self.stacks[0].prompts.vectors is not None:
                handles.append(backbone.model.register_forward_hook(self._align_encoder))
        if (head := backbone.model.get_output_embeddings()) is not None:
            handles.append(head.register_forward_pre_hook(_lay_together))
        with ExitStack() as stack:
            for injection in self.stacks:
                stack.enter_context(injection.attached())
            for handle in handles:
                stack.callback(handle.remove)
            if backbone.is_decoder_only and self.num_among and backbone.model.can_generate():
                stack.enter_context(counting_words(backbone.model, self.num_among))
            if any(prompt.prefixes for prompt in self.prompts) and not backbone.takes_wrapper:
                stack.enter_context(keeping_caches(backbone.model))  # recomputation reads a prefix's cache again
            yield

    def check_arrival(self, has_encoded: bool) -> None:
        """Check that each stack that has a prompt ran in a call.

        Args:
            has_encoded: whether the caller passed the encoder's outputs.

        Raises:
            UnsupportedModelError: a stack that has a prompt did not run.
        """
        if not self.has_called:
            return  # generate ran a decoding loop of the caller's own
        for number, injection in enumerate(self.stacks):
            is_done = has_encoded and number == 0 and self.backbone.is_encoder_decoder
            if injection.planner.acts and not (injection.finished or is_done):
                raise UnsupportedModelError(
                    f"{type(self.backbone.model).__name__} did not run its "
                    f"{type(injection.stack.module).__name__}, so that no prompt arrived",
                    "pass text, or use a base model that docs/support.md names",
                )

    def _note_call(self, module: nn.Module, args: Any) -> None:
        self.has_called = True

    def _tag_encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        tag_provenance(output.last_hidden_state, self.encoder_adapters)

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
        """Extend the decoder's cross-attention mask to the encoder's virtual tokens."""
        encoder = self.stacks[0]
        if kwargs.get("encoder_hidden_states") is None:
            return args, kwargs
        mask = encoder.with_virtual(kwargs.get("encoder_attention_mask"), kwargs["encoder_hidden_states"])
        if mask is not None and takes_padding(module.config):
            self._check_padding(mask, self.stacks[-1].stack.arguments(args, kwargs))
        return args, {**kwargs, "encoder_attention_mask": mask}

    def _check_padding(self, mask: Tensor, call: Call) -> None:
        """Check that transformers computes cross-attention with an encoder's mask [B, S] correctly.

        Raises:
            UnsupportedModelError: the mask has padding, and there is more than one query a row.
        """
        if Step(call).length > 1 and not bool(mask.all()):
            raise flash_refusal("takes the padding of the encoder's texts for that of the decoder's")

    def _align_encoder(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Remove the virtual tokens from the encoder's outputs that an encoder-decoder returns."""
        encoded, states = self.stacks[0].finished, getattr(output, "encoder_last_hidden_state", None)
        layout = None if encoded is None else encoded.arrangement.layout
        if layout is not None and states is not None and len(states) == len(layout.token_slots):  # not with beams
            align_outputs(output, layout, "encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions")
            if getattr(output, "cross_attentions", None) is not None:
                output.cross_attentions = tuple(layout.align_keys(a) for a in output.cross_attentions)
            tag_provenance(output.encoder_last_hidden_state, self.encoder_adapters)
        return output


def _lay_together(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make the language head's input contiguous. The states of the rows' last tokens lie apart in memory, for which the
    head would be read once for every row. One row's do not, but their strides say so, which in bf16 costs as much on a
    CPU."""
    return tuple(x.contiguous().view(-1, x.shape[-1]).view(x.shape) if isinstance(x, Tensor) else x for x in args)


def _check_columns(columns: Tensor, prompts: Sequence[Prompt]) -> None:
    sizes = {p.prefix_length if p.vectors is None else len(p.vectors) for p in prompts if _has_place(p)}
    if not sizes:
        raise DataError("prompt_positions is for virtual tokens among the words, this adapter has none", "leave it out")
    if sizes != {columns.shape[-1]} or columns.dim() != 2:
        raise DataError(f"prompt_positions {list(columns.shape)} do not fit", f"give {max(sizes)} for each row")


def _has_place(prompt: Prompt) -> bool:
    """Whether a prompt's virtual tokens have a place in the text."""
    return prompt.vectors is not None or prompt.after_text
