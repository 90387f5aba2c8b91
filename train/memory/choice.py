"""Memory kept within a limit: `train.memory`, and the way `train.norm_grad=auto` takes under it."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
    """What `train.norm_grad=auto` took.

    Attributes:
        norm_grad: The way.
        precision: Of the frozen weights.
        limit_bytes: What a step may need.
        forecast_bytes: What a step of every way that was looked at needs, fastest first.
        words: Why, as a sentence.
    """

    norm_grad: str
    precision: str
    limit_bytes: int
    forecast_bytes: dict[str, int]
    words: str


@dataclass(frozen=True)
class SettledMemory:
    """A run whose way is settled, and what its step needs.

    Attributes:
        config: The run; its `train.norm_grad` is never `auto`.
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
    """Forecast a run's step, and take the fastest way of `train.norm_grad=auto` that fits.

    Args:
        config: The run.
        task: What is to be learnt.
        text_length: As `forecast` takes it.
        free: What `auto` may need where `train.memory` is not set [bytes].

    Raises:
        UserError: Where `train.memory` is too little, with the largest batch that fits.
    """
    check_options(METHODS.get_or_raise(config.method), config)
    auto = config.train.norm_grad == "auto"
    limit = config.train.memory_bytes
    limit = free if auto and limit is None else limit
    foresee = partial(forecast, task=task, text_length=text_length)
    tried: list[tuple[Config, MemoryForecast]] = []
    for way in exact_ways(config):
        try:
            tried.append((way, foresee(way)))
        except NoHalvesError:
            if auto:
                continue
            raise
        if limit is None or tried[-1][1].peak_bytes <= limit:
            return SettledMemory(*tried[-1], _choice(config, tried, limit) if auto else None)
    raise _too_little(config, tried, limit or 0, lambda way: foresee(way).peak_bytes)


def _choice(
    asked: Config, tried: list[tuple[Config, MemoryForecast]], limit: int | None
) -> MemoryChoice:
    assert limit is not None
    train = tried[-1][0].train
    needs = {_way(way): need.peak_bytes for way, need in tried}
    *faster, taken = (f"{way} needs {size(need)}" for way, need in needs.items())
    words = f"train.norm_grad=auto takes the fastest way within {_named(asked, limit)}: "
    words += "; ".join([taken, *([", ".join(faster)] if faster else [])])
    return MemoryChoice(train.norm_grad, train.precision, limit, needs, f"{words}.")


def _too_little(
    asked: Config,
    tried: list[tuple[Config, MemoryForecast]],
    limit: int,
    foresee: Callable[[Config], int],
) -> UserError:
    """Say what the way of the least need takes, and which batch fits."""
    way, need = min(tried, key=lambda pair: pair[1].peak_bytes)

    def with_batch(batch: int) -> int:
        train = way.train.model_copy(update={"batch": batch})
        return foresee(way.model_copy(update={"train": train}))

    batch = asked.train.batch
    largest = bisect_right(range(1, batch), limit, key=with_batch)
    mend = (
        f"train.batch={largest} is the largest that fits, and train.accumulate adds several batches "
        "up to one step."
        if largest
        else "not even train.batch=1 fits, take a smaller backbone."
    )
    least = f" ({_way(way)}, the least of all ways)" if len(tried) > 1 else ""
    return UserError(
        f"a training step with train.batch={batch} needs {size(need.peak_bytes)}{least}, more than "
        f"{_named(asked, limit)}: {mend}"
    )


def _named(asked: Config, limit: int) -> str:
    return f"{'the free memory' if asked.train.memory is None else 'train.memory'}, {size(limit)}"


def _way(config: Config) -> str:
    return f"{config.train.norm_grad} in {config.train.precision}"
