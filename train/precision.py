"""Frozen weights in fewer bits than float32; norms, and what is trained, kept in float32.

`train.precision` says in what a step computes, `train.hold` in what the frozen matrices lie between
their uses, where that is less. Autocast over a frozen backbone would make an uncached bfloat16 copy
of every weight at every use; holding the weights in bfloat16 halves weights and taps instead. A norm's scale is near 1, where
bfloat16 steps are 0.4 %, so the tuned norms stay float32 and compute in float32.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.backbones.held import hold_weights


def hold_frozen(
    backbone: Backbone, trained: Iterable[nn.Parameter], dtype: torch.dtype, hold: str | None
) -> None:
    """Convert the frozen weights in place; norms keep theirs, and compute, in float32.

    Args:
        backbone: Its frozen weights become new tensors.
        trained: Further parameters of it that stay as they are.
        dtype: Of the products, and of what nothing else holds.
        hold: How matrices are held, a name of `held.FORMS`; None: in `dtype`.
    """
    norms = backbone.norms()
    kept = {id(parameter) for parameter in (*trained, *norms.values())}
    if hold is not None:
        hold_weights(backbone, hold, dtype, kept)
    if dtype == torch.float32:
        return
    for path in sorted({name.rpartition(".")[0] for name in norms}):
        norm = backbone.get_submodule(path)
        kept |= {id(buffer) for buffer in norm.buffers(recurse=False)}
        kind: Any = type(norm)
        norm.__class__ = _in_float32(kind)
    _convert(backbone, dtype, kept)


@cache
def _in_float32(kind: type[Any]) -> type[Any]:
    """Return a kind of norm that computes in float32 and returns the dtype that it was given."""

    class Float32(kind):  # type: ignore[misc]  # the base is known when it runs
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = super().forward(x.float(), *args, **kwargs)
            return out.to(x.dtype)

    class Float32LayerNorm(kind):  # type: ignore[misc]  # as above
        def forward(self, x: Tensor) -> Tensor:
            shape, eps = self.normalized_shape, self.eps
            out: Tensor = _LayerNorm.apply(x, self.weight, self.bias, shape, eps)
            return out

    timms = (kind.__module__, kind.__name__) == ("timm.layers.norm", "LayerNorm")
    plain = kind.forward is nn.LayerNorm.forward or timms
    found: type[Any] = Float32LayerNorm if plain else Float32
    found.__name__ = kind.__name__  # by which backbones know a norm
    return found


class _LayerNorm(torch.autograd.Function):
    """A layer norm in float32 that keeps its input as it was given: two copies in float32 a block
    would be a fifth of what a recomputed block keeps.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], eps: float
    ) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x.float(), shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape = shape
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        found = torch.ops.aten.native_layer_norm_backward(
            grads[0].float(), x.float(), ctx.shape, mean, rstd, weight, bias, wanted
        )
        return (*(g if want else None for g, want in zip(found, wanted, strict=True)), None, None)


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
            if buffer.is_floating_point() and id(buffer) not in kept:
                setattr(module, name, buffer.to(dtype))


def side_autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast around the trained float32 parts, only in bf16 runs."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
