"""What a study runs: every combination that was asked for, each with its whole config.

A study's folder:

    STUDY/compare.yaml            the base config, and what was asked for, in order
    STUDY/trials/TASK/METHOD/lr×FACTOR-seedS/
        config.yaml  log.txt      what the child was given and what it said
        run/                      its run folder
    STUDY/compare.json  compare.md  report.html  latency/

Every method sweeps equally many learning rates: factors of its own default rate (or of `optim.lr`
where that is set), on the first seed. The best factor by validation metric is repeated with the
other seeds.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mdpd_deploy.config import Config, check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import write_text

SCHEMA = 1
LONGEST = 100  # bytes of a name that becomes a folder's
PLAN = "compare.yaml"


OfTasks = Mapping[str, Mapping[str, Any]]  # task → option by dotted name → value


@dataclass(frozen=True)
class Ask:
    """One request: every task with every method, rate factor and seed.

    Attributes:
        tasks: Task names.
        methods: Labels of methods, e.g. "mdpd:unipt".
        factors: Of a method's own learning rate; swept on the first seed.
        seeds: The first one is that of the sweep.
        left_out: One sentence for each task of a suite, or method of `all`, that could not be.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    factors: tuple[float, ...]
    seeds: tuple[int, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A task with a method, and all that was asked of the two."""

    task: str
    method: str
    factors: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        task: Task name.
        method: Label of the method.
        factor: Of the method's learning rate.
        seed: Of everything random.
        config: Everything, but for the run folder.
    """

    task: str
    method: str
    factor: float
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """Where it lies below STUDY/trials."""
        return Path(
            _plain(self.task), _plain(self.method), f"lr×{self.factor:.10g}-seed{self.seed}"
        )

    def __str__(self) -> str:
        return f"{self.task} {self.method} lr×{self.factor:g} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        base: The config that all trials share; its task, method, side network, seed and
            learning rate are those of the trials. `on_one_split` has settled its data.
        asks: What was asked for, oldest first.
        configs: Label → the base config with that method.
        rates: Label → the learning rate that a factor of 1 means.
        of_tasks: Task → options in which its trainings differ from `base`, and
        special: (task, label) → config and learning rate of these.
    """

    base: Config
    asks: tuple[Ask, ...]
    configs: Mapping[str, Config]
    rates: Mapping[str, float]
    of_tasks: OfTasks = field(default_factory=dict)
    special: Mapping[tuple[str, str], tuple[Config, float]] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """Return every task with every method once, in the order of asking."""
        found: dict[tuple[str, str], Cell] = {}
        for ask in self.asks:
            for task in ask.tasks:
                for method in ask.methods:
                    known = found.get((task, method), Cell(task, method, (), ()))
                    found[task, method] = Cell(
                        task,
                        method,
                        tuple(dict.fromkeys((*known.factors, *ask.factors))),
                        tuple(dict.fromkeys((*known.seeds, *ask.seeds))),
                    )
        return sorted(found.values(), key=lambda cell: self.tasks.index(cell.task))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task, in the order of asking."""
        return tuple(dict.fromkeys(task for ask in self.asks for task in ask.tasks))

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method's label, in the order of asking."""
        return tuple(dict.fromkeys(method for ask in self.asks for method in ask.methods))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Every task and method that an ask had to leave out, and why."""
        return tuple(dict.fromkeys(line for ask in self.asks for line in ask.left_out))

    def sweep(self, cell: Cell) -> list[Trial]:
        """Return the trials of a cell's learning rates, on the first seed."""
        return [self.trial(cell, factor, cell.seeds[0]) for factor in cell.factors]

    def repeats(self, cell: Cell, factor: float) -> list[Trial]:
        """Return the trials of the other seeds at the factor that was chosen."""
        return [self.trial(cell, factor, seed) for seed in cell.seeds[1:]]

    def trial(self, cell: Cell, factor: float, seed: int) -> Trial:
        """Return one trial of a cell."""
        usual = self.configs[cell.method], self.rates[cell.method]
        config, rate = self.special.get((cell.task, cell.method), usual)
        own = {"lr": rate}  # what is set for norms and head is swept alike
        own |= {
            name: rate
            for name in ("norm_lr", "head_lr")
            if (rate := getattr(config.optim, name)) is not None
        }
        rates = {name: _round(factor * rate) for name, rate in own.items()}
        changed = config.model_copy(
            update={
                "task": cell.task,
                "out": None,
                "optim": config.optim.model_copy(update=rates),
                "train": config.train.model_copy(update={"seed": seed}),
            }
        )
        return Trial(cell.task, cell.method, factor, seed, changed)


def on_one_split(base: Config) -> Config:
    """Let every seed of a study train and measure on the same examples of data that it splits."""
    if base.data.split_seed is not None:
        return base
    return base.model_copy(
        update={"data": base.data.model_copy(update={"split_seed": base.train.seed})}
    )


def write_plan(
    folder: Path, base: Config, asks: Sequence[Ask], of_tasks: OfTasks | None = None
) -> None:
    """Write STUDY/compare.yaml."""
    plain = {
        "schema": SCHEMA,
        "asks": [
            {part.name: list(getattr(ask, part.name)) for part in fields(ask)} for ask in asks
        ],
        "base": base.model_dump(mode="json"),
        **({"tasks": of_tasks} if of_tasks else {}),
    }
    write_text(folder / PLAN, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def read_plan(folder: Path) -> tuple[Config, tuple[Ask, ...], OfTasks]:
    """Read the base config, the asks and the tasks' own options of STUDY/compare.yaml.

    Raises:
        UserError: If it is missing, damaged or of another version.
    """
    path = folder / PLAN
    try:
        plain: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        if plain["schema"] != SCHEMA:
            raise UserError(f"{path} was not written by this version of mdpd: compare anew.")
        asks = tuple(
            Ask(**{name: tuple(values) for name, values in ask.items()}) for ask in plain["asks"]
        )
        if not all(ask.factors and ask.seeds for ask in asks):
            raise KeyError("an ask without factors or seeds")
        return check_config(plain["base"]), asks, plain.get("tasks", {})
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no folder that `mdpd compare` wrote (it has no {PLAN})."
        ) from None
    except (
        OSError,
        UnicodeDecodeError,
        yaml.YAMLError,
        KeyError,
        TypeError,
        AttributeError,
    ) as err:
        raise UserError(f"{path} cannot be read ({str(err).splitlines()[0]}).") from err


def _plain(name: str) -> str:
    """Return a name as a folder's; a long one is cut and made unique by its hash."""
    plain = name.replace("/", "-").replace(":", "-")
    if len(plain.encode()) <= LONGEST:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{plain.encode()[:LONGEST].decode(errors='ignore')}-{digest}"


def _round(rate: float) -> float:
    """Three significant digits, so that 3 × 1e-4 is 0.0003."""
    return float(f"{rate:.3g}")
