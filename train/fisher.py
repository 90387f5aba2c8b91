"""Which weights of the backbone matter for a task: their Fisher information.

Source: LST (NeurIPS 2022), section 3.3: the sum over single examples of the squared gradient of the
task loss. The released code takes 1,024 training examples and the language model's own head; a
fresh encoder has no head for the task, so a linear one with its usual first values stands in.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mdpd_deploy.sides import SideNetwork
from mdpd_deploy.train.batches import Schedule, StepDataset
from mdpd_deploy.train.setup import Setup

EXAMPLES = 1024


def inherit_important(setup: Setup, say: Callable[[str], None]) -> None:
    """Give a side network with `side.init=fisher` its first weights; others keep theirs.

    Needs memory for the gradients of the whole backbone, before training starts.
    """
    config, method = setup.config, setup.method
    if not method.uses_side or config.side.init != "fisher":
        return
    examples = min(EXAMPLES, len(setup.data.train))
    say(f"side.init=fisher: squared gradients of {examples:,} examples")
    importance = fisher(setup, examples)
    side = method.modules["side"]
    assert isinstance(side, SideNetwork)
    side.inherit(setup.backbone, lambda weight: importance[weight])


def fisher(setup: Setup, examples: int) -> dict[Tensor, Tensor]:
    """Return Σ over examples of the squared gradient, for every weight of the backbone."""
    backbone, method = setup.backbone, setup.method
    single = Schedule(len(setup.data.train), 1, 1, setup.config.train.seed, 1)
    dataset = StepDataset(setup.data.train, backbone.preprocess, setup.task, setup.config, single)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.config.train.seed)
        head = method.new_head().to(setup.device)
    total: dict[Tensor, Tensor] = {
        weight: torch.zeros_like(weight, dtype=torch.float32) for weight in backbone.parameters()
    }
    before = {weight: weight.requires_grad for weight in total}
    backbone.requires_grad_(True).eval()
    for step in range(examples):
        (batch,) = dataset[step]
        inputs = method.cast({k: t.to(setup.device) for k, t in batch.inputs.items()})
        loss = method.task.loss(head.raw(backbone(inputs).float()), batch.labels.to(setup.device))
        for weight, gradient in zip(
            total, torch.autograd.grad(loss, list(total), allow_unused=True), strict=True
        ):
            if gradient is not None:
                total[weight] += gradient.float().square()
    for weight, trained in before.items():
        weight.requires_grad_(trained)
    return total
