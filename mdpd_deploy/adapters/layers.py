"""Adapter layers of peft inside a backbone's blocks, and their merging.

A layer of peft wraps a linear layer of the backbone in place: `….query` becomes
`….query.base_layer` beside `….query.lora_A` and so on. The backbone keeps its interface, so
whatever runs it runs it adapted. Merging gives the weights back under their plain names.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mdpd_deploy.adapters.library import from_peft
from mdpd_deploy.backbones.base import Backbone, Layered
from mdpd_deploy.backbones.held import let_go
from mdpd_deploy.config import PeftConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.registry import Registry

ADAPTER = "default"  # peft's name of the only adapter


class Adapter(ABC):
    """Layers of peft that wrap linear layers of a backbone, in place.

    Their parameters are then the only ones of the backbone that ask for a gradient. The first
    output is the bare backbone's, unless `random` asks for values that change it, as training does.

    Attributes:
        default_lr: Peak learning rate, unless `optim.lr` names one.
        options: Those of the section `peft` that it reads.
        scales: What is in the names of its scales; they get no weight decay, though peft keeps
            them as columns.
        penalty_names: Names of its `penalties`.
    """

    default_lr: ClassVar[float]
    options: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[str, ...]] = ()
    penalty_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __init__(self, backbone: Backbone, config: PeftConfig, *, random: bool) -> None: ...

    # --- what training asks of it; most need none of this ---------------------------------------

    def penalties(self) -> dict[str, Tensor]:
        """Return losses of its own by name, each a scalar with its graph."""
        return {}

    def after_step(self, step: int, steps: int) -> None:  # noqa: B027
        """Do what follows an optimiser step (0-based, of `steps`); gradients are still in place."""

    def may_deploy(self, step: int, steps: int) -> bool:
        """Whether the weights after `step` of `steps` steps can be the best ones."""
        return True

    def extra_state(self) -> dict[str, Tensor]:
        """Return what training must know to go on and the backbone does not hold, by name."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Put `extra_state` of an equal adapter back."""


LAYERS: Registry[type[Adapter]] = Registry("adapter")


QUERY_OR_VALUE = (
    *("query", "value", "q_proj", "v_proj", "query_proj", "value_proj", "q_lin", "v_lin"),
    *("q", "v", "to_q", "to_v", "qkv", "in_proj", "Wqkv"),
)


def inject(backbone: Backbone, name: str, config: PeftConfig, *, random: bool = False) -> Adapter:
    """Put the adapter `name` into a backbone, in place.

    Raises:
        UserError: If the installed peft does not have it, or the backbone has no layers for it.
    """
    adapter = LAYERS.get_or_raise(name)(backbone, config, random=random)
    if not isinstance(backbone, Layered):
        _check_called(backbone, name)
    return adapter


def linear_layers(backbone: Backbone) -> list[tuple[tuple[str, ...], ...]]:
    """Return the full names of every block's linear layers, in the groups of `Layered.layers`.

    Each block gives four groups: the attention's input (query, key and value, or one fused map),
    its output, and the two maps of the MLP.

    Raises:
        UserError: If which layer is which is not known.
    """
    if not isinstance(backbone, Layered):
        raise UserError(
            f"{backbone.source.name}: which of its layers make keys and values is not known; use "
            "--method lora or adalora, which take any linear layer."
        )
    names = {id(module): name for name, module in backbone.named_modules()}
    return [
        tuple(
            tuple(f"{names[id(backbone.blocks()[index])]}.{path}" for path in layer.paths)
            for layer in backbone.layers(index)
            if layer.linear
        )
        for index in range(backbone.depth)
    ]


def low_rank_targets(backbone: Backbone, config: PeftConfig) -> list[str]:
    """Return the layers that LoRA and AdaLoRA update, as `peft.targets` says.

    "attention" is query and value, the choice of the LoRA paper and peft's default; a fused map
    holds the key too. Where no layers are declared, they are told by their names.

    Raises:
        UserError: If there are none.
    """
    if not isinstance(backbone, Layered):
        return _found_targets(backbone, config.targets)
    blocks = linear_layers(backbone)
    if config.targets == "all":
        return [name for groups in blocks for group in groups for name in group]
    return [name for groups in blocks for name in groups[0][::2]]


def _found_targets(backbone: Backbone, targets: str) -> list[str]:
    """Return the linear layers of the blocks; with `attention` those named as query and value."""
    inside = {module for block in backbone.blocks() for module in block.modules()}
    found = [
        name
        for name, module in backbone.named_modules()
        if type(module) is nn.Linear
        and module in inside
        and (targets == "all" or name.rpartition(".")[2] in QUERY_OR_VALUE)
    ]
    if not found:
        what = "linear layers" if targets == "all" else "queries and values known by their names"
        other = "" if targets == "all" else "set peft.targets=all, or "
        raise UserError(
            f"--method lora, adalora: the blocks of {backbone.source.name} have no {what}; "
            f"{other}use --method norms, bitfit, full or probe."
        )
    return found


@torch.no_grad()
def _check_called(backbone: Backbone, name: str) -> None:
    """Refuse an adapter beside a layer whose weight the backbone reads past the layer."""
    called = set()
    layers = dict(_wrapped(backbone))
    hooks = [
        layer.register_forward_pre_hook(lambda own, _: called.add(own)) for layer in layers.values()
    ]
    backbone(backbone.example_inputs(2))
    for hook in hooks:
        hook.remove()
    idle = [path for path, layer in layers.items() if layer not in called]
    if idle:
        raise UserError(
            f"--method {name}: {backbone.source.name} reads the weight of {idle[0]} "
            "without calling the layer, so that nothing can be added to it; use another method."
        )


def adapted_weights(backbone: Backbone) -> dict[str, nn.Parameter]:
    """Return what merging changes, as it is before: plain name in the backbone → parameter.

    That is the weight of every wrapped layer, and its bias where the adapter scales the layer's
    output (IA3 on keys and values).
    """
    found: dict[str, nn.Parameter] = {}
    for path, layer in _wrapped(backbone):
        for name, parameter in layer.get_base_layer().named_parameters():
            if _is_changed(layer, name):
                found[f"{path}.{name}"] = parameter
    return found


def _is_changed(layer: Any, name: str) -> bool:
    return name == "weight" or getattr(layer, "is_feedforward", None) is False


def merged_weights(
    backbone: Backbone, original: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return `adapted_weights` after merging, in float32.

    peft merges a copy of each layer; the backbone stays as it is.

    Args:
        backbone: With the adapter in it.
        original: The bare backbone's weights by name, where the backbone holds them rounded.
    """
    found = {}
    for path, layer in _wrapped(backbone):
        merged = copy.deepcopy(layer).float()
        let_go(merged.get_base_layer())
        if original is not None:
            for name, parameter in merged.get_base_layer().named_parameters():
                parameter.data.copy_(original[f"{path}.{name}"])
        merged.merge()
        for name, value in merged.get_base_layer().named_parameters():
            if _is_changed(layer, name):
                found[f"{path}.{name}"] = value.detach()
    return found


def _wrapped(backbone: Backbone) -> Iterator[tuple[str, Any]]:
    (wrapper,) = from_peft("BaseTunerLayer", module="peft.tuners.tuners_utils")
    for path, layer in backbone.named_modules():
        if isinstance(layer, wrapper):
            yield path, layer
