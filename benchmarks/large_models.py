"""The memory that training an adapter on a 70 B model takes on each of several GPUs, from the model's sizes alone.

``python benchmarks/large_models.py`` prints the table of docs/distributed.md. Nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

GPUS = 8
VIRTUAL_TOKENS = 30
ROWS, TOKENS = 8, 1024
"""Of a step, on each GPU."""
NF4_BYTES = 0.5 + 4 / 64
"""Of a weight: four bits, and a scale in fp32 for each 64."""
ADAM_BYTES = 16
"""Of a trained number: itself, its gradient and two averages, in fp32."""
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
    vocab_size=128256,
)


@dataclass(frozen=True)
class Sizes:
    """The numbers of a Llama without tied embeddings."""

    config: LlamaConfig

    @property
    def layer(self) -> int:
        """The weights of a layer, without its two norms."""
        width, states = self.config.hidden_size, self._states
        return 2 * width * width + 2 * width * states + 3 * width * self.config.intermediate_size

    @property
    def embeddings(self) -> int:
        """The weights of the input and output embeddings."""
        return 2 * self.config.vocab_size * self.config.hidden_size

    @property
    def norms(self) -> int:
        return (2 * self.config.num_hidden_layers + 1) * self.config.hidden_size

    @property
    def total(self) -> int:
        return self.config.num_hidden_layers * self.layer + self.embeddings + self.norms

    @property
    def prefix(self) -> int:
        """The trained numbers of a prefix."""
        return VIRTUAL_TOKENS * self.config.num_hidden_layers * 2 * self._states

    @property
    def _states(self) -> int:
        """The width of a token's keys, or of its values, in a layer."""
        return self.config.num_key_value_heads * self.config.hidden_size // self.config.num_attention_heads


def rows(sizes: Sizes) -> dict[str, tuple[float, float]]:
    """Gigabytes on each GPU by what takes them: with the base model sharded in bfloat16, and whole in 4 bits."""
    config = sizes.config
    quantized = config.num_hidden_layers * sizes.layer * NF4_BYTES + 2 * (sizes.embeddings + sizes.norms)
    kept = 2 * ROWS * TOKENS * config.hidden_size * config.num_hidden_layers
    trained = ADAM_BYTES * sizes.prefix
    return {
        "the base model": (2 * sizes.total / GPUS / 1e9, quantized / 1e9),
        "two layers that are gathered": (2 * 2 * sizes.layer / 1e9, 0),
        "the embeddings that are gathered": (2 * sizes.embeddings / 1e9, 0),
        f"the layers' inputs, {ROWS} rows of {TOKENS} tokens": (kept / 1e9, kept / 1e9),
        f"a prefix of {VIRTUAL_TOKENS} virtual tokens and its AdamW": (trained / 1e9, trained / 1e9),
    }


def table() -> str:
    sizes = Sizes(LLAMA_70B)
    lines = [f"| GB on each of {GPUS} GPUs | `fsdp: true`, bfloat16 | `quantization: bnb-4bit` |", "|---|---|---|"]
    found = rows(sizes)
    total = tuple(map(sum, zip(*found.values(), strict=True)))
    for name, pair in {**found, "together": total}.items():
        lines.append(f"| {name} | {pair[0]:.1f} | {pair[1]:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
