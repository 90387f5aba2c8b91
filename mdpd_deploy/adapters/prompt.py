"""Prompt tuning (EMNLP 2021): T trained tokens before those of the input; peft's `PromptEmbedding`.

On a vision backbone this is VPT-shallow (ECCV 2022). The tokens enter at b_0, past the embedding's
norm and positions, so that real tokens keep theirs; peft itself puts them before the embedding of
positions, which moves every real token by T.
"""

import torch
from torch import Tensor

from mdpd_deploy.adapters.library import from_peft
from mdpd_deploy.adapters.tokens import TOKENS, VirtualTokens
from mdpd_deploy.backbones.base import Backbone, Inputs
from mdpd_deploy.config import PeftConfig


@TOKENS.register("prompt")
class Prompt(VirtualTokens):
    """Tokens [T, D] that pass through every block and are dropped before the pooling."""

    default_lr = 3e-2  # of peft's examples; the paper's 0.3 is Adafactor's

    def __init__(self, backbone: Backbone, config: PeftConfig) -> None:
        embedding, options = from_peft("PromptEmbedding", "PromptTuningConfig")
        super().__init__(backbone, config)
        chosen = options(
            num_virtual_tokens=config.tokens,
            token_dim=backbone.width,
            num_transformer_submodules=1,
        )
        self.prompt = embedding(chosen, None)  # standard normal, as peft's default

    def forward(self, backbone: Backbone, inputs: Inputs) -> Tensor:
        x, mask = backbone.embed(inputs), backbone.token_mask(inputs)
        prompt = self.prompt(self.positions).to(x.dtype)
        x = torch.cat([prompt.expand(x.shape[0], -1, -1), x], dim=1)  # [B, T + N, D]
        wide = self.extend(mask)
        for index in range(backbone.depth):
            x = backbone.run_block(index, x, wide)
        return backbone.finish(x[:, self.count :], mask)
