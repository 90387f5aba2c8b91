"""Several tasks on one input: the plain part of the backbone runs once (DTL's feature reuse).

Side networks leave the blocks below them as they were pretrained, so tasks tuned on one backbone
share them: blocks 1..M with DTL, all but the late block with SHERL, all with UniPT and LST.
Source of the idea: DTL (AAAI 2024), section 3.3.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.errors import UserError
from mdpd_deploy.model import WithSide, named


class SharedTasks(nn.Module):
    """The models of several tasks over one backbone.

    Args:
        models: At least one, all over equal backbones; the first one's is kept, the others' are let
            go.
        names: One per model; default: their positions.
    """

    def __init__(self, models: Sequence[WithSide], names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.names = tuple(names or map(str, range(len(models))))
        self.backbone = models[0].backbone
        for model in models:
            model.backbone = self.backbone
        self.models = nn.ModuleList(models)
        self.last_tap = max(model.side.last_tap for model in models)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return task name → outputs [B, C]; inputs in the order of `backbone.input_names`."""
        batch = named(self.backbone, inputs)
        trace = self.backbone.trace(batch, last=self.last_tap)
        found = {}
        for name, model in zip(self.names, self.models, strict=True):
            assert isinstance(model, WithSide)
            found[name] = model.answer(trace)
        return found


def load_shared(runs: Sequence[Run]) -> SharedTasks:
    """Load runs of `--method side` as one model (float32, eval mode), named by their folders.

    Raises:
        UserError: If a run tuned the backbone itself, or two have other backbones, inputs or names.
    """
    if not runs:
        raise UserError("name at least one run of --method side.")
    first = runs[0]
    for run in runs:
        if run.keeps != "side network":
            raise UserError(
                f"{run.path} was trained with --method {run.config.method}, which tunes the "
                "backbone itself: only runs of --method side share its blocks."
            )
        if run.summary["backbone"]["sha256"] != first.summary["backbone"]["sha256"]:
            raise UserError(f"{run.path} and {first.path} have other backbones: share one.")
        if run.preprocess != first.preprocess:
            raise UserError(f"{run.path} and {first.path} prepare their inputs in other ways.")
    names = [run.path.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"two runs are named {max(names, key=names.count)}: rename a folder.")
    return SharedTasks([run.load_with_side()[0] for run in runs], names).eval()
