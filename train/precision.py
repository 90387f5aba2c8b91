"""Frozen weights held in bfloat16; norms, and what is trained, kept in float32.

Autocast over a frozen backbone would make an uncached bfloat16 copy of every weight at every use;
holding the weights in bfloat16 halves weights and taps instead. A norm's scale is near 1, where
bfloat16 steps are 0.4 %, so the tuned norms stay float32 and compute in float32.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.errors import UserError


class Float32Norm(nn.LayerNorm):
    """A LayerNorm of float32 parameters that takes and returns another dtype."""

    def forward(self, input: Tensor) -> Tensor:
        normed = F.layer_norm(
            input.float(), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return normed.to(input.dtype)


def hold_in_bfloat16(backbone: Backbone, trained: Iterable[nn.Parameter] = ()) -> None:
    """Convert the frozen weights in place; norms keep their values in float32.

    Args:
        backbone: Its norms and frozen weights become new tensors.
        trained: Further parameters of it that stay as they are.
    """
    kept = {name: p.detach().clone() for name, p in backbone.norms().items()}
    _convert(backbone, torch.bfloat16, {id(parameter) for parameter in trained})
    for path in sorted({name.rpartition(".")[0] for name in kept}):
        norm = backbone.get_submodule(path)
        if not isinstance(norm, nn.LayerNorm):
            raise UserError(
                f"train.precision=bf16: the norm {path} is a {type(norm).__name__}, and only "
                "LayerNorm is known here; use train.precision=fp32."
            )
        wide = Float32Norm(list(norm.normalized_shape), norm.eps, bias=norm.bias is not None)
        wide.weight = nn.Parameter(kept[f"{path}.weight"], requires_grad=False)
        if norm.bias is not None:
            wide.bias = nn.Parameter(kept[f"{path}.bias"], requires_grad=False)
        backbone.set_submodule(path, wide)


def _convert(backbone: nn.Module, dtype: torch.dtype, kept: set[int]) -> None:
    """Give floating parameters and buffers new tensors: `Module.to` cannot convert fake ones."""
    fresh: dict[int, nn.Parameter] = {}  # a shared parameter stays shared
    for module in backbone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and id(parameter) not in kept:
                if id(parameter) not in fresh:
                    value = parameter.detach().to(dtype)
                    fresh[id(parameter)] = nn.Parameter(value, requires_grad=False)
                setattr(module, name, fresh[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


def side_autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast around the trained float32 parts, only in bf16 runs."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
