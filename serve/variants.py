"""Which models are compared: the deployed one, the bare backbone, and rivals with a side network.

`deployed` is timed twice, the second time as its own A/A control. `bare` is the same head on the
backbone's own norms. Every other rival keeps its side network at inference, which is what methods
without fading must do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mdpd_deploy.config import SIDE_ALIASES
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.model import Deployed, WithSide
from mdpd_deploy.serve.latency_report import CONTROL, DEPLOYED
from mdpd_deploy.sides import SIDES

BARE = "bare"
DEFAULT_RIVALS = (BARE, "unipt", "sherl")

Model = Deployed | WithSide


class RunModels(Protocol):
    """What a run offers here (`mdpd_deploy.run.Run`)."""

    def load_deployed(self) -> Model: ...

    def load_bare(self) -> Model: ...

    def load_with_side(self, name: str | None = None) -> tuple[WithSide, bool]: ...


@dataclass(frozen=True)
class Variant:
    """One model of the comparison; it has a PyTorch model, a ready graph, or both.

    Attributes:
        name: As the tables call it.
        what: One sentence.
        load: Returns the PyTorch model, and whether its weights are trained; None when only a
            graph exists (a bundle without its run).
        graph: Returns a ready ONNX graph, written below the given folder if need be; None = export
            the model.
    """

    name: str
    what: str
    load: Callable[[], tuple[Model, bool]] | None = None
    graph: Callable[[Path], Path] | None = None


def rival_names(asked: Sequence[str]) -> tuple[str, ...]:
    """Check and normalise rival names: `side:unipt` → `unipt`, `dtl` → `dtlv1`.

    Raises:
        UserError: For no name, or one that is neither `bare` nor a side network.
    """
    if not asked:
        raise UserError(f"--rivals: name at least one of {', '.join((BARE, *SIDES))}.")
    names = []
    for given in asked:
        name = given.strip().removeprefix("side:")
        name = SIDE_ALIASES.get(name, name)
        if name != BARE and name not in SIDES:
            raise unknown("--rivals", given, (BARE, *SIDES))
        names.append(name)
    return tuple(dict.fromkeys(names))


def variants_of_run(
    run: RunModels, rivals: Sequence[str], *, graph: Path | None = None
) -> list[Variant]:
    """Return deployed, its control, and the rivals, built from a run.

    Args:
        run: The training run.
        rivals: Names from `rival_names`.
        graph: The graph of a bundle of this run, timed as `deployed`; None exports the model.
    """

    def deployed() -> tuple[Model, bool]:
        return run.load_deployed(), True

    ready = None if graph is None else _ready(graph)
    variants = [
        Variant(DEPLOYED, "the model that is deployed", deployed, ready),
        Variant(CONTROL, "the deployed model a second time", deployed, ready),
    ]
    return variants + [_rival(run, name) for name in rivals]


def variants_of_methods(base: RunModels, others: Mapping[str, RunModels]) -> list[Variant]:
    """Return what several methods deploy, beside backbone + head and its control.

    Args:
        base: The run whose backbone and head stand for every method that deploys just these.
        others: Label → the run of a method that deploys more.
    """

    def bare() -> tuple[Model, bool]:
        return base.load_bare(), True

    def deployed_by(run: RunModels) -> Callable[[], tuple[Model, bool]]:
        return lambda: (run.load_deployed(), True)

    variants = [
        Variant(DEPLOYED, "backbone and head", bare),
        Variant(CONTROL, "backbone and head a second time", bare),
    ]
    return variants + [
        Variant(label, f"what {label} deploys", deployed_by(run)) for label, run in others.items()
    ]


def variants_of_bundle(
    graph: Path, write_bare: Callable[[Path], Path], rivals: Sequence[str]
) -> list[Variant]:
    """Return deployed, its control and `bare` for a bundle whose run is not there.

    Args:
        graph: The bundle's graph.
        write_bare: Writes the same graph with the backbone's own norm values to a path
            and returns it.
        rivals: Names from `rival_names`.

    Raises:
        UserError: For a rival other than `bare`: its side network lies in the run.
    """
    others = [name for name in rivals if name != BARE]
    if others:
        raise UserError(
            f"--rivals {','.join(others)}: a bundle without its run can only be compared with "
            f"{BARE}. Name the run instead, or use --rivals {BARE}."
        )

    def bare_graph(folder: Path) -> Path:
        return write_bare(folder / f"{BARE}.onnx")

    ready = _ready(graph)
    variants = [
        Variant(DEPLOYED, "the bundle's graph", graph=ready),
        Variant(CONTROL, "the bundle's graph a second time", graph=ready),
    ]
    if BARE in rivals:
        what = "the same graph with the backbone's own norm values"
        variants.append(Variant(BARE, what, graph=bare_graph))
    return variants


def _ready(graph: Path) -> Callable[[Path], Path]:
    return lambda _: graph


def _rival(run: RunModels, name: str) -> Variant:
    if name == BARE:
        what = "the same head on the untouched backbone"
        return Variant(name, what, lambda: (run.load_bare(), True))
    what = f"backbone with the side network {name} kept at inference"
    return Variant(name, what, lambda: run.load_with_side(name))
