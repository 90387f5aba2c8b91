"""Adapters of the library peft, merged into the backbone when training ends: LoRA and IA3.

Trained by plain back-propagation, so with the activations of the whole backbone; what they deploy
is backbone + head with other values.
"""

from torch import nn

from mdpd_deploy.adapters import adapted_weights, inject, merged_weights
from mdpd_deploy.run import ADAPTER, DELTA
from mdpd_deploy.train.methods.base import METHODS, Files, Parameters, Weights
from mdpd_deploy.train.methods.direct import Direct


class Adapted(Direct):
    """Trains the layers that an adapter puts into the backbone, and the head."""

    backbone_group = "adapter"

    def build_modules(self) -> nn.ModuleDict:
        self.tuner = inject(self.backbone, self.config.method, self.config.peft)
        return super().build_modules()

    def tuned(self) -> Parameters:
        return {name: p for name, p in self.backbone.named_parameters() if p.requires_grad}

    def train_mode(self) -> None:
        super().train_mode()
        for name, module in self.backbone.named_modules():
            if name.endswith(".lora_dropout"):
                module.train()  # a trained part's, whatever `backbone.dropout_active` says

    def model_files(self, original: Weights) -> Files:
        """Return the merged weights with the head, and the adapter as it was trained."""
        plain = original() if self.held else None
        merged = merged_weights(self.backbone, plain)
        merged = {f"backbone.{name}": tensor for name, tensor in merged.items()}
        head = {f"head.{name}": t for name, t in self.modules["head"].state_dict().items()}
        adapter = {f"adapter.{name}": p.detach() for name, p in self.backbone_weights.items()}
        return {DELTA: merged | head, ADAPTER: adapter}

    @property
    def deployed_delta(self) -> int:
        merged = adapted_weights(self.backbone).values()
        return sum(weight.numel() for weight in merged) + self.parameter_counts["head"]


@METHODS.register("lora")
class Lora(Adapted):
    """Low-rank updates of the blocks' linear maps."""

    default_lr = 5e-4  # of the paper's RoBERTa-base on GLUE: 4e-4 to 5e-4
    peft_options = ("rank", "alpha", "dropout", "targets")


@METHODS.register("ia3")
class IA3(Adapted):
    """Scales of keys, values and the MLP's inner units."""

    default_lr = 3e-3  # T-Few's
