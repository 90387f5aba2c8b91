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
    """

    def __init__(self, backbone: Backbone, side: SideNetwork, head: Head) -> None:
        super().__init__(backbone, head)
        self.side = side

    def forward(self, *inputs: Tensor) -> Tensor:
        batch = named(self.backbone, inputs)
        return self.answer(self.backbone.trace(batch, last=self.side.last_tap))

    def answer(self, trace: Trace) -> Tensor:
        """Return the task's outputs [B, C] from a trace that reaches b_{side.last_tap}."""
        taps = trace.taps[: self.side.last_tap + 1]
        output = self.side(taps, trace.mask, FrozenBlocks(self.backbone, trace))
        return self.head(pool_side(self.backbone, self.side, output, trace.mask))


def pool_side(
    backbone: Backbone,
    side: SideNetwork,
    output: SideOutput,
    mask: Tensor | None,
    *,
    blocked: bool = False,
) -> Tensor:
    """Pool a side network's output for its head, as its `readout` says.

    Args:
        backbone: Gives the final norm and the pooling.
        side: The side network.
        output: Of it.
        mask: [B, N] or None.
        blocked: Keep gradients from the final norm.

    Returns:
        pool(final_norm(tokens)) or final_norm(pool(tokens)) [B, D], or MDPD's Eq. 3 literally,
        GAP(s_L) [B, D_S].
    """
    if side.readout == "feature":
        return backbone.pool(output.last(backbone.depth), mask)
    if side.readout == "released":
        return backbone.normalise(backbone.pool(output.tokens, mask), blocked=blocked)
    return backbone.finish(output.tokens, mask, blocked=blocked)


def named(backbone: Backbone, inputs: tuple[Tensor, ...]) -> Inputs:
    """Give positional inputs the backbone's input names."""
    return dict(zip(backbone.input_names, inputs, strict=True))
