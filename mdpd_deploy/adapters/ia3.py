"""IA3 (T-Few, NeurIPS 2022): learned scales on keys, values and the MLP's inner units; peft's layers.

A fused query-key-value map gets one scale per output, so the queries are scaled too.
"""

from mdpd_deploy.adapters.layers import ADAPTER, LAYERS, Adapter, linear_layers
from mdpd_deploy.adapters.library import from_peft
from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import PeftConfig


@LAYERS.register("ia3")
class IA3(Adapter):
    """Scales keys and values, and what the MLP's second map reads; all scales start at 1."""

    default_lr = 3e-3  # T-Few's
    scales = ("ia3_l",)

    def __init__(self, backbone: Backbone, config: PeftConfig, *, random: bool) -> None:
        options, model = from_peft("IA3Config", "IA3Model")
        blocks = linear_layers(backbone)
        attention = [name for groups in blocks for name in groups[0][1:] or groups[0]]
        inner = [name for groups in blocks for name in groups[-1]]
        chosen = options(
            target_modules=attention + inner,
            feedforward_modules=inner,
            init_ia3_weights=not random,
        )
        model(backbone, chosen, ADAPTER)
