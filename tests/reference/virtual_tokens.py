"""Virtual tokens at the input: concatenated by hand, and sliced out of the outputs by hand."""
# ruff: noqa: F722

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor
from transformers import PreTrainedModel

checked = jaxtyped(typechecker=beartype)


@checked
def arrange(
    words: Float[Tensor, "T D"], vectors: Float[Tensor, "P D"], columns: list[int]
) -> tuple[Float[Tensor, "S D"], list[int]]:
    """The sequence with each virtual token before its column, and the slot of every token."""
    sequence, slots = [], []
    for t in range(len(words) + 1):
        sequence += [vector for vector, column in zip(vectors, columns, strict=True) if column == t]
        if t < len(words):
            slots.append(len(sequence))
            sequence.append(words[t])
    return torch.stack(sequence), slots


@checked
def causal(
    model: PreTrainedModel, ids: Int[Tensor, " T"], vectors: Float[Tensor, "P D"], columns: list[int]
) -> Float[Tensor, "T V"]:
    """Logits for each token: those at the slot before the next token's, for the last token at the last slot."""
    sequence, slots = arrange(model.get_input_embeddings()(ids), vectors, columns)
    logits = model(inputs_embeds=sequence[None]).logits[0]
    return torch.stack([logits[slot - 1] for slot in [*slots[1:], len(sequence)]])


@checked
def whole(
    model: PreTrainedModel,
    ids: Int[Tensor, " T"],
    vectors: Float[Tensor, "P D"],
    columns: list[int],
    decoder_ids: Int[Tensor, " U"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "..."]:
    """Logits of a model whose outputs do not stand for input tokens: [labels] of a classifier, [U, V] of a decoder.

    ``scale`` is what the model multiplies words with that it looks up by itself, and no vectors.
    """
    sequence, _ = arrange(model.get_input_embeddings()(ids) * scale, vectors, columns)
    decoder = {} if decoder_ids is None else {"decoder_input_ids": decoder_ids[None]}
    return model(inputs_embeds=sequence[None], **decoder).logits[0]
