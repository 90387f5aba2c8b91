"""Virtual tokens of the library peft, paid for at every inference: a method for each of them."""

from collections.abc import Mapping

from torch import Tensor, nn

from mdpd_deploy.adapters import TOKENS, VirtualTokens, build_tokens
from mdpd_deploy.train.methods.base import METHODS, Parameters
from mdpd_deploy.train.methods.direct import Direct


class Tokens(Direct):
    """Trains virtual tokens and the head; the backbone stays exactly as it was."""

    added_group = "adapter"
    deploys_added = True

    def build_modules(self) -> nn.ModuleDict:
        self.tokens = build_tokens(self.backbone, self.config.method, self.config.peft)
        return nn.ModuleDict({"tokens": self.tokens, "head": self.new_head()})

    def tuned(self) -> Parameters:
        return {}

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.tokens(self.backbone, inputs)


def method_of(tokens: type[VirtualTokens]) -> type[Tokens]:
    """Return the method that trains virtual tokens."""

    class Trained(Tokens):
        default_lr = tokens.default_lr
        peft_options = tokens.options

    return Trained


for name, tokens in TOKENS.items():
    METHODS.register(name)(method_of(tokens))
