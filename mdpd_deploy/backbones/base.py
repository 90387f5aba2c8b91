"""The one interface every backbone offers, whatever library it comes from.

Shapes: B batch, N tokens (prefix tokens included), D width, L depth. Taps follow the papers:
`b_0` is the embedding output and `b_l` the output of block l (1-based).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mdpd_deploy.backbones.layout import Layout
from mdpd_deploy.backbones.wrap import Run, Trace, first_of, plainly, record
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
        width: D of the pooled features [B, D].
        prefix_tokens: Leading tokens that are no patch (class and register tokens); 0 for text.
        has_cls: Whether token 0 is a class token.
        grid: (rows, columns) of the patch tokens, or None for text.
        input_names: The graph's inputs in order, e.g. ("pixel_values",).
        pooling: "mean" over real tokens without prefix tokens, or "cls".
        heads: Attention heads of each block.
        preprocess: Raw inputs → arrays named `input_names`.
        takes_prefix: Whether blocks take keys and values from before their tokens.
        takes_prompt: Whether blocks take more tokens than the embedding made.
        has_taps: Whether its traces have taps, for side networks to read.
    """

    family: str
    width: int
    prefix_tokens: int
    has_cls: bool
    grid: tuple[int, int] | None
    input_names: tuple[str, ...]
    pooling: str
    heads: int
    preprocess: Preprocess
    source: BackboneSource
    takes_prefix: bool = False
    takes_prompt: bool = True
    has_taps: bool = True

    # --- what a family provides ---------------------------------------------------------------

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Return the modules that run one after the other: block i maps b_i to b_{i+1}."""

    @abstractmethod
    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Any:
        """Call the library's own forward, which runs every block in order.

        Args:
            inputs: Named tensors.
            mask: What blocks shall take for `token_mask(inputs)`.
        """

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
    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Choose "sdpa" (training) or "eager" (export: fused attention adds nodes).

        Args:
            kind: "sdpa" or "eager".
            within: A module whose blocks of this family are meant, a side network's thin ones
                included; None means the backbone's own.
        """

    def token_mask(self, inputs: Inputs) -> Tensor | None:
        """Return [B, N], 1 for real tokens and 0 for padding; None when there is no padding."""
        return None

    # --- what follows from it -----------------------------------------------------------------

    @property
    def takes(self) -> Literal["text", "image"]:
        """What its inputs are made from."""
        return self.preprocess.takes

    @property
    def depth(self) -> int:
        """L."""
        return len(self.blocks())

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """How the tokens of b_0..b_L lie; one and the same unless a family says otherwise."""
        return (Layout(self.width, self.grid, self.prefix_tokens),) * (self.depth + 1)

    @property
    def entries(self) -> tuple[Layout, ...]:
        """How the tokens lie that each block reads: those of the tap before it, or merged ones."""
        return self.layouts[:-1]

    def merges(self) -> Mapping[int, nn.Module]:
        """Return what runs between two stages, by the index of the block behind it; no taps."""
        return {}

    def trace(
        self,
        inputs: Inputs,
        *,
        last: int | None = None,
        run: Run = plainly,
        mask: Tensor | None = None,
        keep_taps: bool = True,
    ) -> Trace:
        """Run the backbone and return its taps.

        Args:
            inputs: Named tensors.
            last: The highest tap that is needed; nothing runs past it. None means L.
            run: How blocks are run, see `wrap.py`.
            mask: Another token mask for the blocks than the inputs' own, e.g. of longer states.
            keep_taps: False where only the last state is wanted: then nothing else is kept alive.
        """
        own = self.token_mask(inputs)
        shown = own if mask is None else mask
        trace = Trace(own)
        last = self.depth if last is None else last
        record(
            trace,
            self.blocks(),
            last,
            run,
            lambda: self.run_library(inputs, shown),
            keep_taps=keep_taps,
            layouts=self.layouts,
            merges=self.merges(),
        )
        return trace

    def run_block(
        self,
        trace: Trace,
        index: int,
        x: Tensor,
        *,
        blocked: bool = False,
        block: nn.Module | None = None,
    ) -> Tensor:
        """Run block `index` on another state, with the arguments it was called with in a trace.

        Args:
            trace: Of the same inputs; its taps need not reach the block.
            index: 0-based.
            x: The state that the block reads, [B, N, D].
            blocked: Use the current norm values without their gradient.
            block: A thinner copy to run in the block's place, with its gradients.
        """
        call = trace.calls[index]
        if block is not None:
            return first_of(call.of(block, x))
        own: Any = self.blocks()[index]
        state = self.entries[index].state(x)
        out = first_of(call.of(WithoutGrad(own) if blocked else own, state))
        return self.layouts[index + 1].tokens(out)

    def enter(self, trace: Trace, index: int, x: Tensor, *, blocked: bool = False) -> Tensor:
        """Return what block `index` reads, [B, N, D], where x is in the place of b_index.

        That is x itself, but for the first block of a stage that begins with a merge.
        """
        merge = self.merges().get(index)
        if merge is None:
            return x
        if index < len(trace.taps) and x is trace.taps[index]:
            return self.entries[index].tokens(trace.calls[index].x)
        own: Any = WithoutGrad(merge) if blocked else merge
        merged: Tensor = own(self.layouts[index].state(x))
        return self.entries[index].tokens(merged)

    def require_taps(self, option: str) -> None:
        """Refuse what needs to know how the tokens of the blocks lie, where nothing says so.

        Args:
            option: What asks for it, as the user wrote it.

        Raises:
            UserError: For a model that is taken as a whole.
        """
        if not self.has_taps:
            raise UserError(
                f"{option} knows plain transformers and networks in stages; "
                f"{self.source.name} is tuned as a whole, use --method norms, bitfit, full or probe."
            )

    def finish(self, x: Tensor, mask: Tensor | None, *, blocked: bool = False) -> Tensor:
        """Final norm and pooling: [B, N, D] → [B, D]."""
        return self.pool(self.normalise(x, blocked=blocked), mask)

    def normalise(self, x: Tensor, *, blocked: bool = False) -> Tensor:
        """Apply the final norm, if there is one, to [..., D]; `blocked` as in `run_block`."""
        norm = self.final_norm()
        if norm is None:
            return x
        out: Tensor = (WithoutGrad(norm) if blocked else norm)(x)
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
        trace = self.trace(inputs, keep_taps=False)
        return self.finish(trace.ends[-1], trace.mask)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout; the statistics of batch norms stay frozen."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def norms(self) -> dict[str, nn.Parameter]:
        """Return every tuned norm parameter by full name: block norms and the final norm."""
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


class Layered(Backbone):
    """A backbone whose linear maps are known: adapters go into them."""

    @abstractmethod
    def layers(self, index: int) -> tuple[Layer, ...]:
        """Return the layers of one block in the order in which a token passes them.

        Four of them are linear: the attention's input (query, key and value, or one fused map),
        its output, and the two maps of the MLP.

        Raises:
            UserError: If they are not known.
        """


class Thinnable(Layered):
    """A backbone whose blocks can be copied with fewer units, as LST is made of."""

    @abstractmethod
    def thin_block(self, index: int, reduction: int) -> nn.Module:
        """Return a fresh block like block `index`, every width but the heads' number divided.

        Raises:
            UserError: If the blocks read what a thinner copy could not, e.g. a rotary table.
        """

    @abstractmethod
    def embedding_weight(self) -> tuple[Tensor, int]:
        """Return the weight that makes tokens, and its axis of length D."""


class WithoutGrad:
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
