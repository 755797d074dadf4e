"""What computes virtual tokens, step by step: P-tuning's MLP and LSTM, and the MLP behind a prefix."""
# ruff: noqa: F722

from collections.abc import Callable

import torch
from beartype import beartype
from jaxtyping import Float, jaxtyped
from torch import Tensor

checked = jaxtyped(typechecker=beartype)


@checked
def virtual_tokens(state: dict[str, Tensor]) -> Float[Tensor, "P _"]:
    """The virtual tokens of trained tensors by name: the embedding alone, or what stands behind it."""
    tokens = state["embedding.weight"]
    if "lstm_head.weight_ih_l0" in state:
        tokens = lstm(tokens, state)
    tokens = mlp(tokens, state, "mlp_head.", torch.relu)
    return mlp(tokens, state, "transform.", torch.tanh)


@checked
def mlp(
    tokens: Float[Tensor, "P _"], state: dict[str, Tensor], name: str, bend: Callable[[Tensor], Tensor]
) -> Float[Tensor, "P _"]:
    """Linear layers, with ``bend`` between one and the next; none where the state has none of that name."""
    numbers = sorted({int(key.removeprefix(name).split(".")[0]) for key in state if key.startswith(name)})
    for number in numbers:
        tokens = bend(tokens) if number > numbers[0] else tokens
        tokens = tokens @ state[f"{name}{number}.weight"].T + state[f"{name}{number}.bias"]
    return tokens


@checked
def lstm(tokens: Float[Tensor, "P _"], state: dict[str, Tensor]) -> Float[Tensor, "P _"]:
    """Layer after layer, each read from both ends."""
    layer = 0
    while f"lstm_head.weight_ih_l{layer}" in state:
        forth = one_way(tokens, state, f"l{layer}")
        back = one_way(tokens.flip(0), state, f"l{layer}_reverse").flip(0)
        tokens, layer = torch.cat([forth, back], dim=1), layer + 1
    return tokens


@checked
def one_way(tokens: Float[Tensor, "P _"], state: dict[str, Tensor], layer: str) -> Float[Tensor, "P _"]:
    """Hochreiter & Schmidhuber 1997, with the gates in torch's order: input, forget, cell, output."""
    into, onto = (state[f"lstm_head.{part}_{layer}"] for part in ("weight_ih", "weight_hh"))
    bias = state[f"lstm_head.bias_ih_{layer}"] + state[f"lstm_head.bias_hh_{layer}"]
    hidden = memory = torch.zeros(onto.shape[1])
    outputs = []
    for token in tokens:
        enter, keep, new, show = (into @ token + onto @ hidden + bias).chunk(4)
        memory = keep.sigmoid() * memory + enter.sigmoid() * new.tanh()
        hidden = show.sigmoid() * memory.tanh()
        outputs.append(hidden)
    return torch.stack(outputs)
