"""What the library peft adds to a backbone: layers that merge into it, and tokens that stay.

Adding one is one file here, an import below, a method in `train/methods/`, and a row in the tests.
peft itself is imported where one of them is built, and nowhere else.
"""

from mdpd_deploy.adapters import adalora, ia3, lora, prefix, prompt
from mdpd_deploy.adapters.layers import LAYERS, adapted_weights, inject, merged_weights
from mdpd_deploy.adapters.tokens import TOKENS, VirtualTokens, build_tokens

__all__ = [
    "LAYERS",
    "TOKENS",
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
