"""The memory forecast of many methods side by side, at one backbone, batch and precision."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from mdpd_deploy.config import Config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Task
from mdpd_deploy.train.forecast import MemoryForecast, forecast
from mdpd_deploy.train.papers import paper_figure


@dataclass(frozen=True)
class MemoryRow:
    """One method of the table.

    Attributes:
        method: Its word, e.g. `mdpd:unipt`.
        forecast: What a step needs; None where the method does not fit.
        reason: Why it does not fit, else None.
        papers: What the papers say of it at this backbone and batch; None where they say nothing.
    """

    method: str
    forecast: MemoryForecast | None
    reason: str | None = None
    papers: str | None = None


def forecast_methods(
    configs: Mapping[str, Config], task: Task, *, text_length: int | None = None
) -> tuple[MemoryRow, ...]:
    """Forecast methods in the order given; one that does not fit has its reason in its row.

    Args:
        configs: Name of the row → the config of its run; `entries.entry_configs` makes them.
        task: What is to be learnt.
        text_length: As `forecast` takes it.
    """
    return tuple(_row(name, config, task, text_length) for name, config in configs.items())


def _row(name: str, config: Config, task: Task, text_length: int | None) -> MemoryRow:
    try:
        need = forecast(config, task, text_length=text_length)
        return MemoryRow(name, need, papers=paper_figure(name, config))
    except UserError as err:
        return MemoryRow(name, None, str(err))
    except Exception as err:  # a bug in one method must not hide the rows of the others
        logging.getLogger(__name__).debug("the forecast of %s failed", name, exc_info=True)
        reason = (str(err).splitlines() or [""])[0][:300]
        return MemoryRow(name, None, f"internal error: {type(err).__name__}: {reason}")
