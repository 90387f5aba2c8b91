"""MDPD: backbone and side network teach each other; then the side network fades.

One step is two passes with disjoint graphs:

    side pass      task loss on Y_S + feature distillation from the detached taps
    backbone pass  logits distillation from the detached Y_S, and `student_task_weight` × task loss
                   on Y_B, through the norm-gradient engine

Both passes add into `.grad` and one optimiser step follows: the joint reading of the paper's
single weighted sum. The logits loss moves the backbone only and the feature
losses the side network only: teachers are detached.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.backbones.wrap import Trace
from mdpd_deploy.config import Config, DistillConfig, LossConfig
from mdpd_deploy.distill import FeatureDistiller, weighted_distance
from mdpd_deploy.errors import UserError
from mdpd_deploy.model import pool_side
from mdpd_deploy.sides import SIDES, FrozenBlocks, SideNetwork, SideOutput, build_side
from mdpd_deploy.tasks import Task
from mdpd_deploy.train.memory.live import part
from mdpd_deploy.train.methods.base import METHODS, Method, Parameters, Parts
from mdpd_deploy.train.methods.batch import Batch
from mdpd_deploy.train.norm_grad import LayerLoss, build_norm_gradient

SHALLOW, DEEP = 4e-5, 6e-5  # supplementary B of the paper


def feature_weights(loss: LossConfig, side: type[SideNetwork]) -> tuple[float, float]:
    """Return the weights of the shallow and the deep feature loss; 0 over DTL by default."""
    default = (SHALLOW, DEEP) if side.distils_features else (0.0, 0.0)
    return (
        default[0] if loss.shallow is None else loss.shallow,
        default[1] if loss.deep is None else loss.deep,
    )


@METHODS.register("mdpd")
class MDPD(Method):
    """Trains side network, bottlenecks, generators, both heads and the backbone's norms."""

    uses_side = True
    distils = True
    tunes_norms = True
    # Few numbers (scales, shifts, a head) must follow a side network of many: at its learning rate
    # the deployed model ends far below its own side network (measured: docs/accuracy.md).
    student_factor = 10.0

    def __init__(self, backbone: Backbone, task: Task, config: Config) -> None:
        self.engine = build_norm_gradient(config.train.norm_grad, backbone)
        super().__init__(backbone, task, config)

    @classmethod
    def ignored_options(cls, config: Config) -> dict[str, str]:
        ignored = super().ignored_options(config)
        if not any(feature_weights(config.loss, SIDES.get_or_raise(config.side.name))):
            # Y_S is pooled all the same
            unread = [name for name in DistillConfig.model_fields if name != "side_head"]
            where = f"with --side {config.side.name} and loss.shallow and loss.deep at 0"
            ignored |= {f"distill.{name}": where for name in unread}
        return ignored

    def build_modules(self) -> nn.ModuleDict:
        backbone, config = self.backbone, self.config
        self.loss_names = ("loss", "loss_task", "loss_shallow", "loss_deep", "loss_logits")
        if config.train.student_task_weight:
            self.loss_names += ("loss_student",)
        self.last_feature = config.distill.side_head == "paper"
        self.side = build_side(backbone, config.side, last_feature=self.last_feature)
        if not self.side.has_features:
            teachers = [name for name, side in SIDES.items() if side.has_features]
            raise UserError(
                f"--method mdpd --side {config.side.name}: it has no side feature per layer to "
                f"teach or to pool; use --method side with it, or --side {' or '.join(teachers)}."
            )
        self.shallow_weight, self.deep_weight = feature_weights(config.loss, type(self.side))
        self.distiller = FeatureDistiller(
            backbone.layouts,
            {
                layer: self.side.feature_layout(layer, backbone.layouts)
                for layer in self.side.feature_layers
            },
            protect_first=backbone.has_cls,
            config=config.distill,
            imitate=self.shallow_weight > 0,
            generate=self.deep_weight > 0,
        )
        side_width = self.side.width if self.last_feature else backbone.width
        side_head = self.task.new_head(side_width)
        return nn.ModuleDict(
            {
                "side": self.side,
                "distiller": self.distiller,
                "side_head": side_head,
                "head": self.new_head(),
            }
        )

    def tuned(self) -> Parameters:
        return self.engine.trained(self.distiller.shallow + self.distiller.deep)

    def side_forward(self, trace: Trace, blocked: bool) -> tuple[SideOutput, Tensor]:
        """Run the side network on detached taps; return its output and pooled features."""
        taps = trace.taps[: self.side.last_tap + 1]
        with self.autocast(taps[0]):
            blocks = FrozenBlocks(self.backbone, trace, blocked=blocked)
            output = self.side(taps, trace.mask, blocks)
            pooled = pool_side(
                self.backbone, output, trace.mask, last_feature=self.last_feature, blocked=blocked
            )
        return output, pooled.float()

    def step(self, batch: Batch) -> Parts:
        with part("taps"):
            trace = self.engine.forward(self.cast(batch.inputs))
        tokens = self.distiller.mask_tokens(trace.taps)
        hidden = self.distiller.draw_mask(
            batch.keys, tokens, self.config.train.seed, batch.step
        ).to(trace.taps[0].device)
        with part("side pass"):
            losses, teacher, features = self._side_pass(batch, trace, hidden)
        with part("backbone pass"):
            student = self._backbone_pass(batch, trace, hidden, teacher, features)
        student["loss"] += losses["loss"]
        return losses | student

    def _side_pass(
        self, batch: Batch, trace: Trace, hidden: Tensor
    ) -> tuple[Parts, Tensor, dict[int, Tensor]]:
        weights = self.config.loss
        output, pooled = self.side_forward(trace, blocked=not self.config.train.late_norm_grad)
        raw = self.head("side_head").raw(pooled)
        task = self.task.loss(raw, batch.labels) / batch.weight
        with self.autocast(trace.taps[0]):
            shallow, deep = self.distiller(output.features, trace.taps, hidden, trace.mask)
        shallow, deep = shallow / batch.count, deep / batch.count
        loss = weights.task * task + self.shallow_weight * shallow + self.deep_weight * deep
        loss.backward()
        losses = {"loss": loss, "loss_task": task, "loss_shallow": shallow, "loss_deep": deep}
        kept = {}
        if self.config.train.norm_grad == "local":
            kept = {layer: feature.detach() for layer, feature in output.features.items()}
        return {name: value.detach() for name, value in losses.items()}, raw.detach(), kept

    def _backbone_pass(
        self,
        batch: Batch,
        trace: Trace,
        hidden: Tensor,
        teacher: Tensor,
        features: dict[int, Tensor],
    ) -> Parts:
        weights = self.config.loss
        logits_weight = weights.logits if batch.progress >= weights.logits_after else 0.0
        task_weight = self.config.train.student_task_weight
        losses: Parts = {}
        mask = trace.mask

        def top_loss(top: Tensor) -> Tensor:
            raw = self.head("head").raw(self.backbone.finish(top, mask).float())
            distance = self.task.distance(raw, teacher, batch.labels, weights) / batch.count
            losses["loss_logits"] = distance.detach()
            loss = logits_weight * distance
            if task_weight:
                student = self.task.loss(raw, batch.labels) / batch.weight
                losses["loss_student"] = student.detach()
                loss = loss + task_weight * student
            losses["loss"] = loss.detach()
            return loss

        self.engine.backward(trace, top_loss, self._layer_loss(features, hidden, mask, batch.count))
        return losses

    def _layer_loss(
        self, features: dict[int, Tensor], hidden: Tensor, mask: Tensor | None, count: float
    ) -> LayerLoss:
        """The feature loss of one layer with roles swapped, for `norm_grad=local`."""
        distiller = self.distiller

        def loss(layer: int, tap: Tensor) -> Tensor:
            if layer not in distiller.shallow + distiller.deep:
                return tap.new_zeros(())
            with torch.no_grad(), self.autocast(tap):
                target = distiller.student(layer, features[layer], hidden, mask)
            tap = distiller.target(layer, tap)
            weight = distiller.weight(layer, tap, hidden, mask)
            shallow = layer in distiller.shallow
            scale = self.shallow_weight if shallow else self.deep_weight
            return scale * weighted_distance(tap, target, weight) / count

        return loss

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = self.cast(inputs)
        trace = self.frozen_trace(inputs)
        _, pooled = self.side_forward(trace, blocked=True)
        deployed = self.backbone.finish(trace.taps[-1], trace.mask).float()
        return {
            "deployed": self.modules["head"](deployed),
            "side": self.modules["side_head"](pooled),
        }
