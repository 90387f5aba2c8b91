"""LoRA (ICLR 2022): W + (alpha / r) B A, with A [r, in] and B [out, r] trained; peft's layers."""

from mdpd_deploy.adapters.layers import ADAPTER, LAYERS, Adapter, low_rank_targets
from mdpd_deploy.adapters.library import from_peft
from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import PeftConfig


@LAYERS.register("lora")
class Lora(Adapter):
    """Adds B A to the chosen linear layers; B starts at 0."""

    default_lr = 5e-4  # of the paper's RoBERTa-base on GLUE: 4e-4 to 5e-4
    options = ("rank", "alpha", "dropout", "targets")

    def __init__(self, backbone: Backbone, config: PeftConfig, *, random: bool) -> None:
        options, model = from_peft("LoraConfig", "LoraModel")
        chosen = options(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=low_rank_targets(backbone, config),
            init_lora_weights=not random,
        )
        model(backbone, chosen, ADAPTER)
