"""Which models are compared: the deployed one, the bare backbone, and its rivals.

`deployed` is timed twice, the second time as its own A/A control. `bare` is the same head on the
backbone's own norms. The other rivals are what other methods deploy: a side network, adapter layers or virtual
tokens beside the backbone, or the backbone's graph with other values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from mdpd_deploy.adapters import LAYERS, TOKENS
from mdpd_deploy.config import SIDE_ALIASES
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.model import TaskModel
from mdpd_deploy.serve.latency.report import CONTROL, DEPLOYED
from mdpd_deploy.sides import SIDES

BARE = "bare"
DEFAULT_RIVALS = (BARE, "unipt", "sherl")


class RunModels(Protocol):
    """What a run offers here (`mdpd_deploy.artifacts.run.Run`).

    A rival comes with whether its weights are the run's; others are random or the backbone's own.
    """

    def load_deployed(self) -> TaskModel: ...

    def load_bare(self) -> TaskModel: ...

    def load_merged(self, method: str) -> tuple[TaskModel, bool]: ...

    def load_unmerged(self, method: str) -> tuple[TaskModel, bool]: ...

    def load_with_tokens(self, method: str) -> tuple[TaskModel, bool]: ...

    def load_with_side(
        self, name: str | None = None, *, late_layers: int = 1
    ) -> tuple[TaskModel, bool]: ...


@dataclass(frozen=True)
class Rival:
    """What a run can be compared with.

    Attributes:
        what: One sentence.
        load: Returns the model, and whether its weights are trained.
    """

    what: str
    load: Callable[[RunModels], tuple[TaskModel, bool]]


def _merged(method: str) -> Rival:
    what = f"the backbone's graph with the values that {method} leaves"
    return Rival(what, lambda run: run.load_merged(method))


def _unmerged(method: str) -> Rival:
    what = f"backbone with the layers of {method} beside its own"
    return Rival(what, lambda run: run.load_unmerged(method))


def _tokens(method: str) -> Rival:
    what = f"backbone with the virtual tokens of {method} tuning"
    return Rival(what, lambda run: run.load_with_tokens(method))


def _side(name: str) -> Rival:
    what = f"backbone with the side network {name} kept at inference"
    return Rival(what, lambda run: run.load_with_side(name))


RIVALS: dict[str, Rival] = {
    BARE: Rival("the same head on the untouched backbone", lambda run: (run.load_bare(), True)),
    **{name: _side(name) for name in SIDES},
    "sherl-multi": Rival(
        "backbone with SHERL over two or more late blocks kept at inference",
        lambda run: run.load_with_side("sherl", late_layers=2),
    ),
    **{name: _merged(name) for name in ("full", *LAYERS)},
    **{f"{name}-unmerged": _unmerged(name) for name in LAYERS},
    **{name: _tokens(name) for name in TOKENS},
}


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
    load: Callable[[], tuple[TaskModel, bool]] | None = None
    graph: Callable[[Path], Path] | None = None


def rival_names(asked: Sequence[str]) -> tuple[str, ...]:
    """Check and normalise rival names: `side:unipt` → `unipt`, `dtl` → `dtlv1`.

    Raises:
        UserError: For no name, or an unknown one.
    """
    if not asked:
        raise UserError(f"--rivals: name at least one of {', '.join(RIVALS)}.")
    names = []
    for given in asked:
        name = given.strip().removeprefix("side:")
        name = SIDE_ALIASES.get(name, name)
        if name not in RIVALS:
            raise unknown("--rivals", given, RIVALS)
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

    def deployed() -> tuple[TaskModel, bool]:
        return run.load_deployed(), True

    ready = None if graph is None else _ready(graph)
    variants = [
        Variant(DEPLOYED, "the model that is deployed", deployed, ready),
        Variant(CONTROL, "the deployed model a second time", deployed, ready),
    ]
    return variants + [Variant(n, RIVALS[n].what, partial(RIVALS[n].load, run)) for n in rivals]


def variants_of_methods(base: RunModels, others: Mapping[str, RunModels]) -> list[Variant]:
    """Return what several methods deploy, beside backbone + head and its control.

    Args:
        base: The run whose backbone and head stand for every method that deploys just these.
        others: Label → the run of a method that deploys more.
    """

    def bare() -> tuple[TaskModel, bool]:
        return base.load_bare(), True

    def deployed_by(run: RunModels) -> Callable[[], tuple[TaskModel, bool]]:
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
        UserError: For a rival other than `bare`: it is built from the run.
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
