"""Frozen weights held in fewer bits between their uses, and made anew at each.

A module keeps its class, its forward and its place; its `weight` becomes a property that makes the
matrix from what is held. A linear map makes it once more in the backward pass instead of keeping it,
so that only one is there at a time; a table of embeddings makes the rows that are looked up. All of it
is plain PyTorch, on any device, without further packages. Forms, of a weight as rows [out, n]:

    bf16  rounded
    int8  127 steps to either side of 0, of a size of their own for each row (symmetric, absmax)
    nf4   blocks of 64 numbers, each times its largest, on the 16 levels of QLoRA's NormalFloat
          (NeurIPS 2023): the quantiles of a normal distribution. A row that is no multiple of 64
          stays as it is.

A scale has the dtype of the products, and numbers are rounded by that very scale.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 64  # numbers of an nf4 block
# fmt: off
LEVELS = (  # NF4, appendix E of the QLoRA paper
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on
Parts = Sequence[Tensor]


@dataclass(frozen=True)
class Form:
    """How a weight is held.

    Attributes:
        pack: Rows [out, n] and the dtype of the products → one or two tensors of `out` rows each;
            a third is the same for all rows.
        unpack: Some rows of those tensors → rows [..., n] in the dtype of the products.
        multiple: What n must be a multiple of.
    """

    pack: Callable[[Tensor, torch.dtype], Parts]
    unpack: Callable[[Parts, torch.dtype], Tensor]
    multiple: int = 1


def _step(rows: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    """Return the size of a step [..., 1] at which the largest number of a row is `most` steps."""
    scale = (rows.abs().amax(dim=-1, keepdim=True) / most).to(dtype)
    return torch.where(scale == 0, 1, scale)


def _pack_int8(rows: Tensor, dtype: torch.dtype) -> Parts:
    scale = _step(rows, 127, dtype)
    return (rows / scale).round().clamp(-127, 127).to(torch.int8), scale


def _pack_nf4(rows: Tensor, dtype: torch.dtype) -> Parts:
    blocks = rows.unflatten(-1, (-1, BLOCK))
    scale = _step(blocks, 1, dtype)
    levels = torch.tensor(LEVELS, device=rows.device, dtype=rows.dtype)
    between = (levels[1:] + levels[:-1]) / 2
    index = torch.bucketize(blocks / scale, between).flatten(-2).to(torch.uint8)
    return index[..., ::2] << 4 | index[..., 1::2], scale.squeeze(-1), levels.to(dtype)


def _unpack_nf4(parts: Parts, dtype: torch.dtype) -> Tensor:
    pairs, scale, levels = parts
    index = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(-2)
    numbers = levels[index.int()].unflatten(-1, (-1, BLOCK))
    return numbers.mul_(scale.unsqueeze(-1)).flatten(-2)


FORMS = {
    "bf16": Form(
        lambda rows, dtype: (rows.to(torch.bfloat16),), lambda parts, dtype: parts[0].to(dtype)
    ),
    "int8": Form(_pack_int8, lambda parts, dtype: parts[0] * parts[1]),
    "nf4": Form(_pack_nf4, _unpack_nf4, BLOCK),
}


class _Held(NamedTuple):
    """What a module with a held weight knows of it."""

    form: str
    parts: tuple[str, ...]  # names of buffers
    shape: torch.Size
    dtype: torch.dtype  # of the products
    kind: type[nn.Module]  # its class before


def hold_weights(model: nn.Module, form: str, dtype: torch.dtype, kept: Collection[int]) -> None:
    """Hold every matrix named `weight` in a form, in place.

    Args:
        model: Linear maps, convolutions, embeddings and the like in it are changed.
        form: A name of FORMS.
        dtype: Of the products.
        kept: `id` of parameters that stay as they are.
    """
    packed: dict[int, Parts] = {}  # a shared weight stays shared
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or id(weight) in kept or not _can_be_held(module, weight, form):
            continue
        if id(weight) not in packed:
            packed[id(weight)] = FORMS[form].pack(weight.detach().flatten(1), dtype)
        del module._parameters["weight"]
        names = tuple(f"weight_{form}_{index}" for index in range(len(packed[id(weight)])))
        for name, part in zip(names, packed[id(weight)], strict=True):
            module.register_buffer(name, part)
        hidden: Any = module
        kind: Any = type(module)
        hidden._held = _Held(form, names, weight.shape, dtype, kind)
        hidden.__class__ = _held_kind(kind)


def _can_be_held(module: nn.Module, weight: Tensor, form: str) -> bool:
    whole = weight.ndim > 1 and weight.is_floating_point()
    rows = whole and weight[0].numel() % FORMS[form].multiple == 0
    return rows and getattr(module, "max_norm", None) is None  # a table that changes as it is read


def let_go(module: nn.Module) -> None:
    """Give a module that may be held its weight back as a parameter, in float32, in place."""
    held: Any = module
    what: _Held | None = getattr(module, "_held", None)
    if what is None:
        return
    weight = held.weight.float()
    held.__class__ = what.kind
    for name in ("_held", *what.parts):
        delattr(held, name)
    held.weight = nn.Parameter(weight, requires_grad=False)


def _rows(module: Any, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Return rows of a held weight [..., n]."""
    what: _Held = module._held
    rows, shared = what.parts[:2], what.parts[2:]
    parts = [choose(module._buffers[name]) for name in rows]
    parts += [module._buffers[name] for name in shared]
    return FORMS[what.form].unpack(parts, what.dtype)


@cache
def _held_kind(kind: type[Any]) -> type[Any]:
    """Return a kind of module that makes its weight when it is read."""

    class Held(kind):  # type: ignore[misc]  # the base is known when it runs
        @property
        def weight(self) -> Tensor:
            return _rows(self, lambda part: part).view(self._held.shape)

    class HeldLinear(Held):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = _Linear.apply(x, self.bias, self)
            return out

    class HeldTable(Held):
        def forward(self, indices: Tensor) -> Tensor:
            return _rows(self, lambda part: F.embedding(indices, part))

    special = {nn.Linear.forward: HeldLinear, nn.Embedding.forward: HeldTable}
    found: type[Any] = special.get(kind.forward, Held)
    found.__name__ = kind.__name__  # by which backbones know a module
    return found


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, W made in either pass and kept in none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: nn.Linear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        to_x, to_bias, _ = ctx.needs_input_grad
        return (
            grad @ ctx.module.weight if to_x else None,
            grad.flatten(0, -2).sum(0) if to_bias else None,
            None,
        )
