"""The models a run can be turned into: backbone and head, alone or with what stays beside them."""

from torch import Tensor, nn

from mdpd_deploy.adapters.tokens import VirtualTokens
from mdpd_deploy.backbones.base import Backbone, Inputs
from mdpd_deploy.backbones.wrap import Trace
from mdpd_deploy.sides.base import FrozenBlocks, SideNetwork, SideOutput
from mdpd_deploy.tasks.head import Head


class TaskModel(nn.Module):
    """A backbone that answers a task, on its own or not.

    Inputs are positional, in the order of `backbone.input_names`, so that an exported graph takes
    them in a known order; the result is one tensor [B, C], or one for each of `output_names`.
    """

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @property
    def output_names(self) -> tuple[str, ...]:
        """What an exported graph calls the results, in order."""
        return (self.head.output,)


class Deployed(TaskModel):
    """Backbone + head: all that is left after the side network has faded."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.backbone(named(self.backbone, inputs)))


class WithTokens(TaskModel):
    """Backbone + virtual tokens + head: every inference attends to the tokens."""

    def __init__(self, backbone: Backbone, tokens: VirtualTokens, head: Head) -> None:
        super().__init__(backbone, head)
        self.tokens = tokens

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.tokens(self.backbone, named(self.backbone, inputs)))


class WithSide(TaskModel):
    """Backbone + side network + side head, the rival that every inference pays for.

    It runs the backbone only as far as the side network reads it: a block that the side
    network runs itself is not run twice.

    Args:
        backbone: The frozen backbone.
        side: The side network.
        head: The side head.
        last_feature: The head reads s_L instead of the side output (`distill.side_head=paper`).
    """

    def __init__(
        self, backbone: Backbone, side: SideNetwork, head: Head, *, last_feature: bool = False
    ) -> None:
        super().__init__(backbone, head)
        self.side = side
        self.last_feature = last_feature

    def forward(self, *inputs: Tensor) -> Tensor:
        batch = named(self.backbone, inputs)
        return self.answer(self.backbone.trace(batch, last=self.side.last_tap))

    def answer(self, trace: Trace) -> Tensor:
        """Return the task's outputs [B, C] from a trace that reaches b_{side.last_tap}."""
        taps = trace.taps[: self.side.last_tap + 1]
        output = self.side(taps, trace.mask, FrozenBlocks(self.backbone, trace))
        return self.head(
            pool_side(self.backbone, output, trace.mask, last_feature=self.last_feature)
        )


def pool_side(
    backbone: Backbone,
    output: SideOutput,
    mask: Tensor | None,
    *,
    last_feature: bool = False,
    blocked: bool = False,
) -> Tensor:
    """Pool a side network's output for its head.

    Args:
        backbone: Gives the final norm and the pooling.
        output: From the side network.
        mask: [B, N] or None.
        last_feature: Eq. 3 literally: GAP(s_L) [B, D_S]; else pool(final_norm(tokens)) [B, D].
        blocked: Keep gradients from the final norm.
    """
    if last_feature:
        return backbone.pool(output.features[backbone.depth], mask)
    return backbone.finish(output.tokens, mask, blocked=blocked)


def named(backbone: Backbone, inputs: tuple[Tensor, ...]) -> Inputs:
    """Give positional inputs the backbone's input names."""
    return dict(zip(backbone.input_names, inputs, strict=True))
