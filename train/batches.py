"""Which examples form which optimiser step, and how they become tensors.

Everything is a function of (seed, epoch, step): any process can name the examples of any step, so
losses are divided by the true size of the whole step, accumulation and several processes change
nothing but the order of additions, and a resumed run sees the very batches it would have seen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mdpd_deploy.config import Config
from mdpd_deploy.data.examples import Raw, Split
from mdpd_deploy.data.preprocess import Preprocess
from mdpd_deploy.tasks import Task
from mdpd_deploy.train.augment import build_augment, build_mix, drawn_from
from mdpd_deploy.train.methods import Batch

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """The steps of a run over n examples.

    Attributes:
        examples: n.
        batch: Examples per process and backward pass.
        accumulate: Backward passes per optimiser step.
        seed: Orders the epochs.
        world: Processes.
    """

    examples: int
    batch: int
    accumulate: int
    seed: int
    world: int = 1

    @property
    def step_size(self) -> int:
        """Examples per optimiser step; an epoch's last step may be smaller."""
        return self.batch * self.accumulate * self.world

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.step_size)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def members(self, step: int) -> Indices:
        """Return the positions of all examples of a step, over all processes."""
        order = np.random.default_rng([self.seed, self.epoch(step)]).permutation(self.examples)
        start = step % self.steps_per_epoch * self.step_size
        return order[start : start + self.step_size]

    def parts(self, step: int, rank: int) -> list[Indices]:
        """Return one process's share of a step, one array per backward pass."""
        mine = np.array_split(self.members(step), self.world)[rank]
        return [mine[i : i + self.batch] for i in range(0, len(mine), self.batch)]


class StepDataset(Dataset[list[Batch]]):
    """Step number → the batches of this process for it."""

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        task: Task,
        config: Config,
        schedule: Schedule,
        rank: int = 0,
    ) -> None:
        self.split = split
        self.preprocess = preprocess
        self.task = task
        self.schedule = schedule
        self.rank = rank
        self.augment = build_augment(config.data, preprocess)
        self.mix = build_mix(config.data, task)
        self.seed = config.train.seed
        self.weights = task.weights(split.labels)

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, step: int) -> list[Batch]:
        members = self.schedule.members(step)
        count = float(len(members))
        weight = float(self.weights[members].sum()) or 1.0  # a step of unweighted classes adds 0
        return [
            Batch(*self._mixed(keys, step, part), keys, step, count, weight)
            for part, keys in enumerate(self.schedule.parts(step, self.rank))
        ]

    def _mixed(self, keys: Indices, step: int, part: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs and labels of a part of a step; pictures are mixed within it.

        Whoever is mixed in is another of the part, so that its class weights still add up.
        """
        inputs, labels = self._inputs(keys, step), self._labels(keys)
        if self.mix is None:
            return inputs, labels
        with drawn_from(self.seed, step, self.rank, part):
            pictures, labels = self.mix(inputs["pixel_values"], labels)
        return {"pixel_values": pictures}, labels

    def _labels(self, keys: Indices) -> Tensor:
        wanted = torch.from_numpy(self.task.wanted(self.split.labels[keys]))
        return wanted.float() if wanted.is_floating_point() else wanted

    def _inputs(self, keys: Indices, step: int) -> dict[str, Tensor]:
        raws = [self.split.inputs[int(key)] for key in keys]
        if self.augment is None:
            return to_tensors(self.preprocess, raws)
        epoch = self.schedule.epoch(step)
        rows = [
            self.augment(raw, (self.seed, epoch, int(key)))
            for raw, key in zip(raws, keys, strict=True)
        ]
        return {"pixel_values": torch.from_numpy(np.stack(rows))}


def to_tensors(preprocess: Preprocess, raws: list[Raw]) -> dict[str, Tensor]:
    """Preprocess raw inputs into named tensors."""
    return {name: torch.from_numpy(array) for name, array in preprocess(raws).items()}


def step_loader(dataset: StepDataset, start: int, stop: int, workers: int) -> Iterator[list[Batch]]:
    """Yield the batches of steps start..stop-1 in order."""
    steps = range(start, stop)
    # The loader draws a base seed from the generator it is given, never from the global one,
    # whose state is part of what a resumed run replays.
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
            collate_fn=_as_is,
        )
    )


def _as_is(item: list[Batch]) -> list[Batch]:
    return item
