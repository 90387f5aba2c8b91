"""Adapter layers of peft inside a backbone's blocks, and their merging.

A layer of peft wraps a linear layer of the backbone in place: `….query` becomes
`….query.base_layer` beside `….query.lora_A` and so on. The backbone keeps its interface, so
whatever runs it runs it adapted. Merging gives the weights back under their plain names.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import PeftConfig
from mdpd_deploy.registry import Registry

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner

ADAPTER = "default"  # peft's name of the only adapter


class Inject(Protocol):
    """Wraps linear layers of a backbone in place.

    The adapter's parameters are then the only ones that ask for a gradient. The first output is
    the bare backbone's, unless `random` asks for values that change it, as a trained adapter does.
    """

    def __call__(self, backbone: Backbone, config: PeftConfig, *, random: bool) -> "BaseTuner": ...


LAYERS: Registry[Inject] = Registry("adapter")


def inject(
    backbone: Backbone, name: str, config: PeftConfig, *, random: bool = False
) -> "BaseTuner":
    """Put the adapter `name` into a backbone, in place; returns peft's handle on it."""
    return LAYERS.get_or_raise(name)(backbone, config, random=random)


def linear_layers(backbone: Backbone) -> list[tuple[tuple[str, ...], ...]]:
    """Return the full names of every block's linear layers, in the groups of `Backbone.layers`.

    Each block gives four groups: the attention's input (query, key and value, or one fused map),
    its output, and the two maps of the MLP.
    """
    names = {id(module): name for name, module in backbone.named_modules()}
    return [
        tuple(
            tuple(f"{names[id(backbone.block(index))]}.{path}" for path in layer.paths)
            for layer in backbone.layers(index)
            if layer.linear
        )
        for index in range(backbone.depth)
    ]


def low_rank_targets(backbone: Backbone, config: PeftConfig) -> list[str]:
    """Return the layers that LoRA and AdaLoRA update, as `peft.targets` says.

    "attention" is query and value, the choice of the LoRA paper and peft's default; a fused map
    holds the key too.
    """
    blocks = linear_layers(backbone)
    if config.targets == "all":
        return [name for groups in blocks for group in groups for name in group]
    return [name for groups in blocks for name in groups[0][::2]]


def adapted_weights(backbone: Backbone) -> dict[str, nn.Parameter]:
    """Return what merging changes, as it is before: plain name in the backbone → parameter.

    That is the weight of every wrapped layer, and its bias where the adapter scales the layer's
    output (IA3 on keys and values).
    """
    found: dict[str, nn.Parameter] = {}
    for path, layer in _wrapped(backbone):
        scales_output = getattr(layer, "is_feedforward", None) is False
        for name, parameter in layer.get_base_layer().named_parameters():
            if name == "weight" or scales_output:
                found[f"{path}.{name}"] = parameter
    return found


def merged_weights(
    backbone: Backbone, original: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return `adapted_weights` after merging, in float32.

    peft merges a copy of each layer; the backbone stays as it is.

    Args:
        backbone: With the adapter in it.
        original: The bare backbone's weights by name, where the backbone holds them rounded.
    """
    changed = adapted_weights(backbone)
    found = {}
    for path, layer in _wrapped(backbone):
        merged = copy.deepcopy(layer).float()
        if original is not None:
            for name, parameter in merged.get_base_layer().named_parameters():
                parameter.data.copy_(original[f"{path}.{name}"])
        merged.merge()
        for name, value in merged.get_base_layer().named_parameters():
            if f"{path}.{name}" in changed:
                found[f"{path}.{name}"] = value.detach()
    return found


def _wrapped(backbone: Backbone) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in backbone.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield path, layer
