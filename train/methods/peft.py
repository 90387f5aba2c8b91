"""What the library peft trains: adapters and virtual tokens, a method for each of them.

Both are trained by plain back-propagation, so with the activations of the whole backbone. Adapters
are merged when training ends: what they deploy is backbone + head with other values. Virtual tokens
stay, and are paid for at every inference.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from mdpd_deploy.adapters import (
    LAYERS,
    TOKENS,
    Adapter,
    VirtualTokens,
    adapted_weights,
    build_tokens,
    inject,
    merged_weights,
)
from mdpd_deploy.artifacts.run import ADAPTER, DELTA
from mdpd_deploy.train.methods.base import METHODS, Files, Parameters, Parts, Weights
from mdpd_deploy.train.methods.batch import Batch
from mdpd_deploy.train.methods.direct import Direct


class Adapted(Direct):
    """Trains the layers that an adapter puts into the backbone, and the head."""

    backbone_group = "adapter"

    def build_modules(self) -> nn.ModuleDict:
        self.adapter = inject(self.backbone, self.config.method, self.config.peft)
        self.merged_numbers = sum(w.numel() for w in adapted_weights(self.backbone).values())
        return super().build_modules()

    def tuned(self) -> Parameters:
        return {name: p for name, p in self.backbone.named_parameters() if p.requires_grad}

    def train_mode(self) -> None:
        super().train_mode()
        for name, module in self.backbone.named_modules():
            if name.endswith(".lora_dropout"):
                module.train()  # a trained part's, whatever `backbone.dropout_active` says

    def step(self, batch: Batch) -> Parts:
        raw = self.head("head").raw(self.pooled(batch.inputs))
        return self.learn(raw, batch, self.adapter.penalties())

    def after_step(self, step: int, steps: int) -> None:
        self.adapter.after_step(step, steps)

    def may_deploy(self, step: int, steps: int) -> bool:
        return self.adapter.may_deploy(step, steps)

    def extra_state(self) -> dict[str, Tensor]:
        return self.adapter.extra_state()

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        self.adapter.load_extra_state(state)

    def model_files(self, original: Weights) -> Files:
        """Return the merged weights with the head, and the adapter as it was trained."""
        plain = original() if self.rounded else None
        merged = merged_weights(self.backbone, plain)
        merged = {f"backbone.{name}": tensor for name, tensor in merged.items()}
        head = {f"head.{name}": t for name, t in self.modules["head"].state_dict().items()}
        adapter = {f"adapter.{name}": p.detach() for name, p in self.backbone_weights.items()}
        return {DELTA: merged | head, ADAPTER: adapter}

    @property
    def deployed_delta(self) -> int:
        return self.merged_numbers + self.parameter_counts["head"]


class Tokens(Direct):
    """Trains virtual tokens and the head; the backbone stays exactly as it was."""

    added_group = "adapter"
    deploys_added = True

    def build_modules(self) -> nn.ModuleDict:
        self.tokens = build_tokens(self.backbone, self.config.method, self.config.peft)
        return nn.ModuleDict({"tokens": self.tokens, **super().build_modules()})

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.tokens(self.backbone, inputs)


def adapter_method(adapter: type[Adapter]) -> type[Adapted]:
    """Return the method that trains an adapter."""

    class Trained(Adapted):
        default_lr = adapter.default_lr
        peft_options = adapter.options
        scales = adapter.scales
        loss_names = ("loss", "loss_task", *adapter.penalty_names)

    return Trained


def tokens_method(tokens: type[VirtualTokens]) -> type[Tokens]:
    """Return the method that trains virtual tokens."""

    class Trained(Tokens):
        default_lr = tokens.default_lr
        peft_options = tokens.options

    return Trained


for name, adapter in LAYERS.items():
    METHODS.register(name)(adapter_method(adapter))
for name, tokens in TOKENS.items():
    METHODS.register(name)(tokens_method(tokens))
