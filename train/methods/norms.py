"""Norms and head, trained on the task directly: MDPD's deployed parameters without its teacher.

The honest control of the method: same deployed model, no side network. With the `recompute`
engine it trains in the memory of one block.
"""

from torch import Tensor

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import Config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Task
from mdpd_deploy.train.methods.base import METHODS, Method, Parameters, Parts
from mdpd_deploy.train.methods.batch import Batch
from mdpd_deploy.train.norm_grad import build_norm_gradient


@METHODS.register("norms")
class Norms(Method):
    """Trains block norms, final norm and head with the task loss."""

    tunes_norms = True
    default_lr = 1e-2  # that of the norms and head under MDPD, which it is the control of

    def __init__(self, backbone: Backbone, task: Task, config: Config) -> None:
        self.engine = build_norm_gradient(config.train.norm_grad, backbone)
        if config.train.norm_grad == "local":
            raise UserError(
                "train.norm_grad=local needs the feature losses of --method mdpd; "
                "use recompute, full or late:K with --method norms."
            )
        super().__init__(backbone, task, config)

    def tuned(self) -> Parameters:
        return self.engine.trained(())

    def step(self, batch: Batch) -> Parts:
        losses: Parts = {}
        trace = self.engine.forward(self.cast(batch.inputs))
        mask = trace.mask

        def top_loss(top: Tensor) -> Tensor:
            raw = self.head("head").raw(self.backbone.finish(top, mask).float())
            loss = self.task.loss(raw, batch.labels) / batch.weight
            losses["loss"] = losses["loss_task"] = loss.detach()
            return loss

        self.engine.backward(trace, top_loss, None)
        return losses
