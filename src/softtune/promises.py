"""Checks what softtune promises for every base model, with five tokens and a random prompt.

Errors are compared with the prompt's effect: a prompt that is lost, applied twice or misplaced is off by as much as it
changes the outputs. Where the base model alone breaks a promise, the adapter need not keep it.

Letters: B rows, T tokens, V vocabulary size or classes.

Internal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from softtune.adapter import Adapter
from softtune.backbone import Backbone, model_session
from softtune.backbone.checkpointing import is_checkpointing, without_gradient_checkpointing
from softtune.backbone.modes import evaluating, training
from softtune.backbone.refusal import reading_text
from softtune.backbone.sharding import is_sharded
from softtune.compat import cache_of, can_checkpoint, disable_checkpointing, enable_checkpointing, renamed
from softtune.errors import SofttuneError
from softtune.formatting import in_one_line
from softtune.gradients import without_gradient
from softtune.injection.provenance import BASE

NEW, GIVEN = 2, 3
"""Numbers of generated tokens and of given tokens before them: a text of five."""
PADDING = 3
STRONGER, TRIES = 4.0, 4
"""The factor by which a prompt with too small an effect is scaled, and how many times at most."""
OUTPUTS = ("logits", "start_logits", "prediction_logits", "text_embeds", "last_hidden_state")
"""Output fields to compare; the first that an output has counts."""


State = dict[str, Any]
"""The parts of a model that adapters must not change, by name."""


class Adapted(Protocol):
    """A base model with one adapter, as ``PeftModel`` is."""

    backbone: Backbone

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...


class Refused(NamedTuple):
    """A promise that softtune refuses to give, with a reason in one line."""

    reason: str


class Broken(NamedTuple):
    """A promise that does not hold."""

    how: str


class NotAsked(NamedTuple):
    """A promise that does not apply to the base model, or that it breaks without an adapter."""

    reason: str


Outcome = Refused | Broken | NotAsked | None
"""None where the promise holds."""
NO_TEXT = NotAsked("it writes no text")
BASE_TOO = NotAsked("the base model alone does not keep it")


class Promise(NamedTuple):
    """Something that holds for every base model and method."""

    text: str
    check: Callable[[Probe], Outcome | str]
    """Returns None where the promise holds; a string describes the failure."""
    is_quick: bool = True
    """Whether it is checked before the first use of a model."""


class Probe:
    """A model with a random adapter, the text that it is run on, and the base model's outputs.

    Args:
        model: the base model with the adapter.
        adapter: that adapter; it is scaled until it has an effect.
        before: ``state_of`` the base model before any change.
        columns: before which of the first three tokens each virtual token stands; by default where the method puts it.

    Raises:
        UnsupportedModelError: the base model does not run on token ids alone.
    """

    def __init__(self, model: Adapted, adapter: Adapter, before: State, columns: Sequence[int] | None = None) -> None:
        self.model = model
        self.adapter = adapter
        self.base: Any = model.backbone.model
        self.backbone = model.backbone
        self.device = self.backbone.device
        self.columns = columns
        self.before = before
        self.text = self._text(GIVEN + NEW)
        self.expected = self._of_base()
        self.size = float(self.expected.abs().max())
        self.tolerance = max(1e-3, 8 * torch.finfo(self.base.dtype).eps) * max(self.size, 1e-3)
        self.alone = self.read()
        if self.alone.shape == self.expected.shape:
            self._strengthen()

    @property
    def numbers(self) -> set[str]:
        """Names of the base model's parameters and buffers."""
        return {name for name, _ in (*self.base.named_parameters(), *self.base.named_buffers())}

    @property
    def writes(self) -> bool:
        """Whether the model generates text."""
        return self.base.can_generate() and self.base.get_output_embeddings() is not None and self._has_decoder

    @property
    def _has_decoder(self) -> bool:
        return self.backbone.is_encoder_decoder or self.backbone.is_decoder_only

    @property
    def places(self) -> dict[str, Tensor]:
        """The ``prompt_positions`` argument of a call; empty where the method places its virtual tokens itself."""
        if self.columns is None:
            return {}
        return {"prompt_positions": torch.tensor([list(self.columns)], device=self.device)}

    @property
    def places_in_longer(self) -> dict[str, Tensor]:
        """The same for a longer text: virtual tokens placed after the text stay behind its first three tokens."""
        prompt = self.adapter.prompt()
        if self.columns is not None or not prompt.after_text:
            return self.places
        return {"prompt_positions": torch.full((1, prompt.num_virtual_tokens), GIVEN, device=self.device)}

    def read(self, text: Tensor | None = None, **options: Any) -> Tensor:
        """Run the model on a text [1, T], by default the probe's, and return its outputs [T, V] or [V]."""
        options = {**self.places, **options}
        with evaluating(self.model):  # type: ignore[arg-type]
            return _answer(self.model(**self._call(self.text if text is None else text), **options))[0]

    def padded(self, side: str, run: Callable[..., Any]) -> Tensor:
        """Run a model on the text padded on one side, and return its outputs at the tokens of the text."""
        fill = torch.full((1, PADDING), self._padding, device=self.device)
        parts = (fill, self.text) if side == "left" else (self.text, fill)
        mask = torch.cat([torch.full_like(part, part is self.text) for part in parts], dim=1)
        options = dict(self.places) if run is self.model else self._positions(mask)
        if "prompt_positions" in options and side == "left":
            options["prompt_positions"] = options["prompt_positions"] + PADDING
        with evaluating(self.model), evaluating(self.base):  # type: ignore[arg-type]
            answer = _answer(run(**self._call(torch.cat(parts, dim=1), mask), **options))[0]
        is_by_token = len(self.expected) == self.text.shape[1] and len(answer) == mask.shape[1]
        return answer[mask[0] != 0] if is_by_token else answer

    def _positions(self, mask: Tensor) -> dict[str, Tensor]:
        """The ``position_ids`` that a user would pass to the base model with padded text; empty if it takes none."""
        takes_positions = "position_ids" in inspect.signature(self.base.forward).parameters
        if not (self.backbone.is_decoder_only and takes_positions):
            return {}
        positions = (mask.cumsum(1) - 1).clamp(min=0) + self.backbone.stacks[0].first_position
        return {"position_ids": positions}

    def differ(self, found: Tensor, expected: Tensor) -> str | None:
        """Describe how far two outputs differ; None where they differ only by rounding."""
        if found.shape != expected.shape:
            return f"shape {list(found.shape)} instead of {list(expected.shape)}"
        error = float((found.float() - expected.float()).abs().max())
        if error <= self.tolerance:
            return None
        return f"off by {error:.2g}, where the prompt moves the outputs by {self.moved:.2g}"

    @property
    def moved(self) -> float:
        """The largest change that the prompt makes to the base model's outputs."""
        if self.alone.shape != self.expected.shape:
            return 0.0
        return float((self.alone.float() - self.expected.float()).abs().max())

    def _strengthen(self) -> None:
        for _ in range(TRIES):
            if self.moved > 10 * self.tolerance:
                return
            with torch.no_grad():
                for parameter in self.adapter.trained.values():
                    parameter.mul_(STRONGER)
            self.alone = self.read()

    def _of_base(self) -> Tensor:
        with evaluating(self.base), model_session(self.base), reading_text(self.base):
            return _answer(self.base(**self._call(self.text)))[0]

    def _call(self, text: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The arguments of a forward."""
        call = {"input_ids": text, "attention_mask": torch.ones_like(text) if mask is None else mask}
        if self.backbone.compares_choices:
            return {name: x[:, None] for name, x in call.items()}
        if self.backbone.is_encoder_decoder and self.base.get_output_embeddings() is not None:
            call["decoder_input_ids"] = self.text[:, :GIVEN]
        return call

    def _text(self, length: int) -> Tensor:
        """Different token ids [1, T], none special; the last is the end-of-sequence token if a classifier reads it."""
        configs = (self.base.config, self.backbone.text_config)
        special = {token for config in configs for token in _special(config)}
        vocab_size = self.backbone.embedding.num_embeddings
        ids = [i for i in range(min(vocab_size, 1000)) if i not in special][2:] or [*range(vocab_size)]
        ids = (ids * length)[:: max(1, min(7, len(ids) // length))][:length]
        end = getattr(self.base.config, "eos_token_id", None)
        if self.backbone.labels_whole_texts and self.backbone.is_encoder_decoder and end is not None:
            ids[-1] = end[0] if isinstance(end, list) else end
        return torch.tensor([ids], device=self.device)

    @property
    def _padding(self) -> int:
        padding = getattr(self.backbone.text_config, "pad_token_id", None)
        return 0 if padding is None or padding < 0 else int(padding)


def _acts(probe: Probe) -> str | None:
    if probe.alone.shape != probe.expected.shape:
        return probe.differ(probe.alone, probe.expected)
    return None if probe.moved > probe.tolerance else "the outputs are the base model's"


def _padding(probe: Probe) -> Outcome | str:
    stack = probe.backbone.stacks[0]
    if stack.is_causal and stack.counts_unheard:
        return "its positions come from a table, and no argument says which"
    outcome: Outcome = None
    for side in ("right", "left"):
        how = probe.differ(probe.padded(side, probe.model), probe.alone)
        if how and not _base_differs(probe, side):
            return f"padded on the {side}, {how}"
        if how:
            outcome = NotAsked(f"padding on the {side} changes the base model's outputs too")
    return outcome


def _base_differs(probe: Probe, side: str) -> bool:
    """Whether padding changes the outputs of the base model alone, or raises an error in it."""
    try:
        return probe.differ(probe.padded(side, probe.base), probe.expected) is not None
    except Exception:
        return True


def _cache(probe: Probe) -> Outcome | str:
    """Check that greedy decoding with a cache gives the logits of one forward over the generated text."""
    return _unlike_base(probe, _generation_differs) if probe.writes else NO_TEXT


def _unlike_base(probe: Probe, differs: Callable[[Probe, Any], str | None]) -> Outcome | str:
    """Describe how the adapted model differs, if the base model alone does not."""
    how = differs(probe, probe.model)
    if how is None:
        return None
    try:
        return BASE_TOO if differs(probe, probe.base) else how
    except Exception:
        return BASE_TOO


def _generation_differs(probe: Probe, model: Any) -> str | None:
    given = probe.text[:, :GIVEN]
    places = probe.places if model is probe.model else {}
    with evaluating(probe.base), evaluating(model):
        written = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            **places,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=probe._padding,
        )
        found = torch.stack(written.logits, dim=1)[0]
        if probe.backbone.is_encoder_decoder:
            call = {"input_ids": given, "decoder_input_ids": written.sequences[:, :-1]}
        else:
            call = {"input_ids": written.sequences[:, :-1]}
            places = probe.places_in_longer if model is probe.model else {}
        whole = model(**call, **places, use_cache=False) if _has_use_cache(probe) else model(**call, **places)
    return probe.differ(found, _answer(whole)[0][-NEW:])


def _has_use_cache(probe: Probe) -> bool:
    return "use_cache" in probe.backbone.stacks[-1].signature.parameters


@contextmanager
def own_random_numbers(model: nn.Module) -> Iterator[None]:
    """Seed the random generators the same each time within the block, and restore their states after it."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta", "mps")}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices}:
            same_kind = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=same_kind, device_type=kind))
            for device in same_kind:
                getattr(torch, kind).set_rng_state(torch.Generator(device).manual_seed(0).get_state(), device)
        torch.default_generator.manual_seed(0)  # not torch's function, which seeds every accelerator for good
        yield


def _gradients(probe: Probe) -> Outcome | str:
    if any(parameter.is_inference() for parameter in probe.base.parameters()):
        return NotAsked("the base model's tensors are for inference alone")
    with without_gradient_checkpointing(probe.base):
        found = _gradients_of(probe)
    idle = probe.adapter.cut_off(without_gradient(found))
    return f"{idle[0]} gets no gradient, or zeros only, as do {len(idle) - 1} others of {len(found)}" if idle else None


def _gradients_of(probe: Probe) -> dict[str, Tensor | None]:
    """Compute the gradients of all trained tensors in a training step with a fixed loss."""
    trained = probe.adapter.trained
    mode = evaluating if any(stack.has_layerdrop for stack in probe.backbone.stacks) else training
    with own_random_numbers(probe.base), mode(probe.model), torch.enable_grad():  # type: ignore[arg-type]
        answer = _answer(probe.model(**probe._call(probe.text), **probe.places))
        if not answer.requires_grad:
            return dict.fromkeys(trained)
        weights = torch.linspace(0.5, 1.5, answer.numel(), device=answer.device).view(answer.shape)
        loss = (answer.float() * weights).square().mean()
        found = torch.autograd.grad(loss, [*trained.values()], allow_unused=True)
    return dict(zip(trained, found, strict=True))


def _checkpointing(probe: Probe) -> Outcome | str:
    """Check that gradient checkpointing gives the same gradients."""
    if not can_checkpoint(probe.base) or is_checkpointing(probe.base):
        return NotAsked("the base model has no checkpointing, or has it on")
    expected = _gradients_of(probe)
    enable_checkpointing(probe.base, use_reentrant=False)
    try:
        found = _gradients_of(probe)
    except Exception:
        if _base_checkpoints(probe):
            raise
        return BASE_TOO
    finally:
        disable_checkpointing(probe.base)
    for name, gradient in expected.items():
        recomputed = found[name]
        if gradient is not None and (
            recomputed is None or not torch.allclose(recomputed, gradient, rtol=1e-2, atol=1e-5)
        ):
            return f"the gradient of {name} is another"
    return None


def _base_checkpoints(probe: Probe) -> bool:
    """Whether forward and backward passes of the base model alone succeed with gradient checkpointing."""
    gradients = [(parameter, parameter.grad) for parameter in probe.base.parameters()]
    try:
        with training(probe.base), torch.enable_grad():
            _answer(probe.base(**probe._call(probe.text))).sum().backward()
    except Exception:
        return False
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return True


def _rows(probe: Probe) -> str | None:
    """Check that a row's outputs do not change beside a row of the base model."""
    with evaluating(probe.model):  # type: ignore[arg-type]
        call = {name: torch.cat([x, x]) for name, x in {**probe._call(probe.text), **probe.places}.items()}
        answer = _answer(probe.model(**call, adapter_names=[BASE, "probe"]))
    return probe.differ(answer[0], probe.expected) or probe.differ(answer[1], probe.alone)


def _steps(probe: Probe) -> Outcome | str:
    """Check that a step from a returned cache gives the outputs of one forward over the text."""
    if not probe.writes or probe.backbone.is_encoder_decoder:
        return NO_TEXT if not probe.writes else NotAsked("its decoder goes on from another sequence")
    return _unlike_base(probe, _step_differs)


def _step_differs(probe: Probe, model: Any) -> str | None:
    text, is_adapted = probe.text[:, : GIVEN + 1], model is probe.model
    with evaluating(probe.base), evaluating(model):
        begun = model(**probe._call(text[:, :GIVEN]), **(probe.places if is_adapted else {}), use_cache=True)
        call = {"input_ids": text[:, GIVEN:], "attention_mask": torch.ones_like(text), "cache": cache_of(begun)}
        found = _answer(model(**renamed(call, probe.base.forward), **(probe.places if is_adapted else {})))[0]
        whole = _answer(model(**probe._call(text), **(probe.places_in_longer if is_adapted else {})))[0]
    return probe.differ(found[-1:], whole[-1:])


def _frozen(probe: Probe) -> str | None:
    after = state_of(probe.base)
    changed = [name for name, value in probe.before.items() if after.get(name) != value]
    if not changed:
        return None
    if probe.numbers.issuperset(changed) and torch.equal(probe._of_base(), probe.expected):
        return None  # RWKV scales its weights in evaluation, and back in training
    return f"{changed[0]} has changed"


PROMISES = {
    "acts": Promise("the prompt moves the outputs", _acts),
    "padding": Promise("alone, padded left and padded right give the same outputs", _padding),
    "cache": Promise("cached decoding gives the outputs of one forward", _cache),
    "gradients": Promise("every trained tensor gets a gradient", _gradients),
    "rows": Promise("a row's outputs are its own beside the base model's", _rows, is_quick=False),
    "steps": Promise("steps by hand from a returned cache are those of one forward", _steps, is_quick=False),
    "checkpointing": Promise("activation checkpointing changes no gradient", _checkpointing, is_quick=False),
    "frozen": Promise("the base model is as it was", _frozen),
}
"""The promises by a short name, in the order in which they are checked."""


def outcomes(probe: Probe, names: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Check promises, by default all of them."""
    return {name: _outcome(probe, PROMISES[name]) for name in names or PROMISES}


def _outcome(probe: Probe, promise: Promise) -> Outcome:
    try:
        found = promise.check(probe)
    except SofttuneError as error:
        return Refused(str(error))
    except Exception as error:
        return Broken(f"{type(error).__name__}: {in_one_line(error)}")
    return Broken(found) if isinstance(found, str) else found


def _answer(output: Any) -> Tensor:
    """The tensor [B, T, V] or [B, V] by which an output is compared with another."""
    fields = {**output}
    named = [fields[name] for name in OUTPUTS if isinstance(fields.get(name), Tensor)]
    others = [x for x in fields.values() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1]
    answer: Tensor = [*named, *others][0]
    return answer


def state_of(model: nn.Module) -> State:
    """Record what must not change in a base model: its tensors, modes and hooks.

    FSDP2 writes sharded tensors anew whenever it gathers them, so that only what is trained of them is recorded.
    """
    sharded = is_sharded(model)
    tensors = {
        f"{name}{part}": value
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        for part, value in {
            "": None if tensor.is_inference() or sharded else tensor._version,
            "'s place": None if sharded else tensor.data_ptr(),
            "'s requires_grad": tensor.requires_grad,
        }.items()
    }
    modules = {
        f"{name or 'the model'}'s hooks or mode": (
            m.training,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            "forward" in vars(m),
        )
        for name, m in model.named_modules()
    }
    return tensors | modules


def _special(config: Any) -> set[int]:
    """The ids of special tokens in a config."""
    values = [v for name, v in vars(config).items() if name.endswith(("_token_id", "_token_index", "_token_ids"))]
    numbers = [x for v in values for x in (v if isinstance(v, (list, tuple)) else [v])]
    return {x for x in numbers if isinstance(x, int)}
