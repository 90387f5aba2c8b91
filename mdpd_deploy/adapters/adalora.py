"""AdaLoRA (ICLR 2023): W + P Λ Q, whose singular values Λ are pruned to a budget; peft's layers.

Every layer starts with 1.5 × `peft.rank` triplets, as in the paper, and keeps `peft.rank` of them
on average. When which are dropped is training's business (`train/methods/adalora.py`).
"""

import math
from typing import TYPE_CHECKING

from mdpd_deploy.adapters.layers import ADAPTER, LAYERS, low_rank_targets
from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import PeftConfig

if TYPE_CHECKING:
    from peft import AdaLoraModel


@LAYERS.register("adalora")
def adalora(backbone: Backbone, config: PeftConfig, *, random: bool) -> "AdaLoraModel":
    """Add P Λ Q to the chosen linear layers; Λ starts at 0."""
    from peft import AdaLoraConfig, AdaLoraModel

    options = AdaLoraConfig(
        init_r=math.ceil(1.5 * config.rank),
        target_r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=low_rank_targets(backbone, config),
        init_lora_weights=not random,
        total_step=1,  # peft asks for a number; the schedule is set when the run's length is known
    )
    return AdaLoraModel(backbone, options, ADAPTER)
