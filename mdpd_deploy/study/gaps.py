"""How far two methods of a study lie apart, seed by seed and test example by test example."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.outputs import read_outputs
from mdpd_deploy.report.intervals import crossed_interval, student_interval
from mdpd_deploy.study.trial import Outcome
from mdpd_deploy.tasks.metrics import pseudo_values

FEWEST_SEEDS = 3  # for an interval of a difference


@dataclass(frozen=True)
class Scored:
    """A method's primary metric on one split, seed by seed.

    Attributes:
        scores: Seed → metric.
        parts: Seed → the metric on groups of examples [G] (`pseudo_values`); empty where a run has
            not kept its outputs.
    """

    scores: Mapping[int, float]
    parts: Mapping[int, NDArray[np.float64]]

    @classmethod
    def of(cls, seeds: Mapping[int, Outcome], split: str) -> "Scored":
        """Read a method's runs; below three seeds only the metric is read."""
        scores = {seed: s for seed, found in seeds.items() if (s := found.score(split)) is not None}
        parts = {}
        for seed in scores if len(scores) >= FEWEST_SEEDS else ():
            outcome = seeds[seed]
            kept = read_outputs(outcome.run, split)
            if kept is None or outcome.summary is None:
                continue
            found = pseudo_values(outcome.summary["primary_metric"], *kept)
            if found is not None:
                parts[seed] = found
        return cls(scores, parts)


@dataclass(frozen=True)
class Gap:
    """How far a method is from another one.

    Attributes:
        mean: Its score − the other's, over the seeds that both have.
        ci95: Of that mean. With `examples` over seeds and test examples (`crossed_interval`), else
            over seeds only (Student's), which is too narrow: the test examples are a sample too.
        seeds: How many.
        examples: Whether the examples' sampling is in the interval.
    """

    mean: float
    ci95: tuple[float, float]
    seeds: int = 0
    examples: bool = False

    @classmethod
    def between(cls, one: Scored, other: Scored) -> "Gap | None":
        """Return the gap over common seeds; None below three, which tell nothing."""
        common = [seed for seed in one.scores if seed in other.scores]
        if len(common) < FEWEST_SEEDS:
            return None
        gaps = [one.scores[seed] - other.scores[seed] for seed in common]
        examples = all(seed in one.parts and seed in other.parts for seed in common)
        if examples:
            parts = np.stack([one.parts[seed] - other.parts[seed] for seed in common])
            _, low, high = crossed_interval(parts)
            centre = float(parts.mean())
        else:
            centre, low, high = student_interval(gaps)
        mean = float(np.mean(gaps))
        return cls(mean, (low - centre + mean, high - centre + mean), len(common), examples)
