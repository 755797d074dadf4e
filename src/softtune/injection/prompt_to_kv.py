"""Computes the keys and values of virtual tokens in front of a text once, instead of once for every row.

In a decoder whose every layer attends, a later token takes nothing from earlier ones but their keys and values, and
those do not depend on what follows. So vectors in front of the text are equivalent to a prefix, with the same outputs
and gradients. A prefix is also visible beyond sliding windows, and works with all caches that take prefixes.
"""

from __future__ import annotations

from softtune.backbone import Backbone
from softtune.methods.prompt import KeyValue, Prompt


def prompt_to_kv(backbone: Backbone, prompt: Prompt) -> Prompt:
    """Turn a prompt's vectors into a prefix. Where they cannot be one, layers are dropped at random, or the prompt has
    more than vectors, which would change their keys and values, it is returned as it is."""
    if (
        prompt.vectors is None
        or prompt.after_text
        or prompt.prefixes
        or prompt.additions
        or prompt.scalings
        or prompt.terms
        or not backbone.is_pure_attention_decoder
        or backbone.stacks[0].drops_layers
    ):
        return prompt
    computed = backbone.keys_of_vectors(prompt.vectors)
    return Prompt(
        num_virtual_tokens=prompt.num_virtual_tokens,
        prefixes={place: KeyValue(*pair) for place, pair in computed.items()},
    )
