"""Frozen weights held in bfloat16; norms, and what is trained, kept in float32.

Autocast over a frozen backbone would make an uncached bfloat16 copy of every weight at every use;
holding the weights in bfloat16 halves weights and taps instead. A norm's scale is near 1, where
bfloat16 steps are 0.4 %, so the tuned norms stay float32 and compute in float32.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone


def hold_in_bfloat16(backbone: Backbone, trained: Iterable[nn.Parameter] = ()) -> None:
    """Convert the frozen weights in place; norms keep theirs, and compute, in float32.

    Args:
        backbone: Its frozen weights become new tensors.
        trained: Further parameters of it that stay as they are.
    """
    norms = backbone.norms()
    kept = {id(parameter) for parameter in (*trained, *norms.values())}
    for path in sorted({name.rpartition(".")[0] for name in norms}):
        norm = backbone.get_submodule(path)
        kept |= {id(buffer) for buffer in norm.buffers(recurse=False)}
        kind: Any = type(norm)
        norm.__class__ = _in_float32(kind)
    _convert(backbone, torch.bfloat16, kept)


@cache
def _in_float32(kind: type[Any]) -> type[Any]:
    """Return a kind of norm that computes in float32 and returns the dtype that it was given."""

    class Float32(kind):  # type: ignore[misc]  # the base is known when it runs
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = super().forward(x.float(), *args, **kwargs)
            return out.to(x.dtype)

    Float32.__name__ = kind.__name__  # by which backbones know a norm
    return Float32


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
