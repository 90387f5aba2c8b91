"""The linear head, and the scale of what it answers."""

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Pooled features [B, D] → outputs [B, C].

    With a scale, training works on standardised labels and the deployed graph un-scales: `forward`
    returns scores in the label's own unit, `raw` the standardised ones.

    Args:
        width: D.
        outputs: C.
        scale: (mean, standard deviation) of the training labels; None for logits.
        output: What the graph calls the result.
    """

    label_mean: Tensor
    label_std: Tensor

    def __init__(
        self,
        width: int,
        outputs: int,
        scale: tuple[float, float] | None = None,
        *,
        output: str = "logits",
    ) -> None:
        super().__init__()
        self.output = output
        self.linear = nn.Linear(width, outputs)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.scaled = scale is not None
        mean, std = scale or (0.0, 1.0)
        if self.scaled:
            self.register_buffer("label_mean", torch.tensor(mean))
            self.register_buffer("label_std", torch.tensor(std))

    def raw(self, pooled: Tensor) -> Tensor:
        """Return what the losses compare: logits, or standardised scores."""
        return self.linear(pooled)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return what a user reads: logits, or scores in the label's unit."""
        raw = self.raw(pooled)
        return raw * self.label_std + self.label_mean if self.scaled else raw
