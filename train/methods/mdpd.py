"""MDPD: backbone and side network teach each other; then the side network fades.

One step is two passes with disjoint graphs:

    side pass      task loss on Y_S + feature distillation from the detached taps
    backbone pass  logits distillation from the detached Y_S, and `student_task_weight` × task loss
                   on Y_B, through the norm-gradient engine

Both passes add into `.grad` and one optimiser step follows: the joint reading of the paper's
single weighted sum. The logits loss moves the backbone only and the feature
losses the side network only: teachers are detached. `train.turns=alternate` is the other reading,
of the paper's sentence that the two take turns: the first step and every second one from there
trains what the side pass reaches, the steps between what the backbone pass reaches.

With `distill.teacher=untouched`, which is ours, the side network reads the backbone as it was before
training, as it would alone: otherwise a student that follows its teacher moves what the teacher
reads. The teacher's taps come from a forward of their own and are gone before the student's.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.backbones.layout import Layout
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


def same(width: int) -> nn.Linear:
    """Return φ of Eq. 3, a linear map that changes nothing at the start: [B, C] → [B, C]."""
    phi = nn.Linear(width, width)
    nn.init.eye_(phi.weight)
    nn.init.zeros_(phi.bias)
    return phi


def _of_side_pass(group: str, name: str) -> bool:
    """Tell whether the side pass trains a tensor; φ of Eq. 3 lies beside the deployed head."""
    return group == "side" and not name.startswith("phi_logits.")


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
        self.untouched: dict[str, Tensor] = {}  # the values of before, where the teacher reads them
        if config.distill.teacher == "untouched":
            self.untouched = {k: p.detach().clone() for k, p in self.backbone_weights.items()}

    @classmethod
    def ignored_options(cls, config: Config) -> dict[str, str]:
        ignored = super().ignored_options(config)
        if config.train.turns == "alternate":
            ignored["train.late_norm_grad"] = "with train.turns=alternate"
        if config.distill.teacher == "untouched":
            ignored["train.late_norm_grad"] = "with distill.teacher=untouched"
        if config.loss.logits == 0:
            ignored["distill.phi_logits"] = "with loss.logits=0"
        if not any(feature_weights(config.loss, SIDES.get_or_raise(config.side.name))):
            # Y_S is pooled and compared all the same
            unread = DistillConfig.model_fields.keys() - {"side_head", "phi_logits", "teacher"}
            where = f"with --side {config.side.name} and loss.shallow and loss.deep at 0"
            ignored |= {f"distill.{name}": where for name in unread}
        return ignored

    def build_modules(self) -> nn.ModuleDict:
        backbone, config = self.backbone, self.config
        self.loss = self.task.distils(config.loss)
        self.loss_names = ("loss", "loss_task", "loss_shallow", "loss_deep", "loss_logits")
        if config.train.student_task_weight:
            self.loss_names += ("loss_student",)
        last_feature = config.distill.side_head == "paper"
        self.side = build_side(backbone, config.side, last_feature=last_feature)
        if not self.side.has_features:
            teachers = [name for name, side in SIDES.items() if side.has_features]
            raise UserError(
                f"--method mdpd --side {config.side.name}: it has no side feature per layer to "
                f"teach or to pool; use --method side with it, or --side {' or '.join(teachers)}."
            )
        self.shallow_weight, self.deep_weight = feature_weights(config.loss, type(self.side))
        self.distiller = FeatureDistiller(
            backbone.layouts,
            self._feature_layouts(),
            protect_first=backbone.has_cls,
            config=config.distill,
            imitate=self.shallow_weight > 0,
            generate=self.deep_weight > 0,
        )
        modules: dict[str, nn.Module] = {
            "side": self.side,
            "distiller": self.distiller,
            "side_head": self.task.new_head(self.side.pooled_width(backbone)),
            "head": self.new_head(),
        }
        if config.distill.phi_logits:
            modules["phi_logits"] = same(self.task.width)
        return nn.ModuleDict(modules)

    def _feature_layouts(self) -> dict[int, Layout]:
        """Return how each s_l lies that is distilled, by layer."""
        layouts, depth = self.backbone.layouts, self.backbone.depth
        layers = self.side.feature_layers
        found = {layer: self.side.feature_layout(layer, layouts) for layer in layers}
        if self.config.distill.last_layer:
            found[depth] = self.side.last_layout(layouts)
        return found

    def tuned(self) -> Parameters:
        return self.engine.trained(self.distiller.shallow + self.distiller.deep)

    def side_forward(self, trace: Trace, blocked: bool) -> SideOutput:
        """Run the side network on detached taps."""
        taps = trace.taps[: self.side.last_tap + 1]
        with self.autocast(taps[0]):
            blocks = FrozenBlocks(self.backbone, trace, blocked=blocked)
            output: SideOutput = self.side(taps, trace.mask, blocks)
        return output

    def side_pooled(self, trace: Trace, output: SideOutput, blocked: bool) -> Tensor:
        """Return what the side network's head reads [B, D], float32."""
        with self.autocast(output.tokens):
            pooled = pool_side(self.backbone, self.side, output, trace.mask, blocked=blocked)
        return pooled.float()

    @contextlib.contextmanager
    def teachers_norms(self) -> Iterator[None]:
        """Give the backbone the norms that the side network reads; the student's come back."""
        own = {name: self.backbone_weights[name].data for name in self.untouched}
        for name, value in own.items():
            self.untouched[name] = self.untouched[name].to(value.device)
            self.backbone_weights[name].data = self.untouched[name]
        try:
            yield
        finally:
            for name, value in own.items():
                self.backbone_weights[name].data = value

    @property
    def turns(self) -> int:
        """Return how many optimiser steps train each tensor once."""
        return 2 if self.config.train.turns == "alternate" else 1

    def moved(self, step: int) -> dict[str, Parameters]:
        """Return what optimiser step `step` (0-based) trains, by group."""
        if self.turns == 1:
            return self.groups
        side = step % 2 == 0
        return {
            "phi_logits" if group == "side" and not side else group: kept
            for group, tensors in self.groups.items()
            if (kept := {k: p for k, p in tensors.items() if _of_side_pass(group, k) == side})
        }

    def step(self, batch: Batch) -> Parts:
        teaches = self.turns == 1 or batch.step % 2 == 0  # the side network learns to
        follows = self.turns == 1 or not teaches
        shared = follows and not self.untouched  # one forward for both passes
        with part("taps"), self.teachers_norms():
            trace = self._forward(batch, graph=shared)
        tokens = self.distiller.mask_tokens(trace.taps)
        hidden = self.distiller.draw_mask(
            batch.keys, tokens, self.config.train.seed, batch.step
        ).to(trace.taps[0].device)
        with part("side pass"), torch.set_grad_enabled(teaches), self.teachers_norms():
            losses, teacher, features = self._side_pass(batch, trace, hidden)
        if self.untouched:
            trace.drop()
            with part("taps"):
                trace = self._forward(batch, graph=follows)
        with part("backbone pass"), torch.set_grad_enabled(follows):
            student = self._backbone_pass(batch, trace, hidden, teacher, features)
        student["loss"] += losses["loss"]
        return losses | student

    def _forward(self, batch: Batch, *, graph: bool) -> Trace:
        """Run the backbone; inputs that were cast for it are gone behind it."""
        run = self.engine.forward if graph else self.frozen_trace
        return run(self.cast(batch.inputs))

    def _side_pass(
        self, batch: Batch, trace: Trace, hidden: Tensor
    ) -> tuple[Parts, Tensor, dict[int, Tensor]]:
        weights = self.config.loss
        blocked = not self.config.train.late_norm_grad
        output = self.side_forward(trace, blocked)
        features = output.features | {self.backbone.depth: output.last(self.backbone.depth)}
        with self.autocast(trace.taps[0]):
            shallow, deep = self.distiller(features, trace.taps, hidden, trace.mask)
        shallow, deep = shallow / batch.count, deep / batch.count
        # last, so that its wide gradients come and go before those of the features are there
        raw = self.head("side_head").raw(self.side_pooled(trace, output, blocked))
        task = self.task.loss(raw, batch.labels) / batch.weight
        loss = weights.task * task + self.shallow_weight * shallow + self.deep_weight * deep
        if loss.requires_grad:
            loss.backward()
        losses = {"loss": loss, "loss_task": task, "loss_shallow": shallow, "loss_deep": deep}
        kept = {}
        if self.config.train.norm_grad == "local":
            kept = {layer: feature.detach() for layer, feature in features.items()}
        return {name: value.detach() for name, value in losses.items()}, raw.detach(), kept

    def _backbone_pass(
        self,
        batch: Batch,
        trace: Trace,
        hidden: Tensor,
        teacher: Tensor,
        features: dict[int, Tensor],
    ) -> Parts:
        losses: Parts = {}
        mask, weights = trace.mask, self._student_weights(batch)

        def top_loss(top: Tensor) -> Tensor:
            terms = self._student_terms(top, mask, teacher, batch)
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
            losses.update({name: term.detach() for name, term in {"loss": loss, **terms}.items()})
            return loss

        if torch.is_grad_enabled():
            layer_loss = self._layer_loss(features, hidden, mask, batch.count)
            self.engine.backward(trace, top_loss, layer_loss)
        else:
            top_loss(trace.ends[-1])
        return losses

    def felt(self, batch: Batch) -> float | None:
        """Return ‖g_logits‖ / (‖g_logits‖ + ‖g_task‖) of norms and deployed head, at the weights set.

        Gradients that were there come back. Call it in eval mode: then it draws nothing, moves no
        statistic, and holds no more than the step it looks into.
        """
        weights = self._student_weights(batch)
        if not weights["loss_logits"]:
            return 0.0
        trained = [p for group in self.groups.values() for p in group.values()]
        kept = [p.grad for p in trained]
        pulls = {name: self._pull(name, weight, batch, trained) for name, weight in weights.items()}
        for tensor, gradient in zip(trained, kept, strict=True):
            tensor.grad = gradient
        total = sum(pulls.values())
        return pulls["loss_logits"] / total if total else 0.0

    def _pull(self, name: str, weight: float, batch: Batch, trained: list[nn.Parameter]) -> float:
        """Return the norm of one student term's gradient on norms and deployed head."""
        if not weight:
            return 0.0
        for tensor in trained:
            tensor.grad = None
        inputs = self.cast(batch.inputs)
        trace = self.engine.forward(inputs)
        with torch.no_grad(), self.teachers_norms():
            read = self.frozen_trace(inputs) if self.untouched else trace
            pooled = self.side_pooled(read, self.side_forward(read, blocked=True), blocked=True)
            teacher = self.head("side_head").raw(pooled)
            del read
        mask, distilled = trace.mask, self.distiller.shallow + self.distiller.deep
        self.engine.backward(
            trace,
            lambda top: weight * self._student_terms(top, mask, teacher, batch)[name],
            lambda layer, tap: 0.0 * tap.sum() if layer in distilled else tap.new_zeros(()),
        )
        student = [
            p for group, them in self.groups.items() if group != "side" for p in them.values()
        ]
        return float(nn.utils.get_total_norm([p.grad for p in student if p.grad is not None]))

    def _student_weights(self, batch: Batch) -> dict[str, float]:
        """Return the weights of `_student_terms` at a batch's place in the run; 0 leaves one out."""
        counts = batch.progress >= self.loss.logits_after
        return {
            "loss_logits": self.loss.logits if counts else 0.0,
            "loss_student": self.config.train.student_task_weight,
        }

    def _student_terms(
        self, top: Tensor, mask: Tensor | None, teacher: Tensor, batch: Batch
    ) -> Parts:
        """Return the losses on Y_B, from b_L [B, N, D] and the detached Y_S [B, C]."""
        raw = self.head("head").raw(self.backbone.finish(top, mask).float())
        seen = self.modules["phi_logits"](raw) if self.config.distill.phi_logits else raw
        distance = self.task.distance(seen, teacher, batch.labels, self.loss, answer=raw)
        terms = {"loss_logits": distance / batch.count}
        if self.config.train.student_task_weight:
            terms["loss_student"] = self.task.loss(raw, batch.labels) / batch.weight
        return terms

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
        deployed = self.backbone.finish(trace.taps[-1], trace.mask).float()
        with self.teachers_norms():
            read = self.frozen_trace(inputs) if self.untouched else trace
            pooled = self.side_pooled(read, self.side_forward(read, blocked=True), blocked=True)
        return {
            "deployed": self.modules["head"](deployed),
            "side": self.modules["side_head"](pooled),
        }
