"""LoRA (ICLR 2022): W + (alpha / r) B A, with A [r, in] and B [out, r] trained; peft's layers."""

from typing import TYPE_CHECKING

from mdpd_deploy.adapters.layers import ADAPTER, LAYERS, low_rank_targets
from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import PeftConfig

if TYPE_CHECKING:
    from peft import LoraModel


@LAYERS.register("lora")
def lora(backbone: Backbone, config: PeftConfig, *, random: bool) -> "LoraModel":
    """Add B A to the chosen linear layers; B starts at 0."""
    from peft import LoraConfig, LoraModel

    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=low_rank_targets(backbone, config),
        init_lora_weights=not random,
    )
    return LoraModel(backbone, options, ADAPTER)
