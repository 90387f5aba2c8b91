"""Prompt tuning (EMNLP 2021): T trained tokens before those of the input; peft's `PromptEmbedding`.

On a vision backbone this is VPT-shallow (ECCV 2022). The tokens enter at b_0, past the embedding's
norm and positions, so that real tokens keep theirs; peft itself puts them before the embedding of
positions, which moves every real token by T.
"""

from typing import Any

import torch
from torch import Tensor

from mdpd_deploy.adapters.library import from_peft
from mdpd_deploy.adapters.tokens import TOKENS, VirtualTokens
from mdpd_deploy.backbones.base import Backbone, Inputs
from mdpd_deploy.backbones.wrap import Call, Forward
from mdpd_deploy.config import PeftConfig
from mdpd_deploy.errors import UserError


@TOKENS.register("prompt")
class Prompt(VirtualTokens):
    """Tokens [T, D] that pass through every block and are dropped before the pooling."""

    default_lr = 3e-2  # of peft's examples; the paper's 0.3 is Adafactor's

    def __init__(self, backbone: Backbone, config: PeftConfig) -> None:
        if not backbone.takes_prompt:
            raise UserError(
                f"--method prompt: the blocks of {backbone.source.name} tell the positions of its own "
                "tokens apart and take no others; use --method lora."
            )
        embedding, options = from_peft("PromptEmbedding", "PromptTuningConfig")
        super().__init__(backbone, config)
        chosen = options(
            num_virtual_tokens=config.tokens,
            token_dim=backbone.width,
            num_transformer_submodules=1,
        )
        self.prompt = embedding(chosen, None)  # standard normal, as peft's default

    def forward(self, backbone: Backbone, inputs: Inputs) -> Tensor:
        def run(index: int, forward: Forward, call: Call) -> Any:
            return call.of(forward, self._before(call.x) if index == 0 else call.x)

        mask = self.extend(backbone.token_mask(inputs))
        trace = backbone.trace(inputs, run=run, mask=mask, keep_taps=False)
        return backbone.finish(trace.ends[-1][:, self.count :], trace.mask)

    def _before(self, x: Tensor) -> Tensor:
        """Put the tokens before x [B, N, D]: [B, T + N, D]."""
        prompt = self.prompt(self.positions).to(x.dtype)
        return torch.cat([prompt.expand(x.shape[0], -1, -1), x], dim=1)
