"""Any encoder of timm or transformers, taken whole: its own forward from inputs to features.

Its blocks and norms are found by watching one forward (`discover.py`), which is all that the methods
without a side network need. A side network must know how the tokens of its taps lie, and adapters
which layers are maps of the attention: only declared families say so (`vit.py`, `stages.py`, `bert.py`).
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone, Inputs, Layer
from mdpd_deploy.backbones.bert import random_texts
from mdpd_deploy.backbones.discover import discover
from mdpd_deploy.backbones.vit import image_preprocess, image_size, random_pictures, switch_fused
from mdpd_deploy.backbones.wrap import Run, Trace, plainly, wrapped
from mdpd_deploy.data.preprocess import TextPreprocess
from mdpd_deploy.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WholeModel(Backbone):
    """A model whose parts were found rather than declared; its traces have no taps."""

    family = "whole"
    prefix_tokens = 0
    grid = None
    heads = 0
    pooling = "mean"
    has_taps = False
    model: nn.Module
    name: str

    def find_parts(self) -> None:
        """Watch one forward.

        Raises:
            UserError: If there is no norm to tune, or nothing to run again.
        """
        self.eval()
        example = self.example_inputs(2)
        features: list[Tensor] = []

        def forward() -> None:
            features.append(self.run_library(example, self.token_mask(example)))

        self.parts = discover(self.model, forward)
        self.width = features[0].shape[-1]
        if not self.parts.blocks:
            raise UserError(
                f"backbone.name: no blocks are found in {self.name} (a {type(self.model).__name__}): "
                "take a model that is built of residual blocks or transformer layers."
            )

    def blocks(self) -> Sequence[nn.Module]:
        """Return what is run again in the backward pass, in order."""
        return list(self.parts.blocks.values())

    def trace(
        self,
        inputs: Inputs,
        *,
        last: int | None = None,
        run: Run = plainly,
        mask: Tensor | None = None,
        keep_taps: bool = True,
    ) -> Trace:
        """Run the model to its features, the only end; it has no taps, whatever is asked of them."""
        trace = Trace(self.token_mask(inputs))
        with wrapped(self.blocks(), run):
            trace.ends.append(self.run_library(inputs, trace.mask))
        return trace

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the pooled features [B, D]."""
        mask = self.token_mask(inputs)
        return self.finish(self.run_library(inputs, mask), mask)

    def final_norm(self) -> nn.Module | None:
        """Return None: the library's forward ends behind its last norm."""
        return None

    def norms(self) -> dict[str, nn.Parameter]:
        """Return every tuned norm parameter by full name."""
        return self._parameters_of(self.parts.norms)

    def block_norms(self, index: int) -> dict[str, nn.Parameter]:
        """Return scale and shift of every tuned norm of one block, by full name."""
        name = list(self.parts.blocks)[index]
        return self._parameters_of(n for n in self.parts.norms if n.startswith(f"{name}."))

    def final_norm_parameters(self) -> dict[str, nn.Parameter]:
        """Return those of the norms that lie in no block."""
        return self._parameters_of(self.parts.last_norms)

    def thin_block(self, index: int, reduction: int) -> nn.Module:
        """Raise: no thinner copy of a block is known; see `require_taps`."""
        raise NotImplementedError

    def layers(self, index: int) -> tuple[Layer, ...]:
        """Raise: which layers are maps of the attention is not known; see `require_taps`."""
        raise NotImplementedError

    def embedding_weight(self) -> tuple[Tensor, int]:
        """Raise: which weight makes tokens is not known; see `require_taps`."""
        raise NotImplementedError

    def _parameters_of(self, norms: Iterable[str]) -> dict[str, nn.Parameter]:
        return {
            f"model.{norm}.{name}": parameter
            for norm in norms
            for name, parameter in self.model.get_submodule(norm).named_parameters(recurse=False)
        }


class WholeVision(WholeModel):
    """A timm model without its classifier; pooled as timm pools it.

    Args:
        model: As `timm.create_model(..., num_classes=0)` returns it.
        name: What the user called it, for messages.
    """

    input_names = ("pixel_values",)
    has_cls = False

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.preprocess = image_preprocess(model)
        self.set_attention("sdpa")
        self.find_parts()

    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Tensor:
        """Run timm's forward: [B, D]."""
        dtype = next(self.model.parameters()).dtype
        out: Tensor = self.model(inputs["pixel_values"].to(dtype))
        return out

    def finish(self, x: Tensor, mask: Tensor | None, *, blocked: bool = False) -> Tensor:
        """Return x: timm has pooled it."""
        return x

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random normalised pictures [B, 3, H, W]; the global random state is untouched."""
        return random_pictures(batch, image_size(self.model), next(self.model.parameters()).device)

    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Choose "sdpa" or "eager" for this instance, or within a module, only."""
        switch_fused(within or self.model, kind)


class WholeText(WholeModel):
    """A transformers text encoder, pooled over its real tokens.

    Args:
        model: A model that maps `input_ids` to `last_hidden_state`.
        preprocess: Its tokenizer with the lengths in use.
        name: What the user called it, for messages.
    """

    has_cls = True

    def __init__(self, model: "PreTrainedModel", preprocess: TextPreprocess, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.preprocess = preprocess
        self.input_names = preprocess.input_names
        self.max_length = preprocess.max_length
        self.set_attention("sdpa")
        self.find_parts()

    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Tensor:
        """Run transformers' forward: [B, N, D]."""
        given = {name: inputs[name] for name in self.input_names if name in inputs}
        out: Tensor = self.model(**given).last_hidden_state
        return out

    def token_mask(self, inputs: Inputs) -> Tensor | None:
        """Return the attention mask [B, N], 1 for real tokens."""
        return inputs.get("attention_mask")

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random texts of `tokens` tokens, every second one padded by a quarter."""
        config: Any = self.model.config
        return random_texts(self, config.vocab_size, batch, tokens)

    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Choose "sdpa" or "eager"; a model that has one form only keeps it."""
        if kind not in ("sdpa", "eager"):
            raise unknown("attention", kind, ("sdpa", "eager"))
        model: Any = self.model
        model.set_attn_implementation(kind if model._supports_sdpa else "eager")
