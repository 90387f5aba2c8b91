"""Any encoder of timm or transformers, taken whole: its own forward from inputs to features.

Its blocks and norms are found by watching one forward (`discover.py`), which is all that the methods
without a side network need. A side network must know how the tokens of its taps lie, and adapters
which layers are maps of the attention: only declared families say so (`vit.py`, `stages.py`,
`declared.py`).
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone, Inputs
from mdpd_deploy.backbones.build import explaining
from mdpd_deploy.backbones.discover import discover
from mdpd_deploy.backbones.transformer import choose_attention, random_texts
from mdpd_deploy.backbones.vit import image_preprocess, image_size, random_pictures, switch_fused
from mdpd_deploy.backbones.wrap import Run, Trace, plainly, wrapped
from mdpd_deploy.data.preprocess import ImagePreprocess, TextPreprocess
from mdpd_deploy.errors import UserError

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
            UserError: If the model does not map its input to features, or has no blocks.
        """
        self.eval()
        example = self.example_inputs(2)
        mend = "Take a model that maps one picture, or one text, to its features."
        with explaining(f"backbone.name: {self.name} cannot be run", mend):
            self.parts, features = discover(
                self.model, lambda: self.run_library(example, self.token_mask(example))
            )
        if features.ndim != 2 or len(features) != 2:
            raise UserError(
                f"backbone.name: {self.name} returns {tuple(features.shape)} for 2 inputs instead "
                f"of their features [2, D]. {mend}"
            )
        self.width = features.shape[1]
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

    def finish(self, x: Tensor, mask: Tensor | None, *, blocked: bool = False) -> Tensor:
        """Return x [B, D]: the library's forward ends behind the pooling."""
        return x

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

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random normalised pictures [B, 3, H, W]; the global random state is untouched."""
        return random_pictures(batch, image_size(self.model), next(self.model.parameters()).device)

    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Choose "sdpa" or "eager" for this instance, or within a module, only."""
        switch_fused(within or self.model, kind)


class _WholeLibrary(WholeModel):
    """A model of transformers."""

    def __init__(self, model: "PreTrainedModel", name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.set_attention("sdpa")

    def set_attention(self, kind: str, within: nn.Module | None = None) -> None:
        """Choose "sdpa" or "eager"; a model that has one form only keeps it."""
        model: Any = self.model
        choose_attention(model, kind)


class WholeText(_WholeLibrary):
    """A transformers text encoder, pooled over its real tokens, or as its own pooling does.

    Args:
        model: A model that maps `input_ids` to `last_hidden_state`.
        preprocess: Its tokenizer with the lengths in use.
        name: What the user called it, for messages.
        pooled: Take `pooler_output` where there is one, as a tower that was trained to be compared
            needs it: CLIP reads its end-of-text token, SigLIP the last one.
    """

    has_cls = True

    def __init__(
        self,
        model: "PreTrainedModel",
        preprocess: TextPreprocess,
        name: str,
        *,
        pooled: bool = False,
    ) -> None:
        super().__init__(model, name)
        self.preprocess = preprocess
        self.input_names = preprocess.input_names
        self.max_length = preprocess.max_length
        self.pooled = pooled
        self.has_cls = not pooled
        self.find_parts()

    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Tensor:
        """Run transformers' forward: [B, D]."""
        given = {name: inputs[name] for name in self.input_names if name in inputs}
        out = self.model(**given)
        pooled: Tensor | None = getattr(out, "pooler_output", None) if self.pooled else None
        return self.pool(out.last_hidden_state, mask) if pooled is None else pooled

    def token_mask(self, inputs: Inputs) -> Tensor | None:
        """Return the attention mask [B, N], 1 for real tokens."""
        return inputs.get("attention_mask")

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random texts of `tokens` tokens, every second one padded by a quarter."""
        config: Any = self.model.config
        assert isinstance(self.preprocess, TextPreprocess)
        device = next(self.model.parameters()).device
        return random_texts(self.preprocess, config.vocab_size, batch, tokens, device)


class WholePicture(_WholeLibrary):
    """A transformers vision encoder.

    Its features are `pooler_output` where the model has a pooling of its own that it was trained
    with (SigLIP's attention, the normed class token of DINOv2 and CLIP, the normed mean of BEiT and
    ConvNeXt); a dense pooler for another task is not loaded. Else they are the mean of the patch
    tokens [B, N, D] or of the map [B, C, H, W].

    Args:
        model: A model that maps `pixel_values` to `last_hidden_state`.
        preprocess: How its pictures are prepared.
        name: What the user called it, for messages.
    """

    input_names = ("pixel_values",)
    has_cls = False

    def __init__(self, model: "PreTrainedModel", preprocess: ImagePreprocess, name: str) -> None:
        super().__init__(model, name)
        self.preprocess = preprocess
        self.find_parts()

    def run_library(self, inputs: Inputs, mask: Tensor | None) -> Tensor:
        """Run transformers' forward: [B, D]."""
        pixels = inputs["pixel_values"]
        out: Any = self.model(pixel_values=pixels.to(next(self.model.parameters()).dtype))
        pooled: Tensor | None = getattr(out, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        tokens: Tensor = out.feature_maps[-1] if "feature_maps" in out else out.last_hidden_state
        if tokens.ndim == 4:
            return tokens.mean(dim=(2, 3))
        return tokens[:, prefix_of(self.model.config, tokens.shape[1], pixels) :].mean(dim=1)

    def example_inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """Return random normalised pictures [B, 3, H, W]; the global random state is untouched."""
        assert isinstance(self.preprocess, ImagePreprocess)
        return random_pictures(batch, self.preprocess.size, next(self.model.parameters()).device)


def prefix_of(config: Any, tokens: int, pixels: Tensor) -> int:
    """Return how many of a model's tokens stand before those of its patches; 0 where unknown."""
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        return 0
    height, width = pixels.shape[2:]
    patches = (height // patch) * (width // patch)
    return tokens - patches if 0 <= tokens - patches < patches else 0
