"""Rivals of the library peft: layers inside a backbone's blocks, and virtual tokens.

One file each; adding one is a file and an import here: the training method, the rivals of a
benchmark and the shared tests follow from the registries. peft is imported where one of them is
built, and nowhere else.
"""

from mdpd_deploy.adapters import adalora, ia3, lora, prefix, prompt
from mdpd_deploy.adapters.layers import LAYERS, Adapter, adapted_weights, inject, merged_weights
from mdpd_deploy.adapters.tokens import TOKENS, VirtualTokens, build_tokens

__all__ = [
    "LAYERS",
    "TOKENS",
    "Adapter",
    "VirtualTokens",
    "adalora",
    "adapted_weights",
    "build_tokens",
    "ia3",
    "inject",
    "lora",
    "merged_weights",
    "prefix",
    "prompt",
]
