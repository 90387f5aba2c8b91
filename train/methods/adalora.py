"""AdaLoRA: LoRA whose rank moves to the layers that need it, by the library peft's allocator.

After every optimiser step the allocator updates the importance of each triplet (a singular value
with its two vectors) from the gradients. After a tenth of the run it begins to zero the least
important ones; at half of it the budget is reached, and what is left trains on (paper: sections 3.2
and 3.3; the two shares are ours, since the paper gives steps per task). The penalty that keeps the vectors
orthogonal (Eq. 4) is computed here as in peft, whose own needs a model that returns its loss.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mdpd_deploy.adapters.layers import ADAPTER
from mdpd_deploy.train.methods.adapters import Adapted
from mdpd_deploy.train.methods.base import METHODS, Batch, Parts

if TYPE_CHECKING:
    from peft import AdaLoraConfig, AdaLoraModel

WARM_UP, FINAL = 0.1, 0.5  # shares of the steps without pruning, and with the final budget
ROUNDS = 100  # about as many prunings in between
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # the allocator's attributes, by parameter name


@METHODS.register("adalora")
class AdaLora(Adapted):
    """Updates in the form of a singular value decomposition, pruned to a budget."""

    default_lr = 1e-3  # the paper's on GLUE: 5e-4 to 2.2e-3
    peft_options = ("rank", "alpha", "dropout", "targets")
    loss_names = ("loss", "loss_task", "loss_orthogonal")

    @property
    def model(self) -> "AdaLoraModel":
        """peft's handle on the adapter."""
        return cast("AdaLoraModel", self.tuner)

    @property
    def options(self) -> "AdaLoraConfig":
        """What peft's allocator goes by, its schedule and the triplets that are left included."""
        return cast("AdaLoraConfig", self.model.peft_config[ADAPTER])

    def step(self, batch: Batch) -> Parts:
        raw = self.head("head").raw(self.pooled(batch.inputs))
        task = self.task_loss(raw, batch.labels) / batch.weight
        share = len(batch.labels) / batch.count  # the parts of a step add up to one penalty
        penalty = self.options.orth_reg_weight * self.orthogonality() * share
        loss = task + penalty
        loss.backward()
        losses = {"loss": loss, "loss_task": task, "loss_orthogonal": penalty}
        return {name: value.detach() for name, value in losses.items()}

    def orthogonality(self) -> Tensor:
        """Return the mean of ‖Q Qᵀ − I‖ and ‖Pᵀ P − I‖ (Frobenius) over all layers, Eq. 4."""
        distances = []
        for name, vectors in self.backbone_weights.items():
            if "lora_E" not in name:
                rows = vectors if "lora_A" in name else vectors.T  # [r, in] or [r, out]
                identity = torch.eye(len(rows), device=rows.device)
                distances.append(torch.linalg.matrix_norm(rows @ rows.T - identity))
        return torch.stack(distances).mean()

    def after_step(self, step: int, steps: int) -> None:
        options = self.options
        options.total_step = steps
        options.tinit = int(WARM_UP * steps)
        options.tfinal = int(FINAL * steps)
        options.deltaT = max(1, steps // ROUNDS)
        self.model.update_and_allocate(step)

    def may_deploy(self, step: int, steps: int) -> bool:
        """Whether the budget is reached; until then more triplets are left than it allows."""
        return step > steps - int(FINAL * steps) or step == steps

    def extra_state(self) -> dict[str, Tensor]:
        """Return the importance of every number, and which triplets are left."""
        allocator = self.model.rankallocator
        state = {
            f"{score}/{name}": tensor
            for score in SCORES
            for name, tensor in getattr(allocator, score).items()
        }
        pattern = self.options.rank_pattern or {}
        return state | {f"left/{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        named: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*SCORES, "left")}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            named[kind][name] = tensor.to(self.backbone_weights[name].device)
        for score in SCORES:
            setattr(self.model.rankallocator, score, named[score])
        left = {name: kept.tolist() for name, kept in named["left"].items()}
        self.options.rank_pattern = left or None
