"""Virtual tokens of the library peft: prompt and prefix tuning, paid for at every inference."""

from collections.abc import Mapping

from torch import Tensor, nn

from mdpd_deploy.adapters import build_tokens
from mdpd_deploy.train.methods.base import METHODS, Parameters
from mdpd_deploy.train.methods.direct import Direct


class Tokens(Direct):
    """Trains virtual tokens and the head; the backbone stays exactly as it was."""

    added_group = "adapter"
    deploys_added = True
    peft_options = ("tokens",)

    def build_modules(self) -> nn.ModuleDict:
        self.tokens = build_tokens(self.backbone, self.config.method, self.config.peft)
        return nn.ModuleDict({"tokens": self.tokens, "head": self.new_head()})

    def tuned(self) -> Parameters:
        return {}

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.tokens(self.backbone, inputs)


@METHODS.register("prompt")
class Prompt(Tokens):
    """Tokens before those of the input."""

    default_lr = 3e-2  # of peft's examples; the paper's 0.3 is Adafactor's


@METHODS.register("prefix")
class Prefix(Tokens):
    """Keys and values before those of every block's attention; text only."""

    default_lr = 1e-2  # of P-tuning v2 for BERT on RTE, and of peft's example on MRPC
