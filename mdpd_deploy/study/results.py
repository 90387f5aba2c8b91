"""Finished trials as rows: what each method reached on each task, and what it cost."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from mdpd_deploy.artifacts.scores import key_of, split_name
from mdpd_deploy.study.gaps import FEWEST_SEEDS, Gap, Scored
from mdpd_deploy.study.schedule import CellOutcome
from mdpd_deploy.study.suites import OTHER, group_means, group_of

SCHEMA = 2


@dataclass(frozen=True)
class Spread:
    """Values of several seeds.

    Attributes:
        mean: Of the seeds.
        sd: Their standard deviation (n − 1); None of a single one.
    """

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return mean and standard deviation of at least one value."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Latency:
    """Time of a method's deployed model ÷ that of backbone + head, interleaved in one run.

    Attributes:
        ratio: As `latency.json` has it; 1 where the model is backbone + head itself.
        ci95: Its 95 % interval; None where nothing had to be measured.
        verdict: In words.
    """

    ratio: float
    ci95: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Row:
    """One method on one task.

    Attributes:
        task: Task name.
        method: Label of the method.
        metric: Primary metric.
        split: What `score` was measured on: the labelled test split where there is one, else
            validation.
        examples: How many that split holds.
        optimistic: Whether that split chose the learning rate or the weights kept.
        score: Deployed model, over seeds; None when every trial failed.
        scores: Seed → that score.
        gap: To the best of the task's methods with three seeds or more; None for that one, and below
            three common seeds.
        gaps: To every other method of the task with three common seeds, by label.
        validation: The same on validation, by which the learning rate was chosen.
        side: MDPD's side network on the same split as `score`.
        majority: What always answering the most frequent class scores on that split.
        factor: The chosen factor of the learning rate, and
        lr: that rate.
        sweep: Factor → validation metric on the first seed; None for a failed trial.
        trained: Trained parameters.
        deployed_delta: Parameters that deployment adds or changes.
        peak_live_bytes: Of a training step.
        train_s: Mean training time in seconds.
        failures: Trials that failed, each with its reason.
    """

    task: str
    method: str
    metric: str
    split: str
    examples: int | None
    optimistic: bool
    score: Spread | None
    scores: dict[int, float]
    gap: Gap | None
    validation: Spread | None
    side: Spread | None
    majority: float | None
    factor: float | None
    lr: float | None
    sweep: dict[str, float | None]
    trained: int | None
    deployed_delta: int | None
    peak_live_bytes: int | None
    train_s: float | None
    failures: tuple[str, ...]
    gaps: dict[str, Gap] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """All that a study found.

    Attributes:
        rows: By task, best first.
        latency: Label → `Latency`.
        latency_setting: Runtime, batch, device and task of the measurement; empty without one.
        facts: Backbone, steps, machine, versions: what a reader must know.
    """

    rows: tuple[Row, ...]
    latency: Mapping[str, Latency]
    latency_setting: str
    facts: Mapping[str, Any]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Results":
        """Return what `to_dict` has written."""
        own = {"rows", "latency", "latency_setting"}
        facts = {name: value for name, value in plain.items() if name not in own}
        return TypeAdapter(cls).validate_python({**plain, "facts": facts})

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task once, in order."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    @property
    def methods(self) -> tuple[str, ...]:
        """Every label once: those with a score on every task first, the best of them at the top."""
        labels = dict.fromkeys(row.method for row in self.rows)
        overall = {label: self.overall(label) for label in labels}
        order = {label: -9.0 if mean is None else mean for label, mean in overall.items()}
        return tuple(sorted(labels, key=order.__getitem__, reverse=True))

    def of(self, method: str) -> list[Row]:
        """Return a method's rows."""
        return [row for row in self.rows if row.method == method]

    def complete(self, method: str) -> bool:
        """Whether the method has a score on every task of the study."""
        return {row.task for row in self.of(method) if row.score} == set(self.tasks)

    def means(self, method: str) -> dict[str, float]:
        """Return a method's group means (`suites.group_means`)."""
        return group_means({row.task: row.score.mean for row in self.of(method) if row.score})

    def overall(self, method: str) -> float | None:
        """Return the one number of a method (`overall_words`); None unless it is complete."""
        if not self.complete(method):
            return None
        means = self.means(method)
        if means:
            return means.get("mean", next(iter(means.values())))
        return statistics.mean(row.score.mean for row in self.of(method) if row.score)

    @property
    def overall_words(self) -> str:
        """What `overall` is."""
        if len(self.tasks) == 1:
            row = next(row for row in self.rows if row.score is not None)
            return f"{row.metric} on {split_name(row.split, row.examples)}"
        groups = {group_of(task) for task in self.tasks} - {OTHER}
        if len(groups) > 1:
            return f"mean of {len(groups)} groups"
        counted = [task for task in self.tasks if group_of(task) in groups] or self.tasks
        return f"mean score over {len(counted)} tasks"

    def to_dict(self) -> dict[str, Any]:
        """Return compare.json, in the types that JSON has."""
        plain = {
            "schema": SCHEMA,
            **self.facts,
            "rows": [asdict(row) for row in self.rows],
            "groups": {label: self.means(label) for label in self.methods},
            "latency_setting": self.latency_setting,
            "latency": {label: asdict(latency) for label, latency in self.latency.items()},
        }
        return json.loads(json.dumps(plain))


def collect(
    cells: Sequence[CellOutcome],
    *,
    latency: Mapping[str, Latency],
    latency_setting: str,
    facts: Mapping[str, Any],
) -> Results:
    """Turn the outcomes of a study into its results."""
    tasks = list(dict.fromkeys(outcome.cell.task for outcome in cells))
    rows = [_row(outcome) for outcome in cells]
    rows.sort(key=lambda row: (tasks.index(row.task), -row.score.mean if row.score else 9.0))
    scored = {
        (outcome.cell.task, outcome.cell.method): Scored.of(outcome.seeds, _split(outcome))
        for outcome in cells
    }
    rows = [replace(row, gaps=_gaps(row, scored)) for row in rows]
    best = {row.task: row.method for row in reversed(rows) if len(row.scores) >= FEWEST_SEEDS}
    rows = [replace(row, gap=row.gaps.get(best.get(row.task, ""))) for row in rows]
    return Results(tuple(rows), latency, latency_setting, facts)


def _gaps(row: Row, scored: Mapping[tuple[str, str], Scored]) -> dict[str, Gap]:
    own = scored[row.task, row.method]
    return {
        method: gap
        for (task, method), other in scored.items()
        if task == row.task
        and method != row.method
        and (gap := Gap.between(own, other)) is not None
    }


def _summaries(outcome: CellOutcome) -> list[dict[str, Any]]:
    return [found.summary for found in outcome.seeds.values() if found.summary is not None]


def _split(outcome: CellOutcome) -> str:
    return "test" if any("metrics_test" in s for s in _summaries(outcome)[:1]) else "validation"


def _row(outcome: CellOutcome) -> Row:
    cell, seeds, split = outcome.cell, outcome.seeds, _split(outcome)
    summaries = _summaries(outcome)
    first: dict[str, Any] = summaries[0] if summaries else {}
    scores = {seed: s for seed, found in seeds.items() if (s := found.score(split)) is not None}
    tried = [(factor, cell.seeds[0], found) for factor, found in outcome.sweep.items()]
    tried += [
        (outcome.factor or 1.0, seed, o) for seed, o in seeds.items() if seed != cell.seeds[0]
    ]
    metric, params = first.get("primary_metric", ""), first.get("params", {})
    chosen_on_it = len(outcome.sweep) > 1 or first.get("weights_chosen_on") == split
    return Row(
        task=cell.task,
        method=cell.method,
        metric=metric,
        split=split,
        examples=first.get("data", {}).get(split),
        optimistic=split == "validation" and chosen_on_it,
        score=_spread(scores.values()),
        scores=scores,
        gap=None,
        validation=_spread(found.score() for found in seeds.values()),
        side=_spread(s[key_of("metrics", split)].get("side", {}).get(metric) for s in summaries),
        majority=first.get(key_of("majority", split), {}).get(metric),
        factor=outcome.factor,
        lr=outcome.lr,
        sweep={f"{factor:g}": found.score() for factor, found in outcome.sweep.items()},
        trained=params.get("trained"),
        deployed_delta=params.get("deployed_delta"),
        peak_live_bytes=first.get("memory", {}).get("peak_live_bytes"),
        train_s=statistics.mean(s["time"]["train_s"] for s in summaries) if summaries else None,
        failures=tuple(
            f"lr×{factor:g} seed {seed}: {found.reason}"
            for factor, seed, found in tried
            if found.reason
        ),
    )


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None
