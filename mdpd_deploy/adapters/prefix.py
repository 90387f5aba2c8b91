"""Prefix tuning (ACL 2021; on encoders P-tuning v2, ACL 2022): T trained keys and values per block.

peft's `PrefixEncoder` without its reparameterising MLP. Queries of the real tokens read the prefix;
it has none of its own, so nothing of it is pooled.
"""

from typing import Any

import torch
from torch import Tensor

from mdpd_deploy.adapters.library import from_peft
from mdpd_deploy.adapters.tokens import TOKENS, VirtualTokens
from mdpd_deploy.backbones.base import Backbone, Inputs
from mdpd_deploy.backbones.wrap import Call, Forward, Trace
from mdpd_deploy.config import PeftConfig
from mdpd_deploy.errors import UserError


@TOKENS.register("prefix")
class Prefix(VirtualTokens):
    """Keys and values [L, 2, heads, T, D / heads] before those of every block; text only."""

    default_lr = 1e-2  # of P-tuning v2 for BERT on RTE, and of peft's example on MRPC

    def __init__(self, backbone: Backbone, config: PeftConfig) -> None:
        if not backbone.takes_prefix:
            raise UserError(
                f"--method prefix: the attention of {backbone.source.name} takes no further keys "
                "and values, as that of BERT and RoBERTa does; use --method prompt."
            )
        encoder, options = from_peft("PrefixEncoder", "PrefixTuningConfig")
        super().__init__(backbone, config)
        chosen = options(
            num_virtual_tokens=config.tokens,
            token_dim=backbone.width,
            num_layers=backbone.depth,
        )
        self.prefix = encoder(chosen)  # standard normal, as peft's default

    def forward(self, backbone: Backbone, inputs: Inputs) -> Tensor:
        trace = self.trace(backbone, inputs, keep_taps=False)
        return backbone.finish(trace.ends[-1], trace.mask)

    def trace(self, backbone: Backbone, inputs: Inputs, *, keep_taps: bool = True) -> Trace:
        """Run the backbone with the prefix."""
        shape = (self.count, backbone.depth, 2, backbone.heads, backbone.width // backbone.heads)
        pairs = self.prefix(self.positions).view(shape).permute(1, 2, 3, 0, 4)

        def run(index: int, forward: Forward, call: Call) -> Any:
            keys, values = pairs[index].unbind()
            call = call.replaced(forward, past_key_values=Before(keys, values))
            return call.of(forward, call.x)

        mask = self.extend(backbone.token_mask(inputs))
        return backbone.trace(inputs, run=run, mask=mask, keep_taps=keep_taps)


class Before:
    """What a block's attention asks of a transformers cache: keys and values from before.

    Args:
        keys: [heads, T, D / heads], the same for every example.
        values: As `keys`.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.before = (keys, values)

    def update(self, keys: Tensor, values: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        """Put the given keys and values before the block's own [B, heads, N, D / heads]."""
        wide = [
            torch.cat([first.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], dim=2)
            for first, own in zip(self.before, (keys, values), strict=True)
        ]
        return wide[0], wide[1]
