"""Puts a prompt into the base model's forward, and takes its traces out of the outputs.

Hooks rewrite the calls of the base model's stacks for the length of a ``with`` block, and leave nothing behind. Each
call has an ``Injection`` of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from softtune.backbone import Backbone, counting_words, keeping_caches
from softtune.backbone.interface import flash_refusal, takes_padding
from softtune.errors import DataError, UnsupportedModelError
from softtune.injection.owners import Owners, sign
from softtune.injection.stack import StackInjection, align_outputs
from softtune.injection.step import Call, Step
from softtune.injection.trunk import Trunk
from softtune.methods.base import Prompt


class Injection:
    """The prompts of a batch in one base model.

    Args:
        backbone: the base model.
        prompts: what each adapter of the batch contributes.
        rows: [B] which of the prompts each row has; None where there is only one.
        columns: [B, N] the column of the input before which each virtual token stands; by default in front of the text,
            or at its end where the prompt says so.
        text_ends: [B] the column where each text ends; by default behind its last token.
        packs: whether a decoder's layers may see tokens in any arrangement, since only attention tells rows apart.
        trunk: the layers below the prompts, kept from call to call; None where every call runs all layers.
        encoder_owners: who acts in an encoder-decoder's encoder, which is noted in its outputs.

    Raises:
        DataError: there are columns, but no virtual tokens that stand among the words, or another number of them.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Prompt],
        rows: Tensor | None = None,
        *,
        columns: Tensor | None = None,
        text_ends: Tensor | None = None,
        packs: bool = True,
        trunk: Trunk | None = None,
        encoder_owners: Owners = (),
    ) -> None:
        if columns is not None:
            _check_columns(columns, prompts)
        self.backbone = backbone
        self.prompts = prompts
        self.encoder_owners = encoder_owners
        self.has_called = False
        """Whether the base model has been called."""
        self.stacks = [
            StackInjection(backbone, s, prompts, rows, columns, text_ends, packs, trunk) for s in backbone.stacks
        ]

    @property
    def num_among(self) -> int:
        """How many virtual tokens stand among the words of the input."""
        vectors = self.stacks[0].prompts.vectors
        return 0 if vectors is None else vectors.shape[1]

    @property
    def is_prefix(self) -> bool:
        """Whether all is a prefix in front of a decoder's text, whose parts may then be read one after the other."""
        first = self.stacks[0]
        return self.backbone.is_decoder_only and first.prompts.vectors is None and not first.prompts.has_infix

    def check_parts(self, options: Mapping[str, Any]) -> None:
        """Raise UnsupportedModelError where ``generate`` is to read the text in parts, each of which would be taken for
        the whole."""
        config = options.get("generation_config")
        in_parts = options.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        if in_parts and not self.is_prefix:
            raise UnsupportedModelError(
                "prefill_chunk_size is for decoders that take virtual tokens as a prefix in front of the text: "
                "leave it out"
            )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Rewrite the base model's calls for the length of the block."""
        backbone, handles = self.backbone, [handle for stack in self.stacks for handle in stack.hooks()]
        handles.append(backbone.model.register_forward_pre_hook(self._note_call, with_kwargs=True))
        if backbone.is_encoder_decoder:
            encoder, decoder = (stack.module for stack in backbone.stacks)
            handles.append(encoder.register_forward_hook(self._sign_encoder))
            handles.append(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
            if self.stacks[0].prompts.vectors is not None:
                handles.append(backbone.model.register_forward_hook(self._align_encoder))
        if (head := backbone.model.get_output_embeddings()) is not None:
            handles.append(head.register_forward_pre_hook(_lay_together))
        with ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            for injection in self.stacks:
                stack.callback(injection.stop_skipping)
                if injection.is_disentangled:
                    stack.enter_context(injection.attention())
            if backbone.is_decoder_only and self.num_among and backbone.model.can_generate():
                stack.enter_context(counting_words(backbone.model, self.num_among))
            if any(prompt.prefixes for prompt in self.prompts) and not backbone.takes_wrapper:
                stack.enter_context(keeping_caches(backbone.model))  # of a prefix, which recomputing may read again
            yield

    def check_arrival(self, has_encoded: bool) -> None:
        """Look whether each stack ran that should have met a prompt in a call.

        Args:
            has_encoded: whether the caller had the encoder's outputs already.

        Raises:
            UnsupportedModelError: one did not.
        """
        if not self.has_called:
            return  # a function of the caller's own, in place of generate's loop
        for number, injection in enumerate(self.stacks):
            is_done = has_encoded and number == 0 and self.backbone.is_encoder_decoder
            if injection.acts and not (injection.has_run or is_done):
                raise UnsupportedModelError(
                    f"{type(self.backbone.model).__name__} did not run its {type(injection.stack.module).__name__}, so "
                    "that no prompt arrived: pass text, or use a base model that docs/support.md names"
                )

    def _note_call(self, module: nn.Module, args: Any, kwargs: Call) -> None:
        """Tell the only stack what the caller said: which tokens are padding, even where the model above it makes a
        ready mask of that, and whether the positions are the caller's."""
        self.has_called = True
        if not self.backbone.is_encoder_decoder:
            self.stacks[0].outer_mask = kwargs.get("attention_mask")
            self.stacks[0].has_outer_positions = kwargs.get("position_ids") is not None

    def _sign_encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        sign(output.last_hidden_state, self.encoder_owners)

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
        """Let the decoder see the encoder's outputs of the virtual tokens."""
        encoder = self.stacks[0]
        if kwargs.get("encoder_hidden_states") is None:
            return args, kwargs
        mask = encoder.with_virtual(kwargs.get("encoder_attention_mask"), kwargs["encoder_hidden_states"])
        if mask is not None and takes_padding(module.config):
            self._check_padding(mask, self.stacks[-1].stack.arguments(args, kwargs))
        return args, {**kwargs, "encoder_attention_mask": mask}

    def _check_padding(self, mask: Tensor, call: Call) -> None:
        """Refuse what transformers computes wrongly with an encoder's mask [B, S], unless there is one query a row."""
        if Step(call).length > 1 and not bool(mask.all()):
            raise flash_refusal("takes the padding of the encoder's texts for that of the decoder's")

    def _align_encoder(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Take the virtual tokens out of what an encoder-decoder returns of its encoder."""
        layout, states = self.stacks[0].layout, getattr(output, "encoder_last_hidden_state", None)
        if layout is not None and states is not None and len(states) == len(layout.token_slots):  # not among beams
            align_outputs(output, layout, "encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions")
            if getattr(output, "cross_attentions", None) is not None:
                output.cross_attentions = tuple(layout.align_keys(a) for a in output.cross_attentions)
            sign(output.encoder_last_hidden_state, self.encoder_owners)
        return output


def _lay_together(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """States of the rows' ends lie apart in memory, for which a language head would be read once for every row. One
    row's do not, but their strides say so, which in bf16 costs as much on a CPU."""
    return tuple(x.contiguous().view(-1, x.shape[-1]).view(x.shape) if isinstance(x, Tensor) else x for x in args)


def _check_columns(columns: Tensor, prompts: Sequence[Prompt]) -> None:
    sizes = {p.num_virtual_tokens for p in prompts if p.vectors is not None or p.after_text}
    if not sizes:
        raise DataError("prompt_positions is for virtual tokens among the words, this adapter has none: leave it out")
    if sizes != {columns.shape[-1]} or columns.dim() != 2:
        raise DataError(f"prompt_positions {list(columns.shape)} do not fit: give {max(sizes)} for each row")
