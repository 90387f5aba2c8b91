"""What is timed on a card: a backbone's deployed forms with random weights, and how they are run.

A deployed form is what `mdpd bench-latency` times, made without a run. The ways to run it are
PyTorch's eager mode, `torch.compile`, and a CUDA graph of the eager model.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mdpd_deploy.adapters import build_tokens, inject, merged_weights
from mdpd_deploy.backbones import Backbone, load_backbone
from mdpd_deploy.config import Config
from mdpd_deploy.model import Deployed, TaskModel, WithSide, WithTokens
from mdpd_deploy.sides import build_side, other_side
from mdpd_deploy.tasks.head import Head


class RandomModels:
    """What `serve.variants` asks of a run (`RunModels`), of a backbone with random weights.

    Every call returns a model of its own, so that it can stand for a fresh opening.

    Args:
        config: Backbone, side network and adapter options.
        outputs: C, classes.
    """

    def __init__(self, config: Config, outputs: int) -> None:
        self.config = config
        self.outputs = outputs
        data = config.data
        self._loaded = load_backbone(config.backbone, max_length=data.max_length, pad=data.pad)
        self.preprocess = self._loaded.preprocess

    def load_deployed(self) -> Deployed:
        """Return the faded model: other values in the norms, nothing beside the backbone."""
        backbone = self._backbone()
        for norm in backbone.norms().values():
            norm.data.add_(0.01 * torch.randn_like(norm))
        return self._with_head(backbone)

    def load_bare(self) -> Deployed:
        return self._with_head(self._backbone())

    def load_merged(self, method: str) -> tuple[Deployed, bool]:
        """Return the backbone with an adapter merged into its weights."""
        backbone = self._backbone()
        if method != "full":
            adapted = self._backbone()
            inject(adapted, method, self.config.peft, random=True)
            weights = dict(backbone.named_parameters())
            for name, value in merged_weights(adapted).items():
                weights[name].data.copy_(value)
        return self._with_head(backbone), False

    def load_unmerged(self, method: str) -> tuple[Deployed, bool]:
        backbone = self._backbone()
        inject(backbone, method, self.config.peft, random=True)
        return self._with_head(backbone), False

    def load_with_tokens(self, method: str) -> tuple[TaskModel, bool]:
        backbone = self._backbone()
        tokens = build_tokens(backbone, method, self.config.peft)
        return WithTokens(backbone, tokens, self._head(backbone)).eval(), False

    def load_with_side(
        self, name: str | None = None, *, late_layers: int = 1
    ) -> tuple[TaskModel, bool]:
        backbone = self._backbone()
        config = other_side(self.config.side, name or self.config.side.name)
        if late_layers > config.late_layers:
            config = config.model_copy(update={"late_layers": late_layers})
        side = build_side(backbone, config)
        return WithSide(backbone, side, self._head(backbone)).eval(), False

    def _backbone(self) -> Backbone:
        return copy.deepcopy(self._loaded)

    def _head(self, backbone: Backbone) -> Head:
        return Head(backbone.width, self.outputs)

    def _with_head(self, backbone: Backbone) -> Deployed:
        return Deployed(backbone, self._head(backbone)).eval()


class Compiled:
    """Compiles each variant once; its later openings run the same code on their own weights."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[..., Tensor]] = {}

    def __call__(self, name: str, model: nn.Module) -> nn.Module:
        if name not in self._functions:
            # Without `isolate_recompiles` variants of one class would search one list of graphs.
            self._functions[name] = torch.compile(
                _call, dynamic=False, fullgraph=True, isolate_recompiles=True
            )
        return _Through(model, self._functions[name])


def _call(model: nn.Module, *inputs: Tensor) -> Tensor:
    return model(*inputs)


class _Through(nn.Module):
    """A model that is called through a function."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.model, *inputs)


class Graphed(nn.Module):
    """A CUDA graph of a model, captured at the first call; inputs are copied to where it reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._graph: torch.cuda.CUDAGraph | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        if self._graph is None:
            self._capture(inputs)
        for place, tensor in zip(self._places, inputs, strict=True):
            place.copy_(tensor)
        assert self._graph is not None
        self._graph.replay()
        return self._output

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._places = [tensor.clone() for tensor in inputs]
        apart = torch.cuda.Stream()
        apart.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(apart):
            for _ in range(3):  # what a first call sets up must not be captured
                self.model(*self._places)
        torch.cuda.current_stream().wait_stream(apart)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output: Tensor = self.model(*self._places)
        self._graph = graph


Prepare = Callable[[str, nn.Module], nn.Module]

RUNTIMES: dict[str, Callable[[], Prepare]] = {
    "eager": lambda: lambda name, model: model,
    "compile": Compiled,
    "graphs": lambda: lambda name, model: Graphed(model),
}
WORDS: dict[str, Any] = {
    "eager": "PyTorch eager mode",
    "compile": "torch.compile (inductor, fixed shapes)",
    "graphs": "CUDA graph of the eager model",
}
