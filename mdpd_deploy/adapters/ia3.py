"""IA3 (T-Few, NeurIPS 2022): learned scales on keys, values and the MLP's inner units; peft's layers.

A fused query-key-value map gets one scale per output, so the queries are scaled too.
"""

from typing import TYPE_CHECKING

from mdpd_deploy.adapters.layers import ADAPTER, LAYERS, linear_layers
from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import PeftConfig

if TYPE_CHECKING:
    from peft import IA3Model


@LAYERS.register("ia3")
def ia3(backbone: Backbone, config: PeftConfig, *, random: bool) -> "IA3Model":
    """Scale keys and values, and what the MLP's second map reads; all scales start at 1."""
    from peft import IA3Config, IA3Model

    blocks = linear_layers(backbone)
    attention = [name for groups in blocks for name in groups[0][1:] or groups[0]]
    inner = [name for groups in blocks for name in groups[-1]]
    options = IA3Config(
        target_modules=attention + inner,
        feedforward_modules=inner,
        init_ia3_weights=not random,
    )
    return IA3Model(backbone, options, ADAPTER)
