"""The memory forecast of many methods side by side, and what the papers say of the same setting."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mdpd_deploy.config import Config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Task
from mdpd_deploy.train.memory.choice import free_bytes, settle_memory
from mdpd_deploy.train.memory.forecast import MemoryForecast, forecast

# GB of a ViT-B/16 on VTAB-1K at batch 32, at millions trained, and the source; by method, and by r
# (None: any) where that gives about the size of the paper's side network.
BATCH = 32
FIGURES: dict[tuple[str, int | None], str] = {
    ("full", None): "6.1 at 85.8 M (MDPD, Tab. 3)",
    ("bitfit", None): "3.8 (MDPD), 2.9 (DTL)",
    ("probe", None): "0.6 (MDPD)",
    ("side:dtlv1", None): "1.8 at 0.06 M (DTL, Tab. 4)",
    ("side:dtlv2", None): "1.8 at 0.07 M (DTL, Tab. 4)",
    ("side:dtlv2-ls", None): "1.8 at 0.04 M (DTL, Tab. 4)",
    ("side:lst", 8): "2.7 at 2.38 M (DTL, Tab. 4)",
    ("mdpd:unipt", 2): "2.1 at 5.50 M (MDPD, Tab. 3)",
    ("side:unipt", 2): "2.1 at 5.19 M (MDPD, Tab. 3)",
    ("side:sherl", 2): "2.0 at 5.08 M (MDPD, Tab. 3)",
}


def paper_figure(method: str, config: Config) -> str | None:
    """Return the papers' GB of a method in a run's setting; None where they have none of it.

    Args:
        method: Its word, e.g. `mdpd:unipt`.
        config: Of the run; the papers' backbone is a ViT-B/16, at batch 32.
    """
    backbone = re.fullmatch(r"timm:vit_base_patch16_224(\..*)?", config.backbone.name)
    if not backbone or config.backbone.img_size not in (None, 224) or config.train.batch != BATCH:
        return None
    own = 8 if method == "side:lst" else 2  # their defaults beside vision: `lst.LST.build`
    return FIGURES.get((method, None)) or FIGURES.get((method, config.side.reduction or own))


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
        if config.train.norm_grad == "auto" or config.train.auto_batch:
            free = free_bytes(config.train.device)
            config = settle_memory(config, task, text_length=text_length, free=free).config
        need = forecast(config, task, text_length=text_length)
        return MemoryRow(name, need, papers=paper_figure(name, config))
    except UserError as err:
        return MemoryRow(name, None, str(err))
    except Exception as err:  # a bug in one method must not hide the rows of the others
        logging.getLogger(__name__).debug("the forecast of %s failed", name, exc_info=True)
        reason = (str(err).splitlines() or [""])[0][:300]
        return MemoryRow(name, None, f"internal error: {type(err).__name__}: {reason}")
