"""Memory kept within a limit: `train.memory`, and what `train.batch=auto` and `train.norm_grad=auto` take."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mdpd_deploy.config import Config
from mdpd_deploy.errors import UserError
from mdpd_deploy.machine import free_memory_bytes
from mdpd_deploy.report.page import size
from mdpd_deploy.tasks import Task
from mdpd_deploy.train.memory.forecast import MemoryForecast, forecast
from mdpd_deploy.train.methods.base import METHODS, check_options
from mdpd_deploy.train.norm_grad import NoHalvesError, exact_ways


@dataclass(frozen=True)
class MemoryChoice:
    """What `auto` took.

    Attributes:
        norm_grad: The way.
        precision: Of the products, and of the frozen weights where nothing else holds them.
        batch: Examples at a time.
        accumulate: How many times a step.
        limit_bytes: What a step may need.
        forecast_bytes: What a step needs in every way that was looked at.
        words: Why, as a sentence.
    """

    norm_grad: str
    precision: str
    batch: int
    accumulate: int
    limit_bytes: int
    forecast_bytes: dict[str, int]
    words: str


@dataclass(frozen=True)
class SettledMemory:
    """A run whose way is settled, and what its step needs.

    Attributes:
        config: The run; nothing in it is `auto`.
        forecast: Of its step.
        choice: What was chosen; None where nothing was to choose.
    """

    config: Config
    forecast: MemoryForecast
    choice: MemoryChoice | None = None


def free_bytes(device: str, processes: int = 1) -> int:
    """Return what one process may need: a card's free memory, or its share of the machine's.

    A fifth of the machine's free memory is left for what is no tensor of a step: libraries, data.

    Args:
        device: `train.device`.
        processes: How many share the machine; each has a card of its own.
    """
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return free_memory_bytes() * 4 // 5 // processes


def settle_memory(
    config: Config, task: Task, *, text_length: int | None, free: int
) -> SettledMemory:
    """Forecast a run's step, and settle what is `auto`.

    `train.batch=auto` takes the largest batch that fits, `train.norm_grad=auto` the fastest way at
    that batch: a smaller one costs more than running blocks again wherever it no longer fills the
    machine. bf16, which rounds, comes last.

    Args:
        config: The run.
        task: What is to be learnt.
        text_length: As `forecast` takes it.
        free: What `auto` may need where `train.memory` is not set [bytes].

    Raises:
        UserError: Where `train.memory` is too little, with the largest batch that fits.
    """
    check_options(METHODS.get_or_raise(config.method), config)
    auto = " and ".join(_left_open(config))
    limit = config.train.memory_bytes
    limit = free if auto and limit is None else limit
    tried: dict[str, tuple[Config, MemoryForecast]] = {}

    def need(way: Config) -> int:
        tried[_way(config, way)] = way, forecast(way, task, text_length=text_length)
        return tried[_way(config, way)][1].peak_bytes

    taken: Config | None = None
    for way in exact_ways(config):
        if taken and taken.train.precision != way.train.precision:
            break
        least = taken.train.batch_size if taken else 0
        larger = [part for part in _parts(way) if part.train.batch_size > least]
        try:
            fitting = bisect_right(larger, math.inf if limit is None else limit, key=need)
        except NoHalvesError:
            if config.train.norm_grad == "auto":
                continue
            raise
        taken = larger[fitting - 1] if fitting else taken
    if taken is None:
        raise _too_little(config, list(tried.values()), limit or 0, need)
    choice = _choice(config, auto, taken, tried, limit or 0) if auto else None
    return SettledMemory(*tried[_way(config, taken)], choice)


def _left_open(config: Config) -> list[str]:
    names = ["batch"] * config.train.auto_batch
    names += ["norm_grad"] * (config.train.norm_grad == "auto")
    return [f"train.{name}={getattr(config.train, name)}" for name in names]


def _parts(config: Config) -> list[Config]:
    """Return the runs that `train.batch=auto` chooses from, smallest batch first; any other alone."""
    whole = config.train.step_size
    if not config.train.auto_batch:
        return [config]
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]
    return [_with(config, batch=size, accumulate=whole // size) for size in sizes]


def _with(config: Config, **train: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _choice(
    asked: Config,
    auto: str,
    taken: Config,
    tried: Mapping[str, tuple[Config, MemoryForecast]],
    limit: int,
) -> MemoryChoice:
    train = taken.train
    needs = {way: need.peak_bytes for way, (_, need) in tried.items()}
    first, *others = (
        f"{way} needs {size(needs[way])}"
        for way in sorted(needs, key=lambda way: way != _way(asked, taken))
    )
    takes = ["the fastest way"] * (asked.train.norm_grad == "auto")
    if asked.train.auto_batch:
        takes.insert(0, f"{train.batch} of a step's {train.step_size} examples at a time")
    words = f"{auto}: {' in '.join(takes)} within {_named(asked, limit)}: "
    words += "; ".join([first, *([", ".join(others)] if others else [])])
    return MemoryChoice(
        train.norm_grad,
        train.precision,
        train.batch_size,
        train.accumulate,
        limit,
        needs,
        f"{words}.",
    )


def _too_little(
    asked: Config,
    tried: list[tuple[Config, MemoryForecast]],
    limit: int,
    need: Callable[[Config], int],
) -> UserError:
    """Say what the way of the least need takes, and which batch fits."""
    way, least = min(tried, key=lambda pair: pair[1].peak_bytes)
    batch = way.train.batch_size
    largest = bisect_right(range(1, batch), limit, key=lambda size: need(_with(way, batch=size)))
    mend = (
        f"train.batch={largest} is the largest that fits, and train.accumulate adds several batches "
        "up to one step."
        if largest
        else "not even train.batch=1 fits, take a smaller backbone."
    )
    several = f" ({_way(asked, way)}, the least of all ways)" if len(tried) > 1 else ""
    return UserError(
        f"a training step with train.batch={batch} needs {size(least.peak_bytes)}{several}, more "
        f"than {_named(asked, limit)}: {mend}"
    )


def _named(asked: Config, limit: int) -> str:
    return f"{'the free memory' if asked.train.memory is None else 'train.memory'}, {size(limit)}"


def _way(asked: Config, way: Config) -> str:
    at = f" at batch {way.train.batch}" if asked.train.auto_batch else ""
    return f"{way.train.norm_grad} in {way.train.precision}{at}"
