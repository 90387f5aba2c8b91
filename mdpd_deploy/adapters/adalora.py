"""AdaLoRA (ICLR 2023): W + P Λ Q, whose singular values Λ are pruned to a budget; peft's layers.

Every layer starts with 1.5 × `peft.rank` triplets (a singular value with its two vectors), as in
the paper, and keeps `peft.rank` of them on average: the rank moves to the layers that need it.

After every optimiser step peft's allocator updates the importance of each triplet from the
gradients. After a tenth of the run it begins to zero the least important ones; at half of it the
budget is reached, and what is left trains on (paper: sections 3.2 and 3.3; the two shares are ours,
since the paper gives steps per task). The penalty that keeps the vectors orthogonal (Eq. 4) is
computed here as in peft, whose own needs a model that returns its loss.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mdpd_deploy.adapters.layers import ADAPTER, LAYERS, Adapter, low_rank_targets
from mdpd_deploy.adapters.library import from_peft
from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.config import PeftConfig

if TYPE_CHECKING:
    from peft import AdaLoraConfig, AdaLoraModel

WARM_UP, FINAL = 0.1, 0.5  # shares of the steps without pruning, and with the final budget
ROUNDS = 100  # about as many prunings in between
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # the allocator's attributes, by parameter name


@LAYERS.register("adalora")
class AdaLora(Adapter):
    """Adds P Λ Q to the chosen linear layers; Λ starts at 0.

    Attributes:
        model: peft's handle on the layers.
    """

    default_lr = 1e-3  # the paper's on GLUE: 5e-4 to 2.2e-3
    options = ("rank", "alpha", "dropout", "targets")
    scales = ("lora_E",)
    penalty_names = ("loss_orthogonal",)

    model: "AdaLoraModel"

    def __init__(self, backbone: Backbone, config: PeftConfig, *, random: bool) -> None:
        options, model = from_peft("AdaLoraConfig", "AdaLoraModel")
        chosen = options(
            init_r=math.ceil(1.5 * config.rank),
            target_r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=low_rank_targets(backbone, config),
            init_lora_weights=not random,
            total_step=1,  # peft asks for a number; the schedule is set when the length is known
        )
        self.backbone = backbone
        self.model = model(backbone, chosen, ADAPTER)

    @property
    def schedule(self) -> "AdaLoraConfig":
        """What peft's allocator goes by, the triplets that are left included."""
        return cast("AdaLoraConfig", self.model.peft_config[ADAPTER])

    @property
    def triplets(self) -> dict[str, nn.Parameter]:
        """P, Λ and Q of every layer by name."""
        named = self.backbone.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad}

    def penalties(self) -> dict[str, Tensor]:
        """Return the mean of ‖Q Qᵀ − I‖ and ‖Pᵀ P − I‖ (Frobenius) over all layers, Eq. 4."""
        distances = []
        for name, vectors in self.triplets.items():
            if "lora_E" not in name:
                rows = vectors if "lora_A" in name else vectors.T  # [r, in] or [r, out]
                identity = torch.eye(len(rows), device=rows.device)
                distances.append(torch.linalg.matrix_norm(rows @ rows.T - identity))
        return {"loss_orthogonal": self.schedule.orth_reg_weight * torch.stack(distances).mean()}

    def after_step(self, step: int, steps: int) -> None:
        schedule = self.schedule
        schedule.total_step = steps
        schedule.tinit = int(WARM_UP * steps)
        schedule.tfinal = int(FINAL * steps)
        schedule.deltaT = max(1, steps // ROUNDS)
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
        pattern = self.schedule.rank_pattern or {}
        return state | {f"left/{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        named: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*SCORES, "left")}
        triplets = self.triplets
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            named[kind][name] = tensor.to(triplets[name].device)
        for score in SCORES:
            setattr(self.model.rankallocator, score, named[score])
        left = {name: kept.tolist() for name, kept in named["left"].items()}
        self.schedule.rank_pattern = left or None
