"""First weights of a thinner network: the most important units of the backbone's own layers.

Source: LST (NeurIPS 2022), section 3.3 and its released "fisher-v2". The network is walked in
forward order. Each layer drops the inputs that the layer before it dropped, then keeps the outputs
with the largest ℓ1 norm of importance; query, key and value keep the same outputs, chosen by the
product of their importances. The chain is sequential: the units of the residual stream differ
from layer to layer, as in the released code.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Layer, Thinnable
from mdpd_deploy.sides.base import Importance


@torch.no_grad()
def copy_largest(
    backbone: Thinnable,
    blocks: Sequence[nn.Module] | nn.ModuleList,
    final_norm: nn.Module | None,
    importance: Importance,
) -> None:
    """Copy the kept units of the backbone's layers into thin blocks.

    Args:
        backbone: Its weights are read.
        blocks: One block of `Thinnable.thin_block` per backbone block; their weights are replaced.
        final_norm: A norm of the thin width, which takes the final norm's kept units; or None.
        importance: `torch.abs` (magnitude), or squared gradients (Fisher).
    """
    weight, axis = backbone.embedding_weight()
    scores = importance(weight).movedim(axis, 0).flatten(1).sum(dim=1)
    keep = largest(scores, thin_width(blocks[0], backbone.layers(0)))
    for index, thin in enumerate(blocks):
        block = backbone.blocks()[index]
        for layer in backbone.layers(index):
            keep = _copy_layer(block, thin, layer, keep, importance)
    norm = backbone.final_norm()
    if final_norm is not None and norm is not None:
        _copy_units(norm, final_norm, keep)


def thin_width(block: nn.Module, layers: Sequence[Layer]) -> int:
    """Return d of a thin block."""
    norm = next(layer for layer in layers if not layer.linear)
    weight = block.get_submodule(norm.paths[0]).weight
    assert isinstance(weight, Tensor)
    return len(weight)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` largest scores, ascending; equals in order."""
    return scores.float().argsort(descending=True, stable=True)[:count].sort().values


def _copy_layer(
    block: nn.Module, thin: nn.Module, layer: Layer, keep: Tensor, importance: Importance
) -> Tensor:
    """Copy one layer; return the units that it keeps."""
    if not layer.linear:
        _copy_units(block.get_submodule(layer.paths[0]), thin.get_submodule(layer.paths[0]), keep)
        return keep
    olds = [_linear(block, path) for path in layer.paths]
    news = [_linear(thin, path) for path in layer.paths]
    product: Any = 1
    for old in olds:
        for map_ in importance(old.weight)[:, keep].chunk(layer.stacked):
            product = product * _unit_mean(map_)
    outputs = olds[0].out_features // layer.stacked
    kept = largest(product.sum(dim=1), news[0].out_features // layer.stacked)
    rows = torch.cat([kept + outputs * part for part in range(layer.stacked)])
    for old, new in zip(olds, news, strict=True):
        new.weight.copy_(old.weight[rows][:, keep])
        if new.bias is not None:
            new.bias.copy_(old.bias[rows])
    return kept


def _unit_mean(importance: Tensor) -> Tensor:
    """Scale to mean 1, which orders products as before and keeps them from underflowing."""
    return importance.float() / importance.float().mean().clamp_min(1e-30)


def _copy_units(old: nn.Module, new: nn.Module, keep: Tensor) -> None:
    """Copy a norm; where the old one has no shift (RMSNorm), that of the new one stays 0."""
    targets = dict(new.named_parameters())
    for name, source in old.named_parameters():
        targets[name].copy_(source[keep])


def _linear(module: nn.Module, path: str) -> nn.Linear:
    found = module.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found
