"""The one interface every backbone offers, whatever library it comes from.

Shapes: B batch, N tokens (prefix tokens included), D width, L depth. Taps follow the papers:
`b_0` is the embedding output and `b_l` the output of block l (1-based).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mdpd_deploy.data.preprocess import Preprocess
from mdpd_deploy.errors import UserError

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class BackboneSource:
    """Where a backbone came from, enough to load it again (recorded in summary.json)."""

    name: str
    revision: str | None
    sha256: str  # of the frozen weights as loaded, see `weights_sha256`; empty for a fake
    pretrained: bool


@dataclass(frozen=True)
class Layer:
    """A linear layer or a norm of a block, as a copy with fewer units must know it.

    Attributes:
        paths: Modules of the block that read the same inputs and keep the same units.
        stacked: Maps that one weight holds, one below the other (3 in a fused qkv).
        linear: False for a norm, which has as many units as inputs.
    """

    paths: tuple[str, ...]
    stacked: int = 1
    linear: bool = True


class Backbone(nn.Module, ABC):
    """A frozen encoder seen as embedding → blocks → final norm → pooling.

    Attributes:
        family: The registry name of the family, e.g. "vit" or "bert".
        width: D.
        depth: L.
        prefix_tokens: Leading tokens that are no patch (class and register tokens); 0 for text.
        has_cls: Whether token 0 is a class token.
        grid: (rows, columns) of the patch tokens, or None for text.
        input_names: The graph's inputs in order, e.g. ("pixel_values",).
        pooling: "mean" over real tokens without prefix tokens, or "cls" (D3).
        heads: Attention heads of each block.
        preprocess: Raw inputs → arrays named `input_names`.
        takes_prefix: Whether `run_block_after` works.
    """

    family: str
    width: int
    depth: int
    prefix_tokens: int
    has_cls: bool
    grid: tuple[int, int] | None
    input_names: tuple[str, ...]
    pooling: str
    heads: int
    preprocess: Preprocess
    source: BackboneSource
    takes_prefix: bool = False

    # --- what a family provides ---------------------------------------------------------------

    @abstractmethod
    def embed(self, inputs: Inputs) -> Tensor:
        """Return b_0 [B, N, D]."""

    @abstractmethod
    def block(self, index: int) -> nn.Module:
        """Return the module of block `index` (0-based: it maps b_index to b_{index+1})."""

    @staticmethod
    @abstractmethod
    def apply_block(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        """Run a block (or a stand-in, or a thin copy of it) on x [B, N, D] → [B, N, D]."""

    @abstractmethod
    def final_norm(self) -> nn.Module | None:
        """Return the norm between the last block and the pooling, None for post-norm families."""

    @abstractmethod
    def block_norms(self, index: int) -> dict[str, nn.Parameter]:
        """Return scale and shift of every tuned norm of one block, by their full names."""

    @abstractmethod
    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return well-formed random inputs; `tokens` is the sequence length, text only."""

    @abstractmethod
    def thin_block(self, index: int, reduction: int) -> nn.Module:
        """Return a fresh block like block `index`, every width but the heads' number divided."""

    @abstractmethod
    def layers(self, index: int) -> tuple[Layer, ...]:
        """Return the layers of one block in the order in which a token passes them.

        Four of them are linear: the attention's input (query, key and value, or one fused map),
        its output, and the two maps of the MLP.
        """

    @abstractmethod
    def embedding_weight(self) -> tuple[Tensor, int]:
        """Return the weight that makes tokens, and its axis of length D."""

    @abstractmethod
    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Choose "sdpa" (training) or "eager" (export, see deployment facts on the SDPA graph).

        Args:
            kind: "sdpa" or "eager".
            within: A module whose blocks of this family are meant, a side network's thin ones
                included; None means the backbone's own.
        """

    def token_mask(self, inputs: Inputs) -> Tensor | None:
        """Return [B, N], 1 for real tokens and 0 for padding; None when there is no padding."""
        return None

    def run_block_after(
        self, index: int, x: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Run block `index`, whose attention also reads T given keys and values.

        Args:
            index: 0-based.
            x: [B, N, D].
            mask: [B, T + N] or None.
            keys: [heads, T, D / heads], the same for every example.
            values: As `keys`.
        """
        raise NotImplementedError(f"takes_prefix is False for {self.family}")

    # --- what follows from it -----------------------------------------------------------------

    def run_block(
        self, index: int, x: Tensor, mask: Tensor | None, *, blocked: bool = False
    ) -> Tensor:
        """Run block `index`; `blocked` uses the current norm values without their gradient (D1)."""
        module = self.block(index)
        return self.apply_block(_WithoutGrad(module) if blocked else module, x, mask)

    def finish(self, x: Tensor, mask: Tensor | None, *, blocked: bool = False) -> Tensor:
        """Final norm and pooling: [B, N, D] → [B, D]."""
        return self.pool(self.normalise(x, blocked=blocked), mask)

    def normalise(self, x: Tensor, *, blocked: bool = False) -> Tensor:
        """Apply the final norm, if there is one, to [..., D]; `blocked` as in `run_block`."""
        norm = self.final_norm()
        if norm is None:
            return x
        out: Tensor = (_WithoutGrad(norm) if blocked else norm)(x)
        return out

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Pool [B, N, D'] to [B, D'] as `pooling` says; padding and prefix tokens never count."""
        if self.pooling == "cls":
            return x[:, 0]
        x = x[:, self.prefix_tokens :]
        if mask is None:
            return x.mean(dim=1)
        weight = mask[:, self.prefix_tokens :].to(x.dtype).unsqueeze(-1)
        return (x * weight).sum(dim=1) / weight.sum(dim=1)

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the pooled features [B, D]."""
        mask = self.token_mask(inputs)
        x = self.embed(inputs)
        for index in range(self.depth):
            x = self.run_block(index, x, mask)
        return self.finish(x, mask)

    def norms(self) -> dict[str, nn.Parameter]:
        """Return every tuned norm parameter by full name: block norms and the final norm (D3)."""
        found: dict[str, nn.Parameter] = {}
        for index in range(self.depth):
            found.update(self.block_norms(index))
        found.update(self.final_norm_parameters())
        return found

    def final_norm_parameters(self) -> dict[str, nn.Parameter]:
        """Return the final norm's parameters by full name (empty for post-norm families)."""
        norm = self.final_norm()
        if norm is None:
            return {}
        mine = {id(parameter) for parameter in norm.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) in mine}


class _WithoutGrad:
    """A module that is called with detached parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frozen = {name: p.detach() for name, p in self.module.named_parameters()}
        return functional_call(self.module, frozen, args, kwargs)


def norm_parameters_of(
    root: nn.Module, prefix: str, norms: list[nn.Module]
) -> dict[str, nn.Parameter]:
    """Name the scale and shift of `norms`, found below `root`, with `prefix`."""
    wanted = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    named = {prefix + name: p for name, p in root.named_parameters() if id(p) in wanted}
    if not named:
        raise UserError(f"the backbone has no norm with a scale or shift below {prefix!r}.")
    return named


def weights_sha256(backbone: nn.Module) -> str:
    """Return the SHA-256 over names, shapes and bytes of all parameters and buffers, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        raw = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name} {raw.dtype} {tuple(raw.shape)}\n".encode())
        digest.update(raw.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
