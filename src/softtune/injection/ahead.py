"""Runs virtual tokens in front of a text once, ahead of it, instead of once for every row.

In a decoder whose every layer attends, a later token takes nothing from earlier ones but their keys and values, and
those do not depend on what follows. So vectors in front of the text are a prefix: the same outputs and gradients, but
visible beyond sliding windows, and at home in every cache that a prefix is at home in.
"""

from __future__ import annotations

from softtune.backbone import Backbone
from softtune.methods.base import KeyValue, Prompt


def run_ahead(backbone: Backbone, prompt: Prompt) -> Prompt:
    """The same prompt, as a prefix where it can be one: not where the layers that it meets are left to chance."""
    if prompt.vectors is None or prompt.after_text or not backbone.runs_ahead or backbone.stacks[0].drops_layers:
        return prompt
    computed = backbone.keys_of_vectors(prompt.vectors)
    return Prompt(
        num_virtual_tokens=prompt.num_virtual_tokens,
        prefixes={place: KeyValue(*pair) for place, pair in computed.items()},
    )
