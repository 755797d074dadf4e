"""Slow, obvious implementations of what softtune does, to compare with. Nothing here uses softtune's code.

One unpadded row at a time. Letters: T tokens, U tokens of a decoder, P virtual tokens, S slots, D hidden size,
V vocabulary, H key/value heads, K head size, W numbers of one virtual token over all layers.
"""
