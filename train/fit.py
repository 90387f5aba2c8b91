"""A whole training run: plan it, run it, resume it."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from mdpd_deploy.artifacts.folders import (
    LOCK,
    claimed,
    free_path,
    refuse_nonempty,
    remove_leftovers,
)
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.config import Config, read_config
from mdpd_deploy.config.recipes import Setting, recipe_settings
from mdpd_deploy.data.inventory import Inventory
from mdpd_deploy.data.lengths import TextLengths
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import write_text
from mdpd_deploy.train.cautions import plan_cautions
from mdpd_deploy.train.entries import default_entries, entry_configs, without_unread
from mdpd_deploy.train.finish import finish
from mdpd_deploy.train.loop import train
from mdpd_deploy.train.memory.choice import MemoryChoice
from mdpd_deploy.train.memory.table import MemoryRow, forecast_methods
from mdpd_deploy.train.progress import ProgressBar
from mdpd_deploy.train.setup import Setup, default_out, prepare, process_state, with_resize
from mdpd_deploy.train.stopping import stop_requests

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run would do, without running it.

    Attributes:
        norm_grad: How the norms get their gradient, `auto` settled; None where none is tuned.
        hold: What the frozen matrices lie in between their uses; None: in `precision`.
        memory_choice: Why, where it was `auto`.
        learning_rate: Its peak and phases.
        options: Those that differ from their default, by dotted name, but for what else is here.
        sees: What the backbone makes of an input, e.g. `pictures of 32 × 32 pixels`.
        licence: Of its weights.
        memory_table: What every method would need in this run's place, this one's included; empty
            unless it was asked for.
        recipe: What its recipe says, and what this run has.
        tokens: How long the texts of each split are, and how many are cut; empty for images.
        text_length: Tokens of the batch that the forecasts are for; None for images.
    """

    task: str
    method: str
    side: str | None
    backbone: str
    sees: str
    licence: str
    examples: dict[str, int]
    classes: tuple[str, ...]
    steps: int
    steps_per_epoch: int
    batch: int
    learning_rate: str
    options: dict[str, Any]
    params: dict[str, int]
    norm_grad: str | None
    precision: str
    hold: str | None
    forecast_bytes: int
    forecast_parts: dict[str, int]
    memory_choice: MemoryChoice | None
    memory_table: tuple[MemoryRow, ...]
    tokens: dict[str, TextLengths]
    text_length: int | None
    device: str
    notes: tuple[str, ...]
    inventory: Inventory
    recipe: tuple[Setting, ...]

    def to_dict(self) -> dict[str, Any]:
        recipe = [setting._asdict() for setting in self.recipe]
        return {**asdict(self), "inventory": self.inventory.to_dict(), "recipe": recipe}


def make_plan(config: Config, *, all_methods: bool = False) -> Plan:
    """Read the data and build the model, forecast the memory, and stop there.

    Args:
        config: The run.
        all_methods: Forecast every other method in its place too; that takes a second or more each.

    Raises:
        UserError: For anything in the config or the data that cannot work.
    """
    setup = prepare(with_resize(without_unread(config)))
    return _plan(setup, _every_method(setup) if all_methods else ())


def _plan(setup: Setup, memory_table: tuple[MemoryRow, ...]) -> Plan:
    config, method = setup.config, setup.method
    memory = setup.memory
    groups = method.parameter_counts
    return Plan(
        task=config.task,
        method=config.method,
        side=config.side.name if method.uses_side else None,
        backbone=config.backbone.name,
        sees=setup.card.sees,
        licence=setup.card.licence,
        examples=setup.examples,
        classes=setup.data.task.labels,
        steps=setup.steps,
        steps_per_epoch=setup.schedule.steps_per_epoch,
        learning_rate=setup.rate.words(setup.steps),
        options=_asked(config),
        batch=setup.schedule.step_size,
        params={
            "backbone": method.backbone_numbers,
            "trained": sum(groups.values()),
            **groups,
        },
        norm_grad=config.train.norm_grad if method.tunes_norms else None,
        precision=config.train.precision,
        hold=config.train.hold,
        forecast_bytes=memory.forecast.peak_bytes,
        forecast_parts=memory.forecast.parts,
        memory_choice=memory.choice,
        memory_table=memory_table,
        tokens=setup.lengths,
        text_length=setup.text_length,
        device=str(setup.state.device),
        notes=(*setup.notes, *plan_cautions(config)),
        inventory=setup.data.inventory,
        recipe=recipe_settings(config),
    )


def _asked(config: Config) -> dict[str, Any]:
    plain, said = Config().flat(), ("data.path", "backbone.name", "side.name")
    flat = config.flat().items()
    return {k: v for k, v in flat if "." in k and k not in said and v != plain.get(k)}


def _every_method(setup: Setup) -> tuple[MemoryRow, ...]:
    labels = [entry.label for entry in default_entries()]
    return forecast_methods(
        entry_configs(setup.config, labels),
        setup.data.task,
        text_length=setup.text_length,
    )


def fit_run(config: Config, *, overwrite: bool = False, quiet: bool = False) -> Run:
    """Train as `config` says and return the completed run.

    Args:
        config: Everything; `config.out` is the run folder (default runs/DATE-TASK-METHOD).
        overwrite: Replace a non-empty run folder.
        quiet: No progress on stderr.

    Raises:
        UserError: For bad input, before anything is written.
        WorkFailed: If the run diverges or cannot be written.
    """
    out = Path(config.out).expanduser() if config.out else _free_out(config)
    check = partial(refuse_nonempty, out, overwrite=overwrite, ours=_is_ours)
    check()  # before the data are read, and again when the folder is ours alone
    config = with_resize(without_unread(config).model_copy(update={"out": str(out.resolve())}))
    setup = prepare(config)
    with _held(setup, out, check):
        if setup.state.is_main_process:
            if overwrite:
                _clear(out)
            write_text(out / "config.yaml", setup.config.to_yaml())
        setup.state.wait_for_everyone()
        return _go(setup, out, quiet=quiet)


def resume_run(path: Path, *, quiet: bool = False) -> Run:
    """Continue an interrupted run to its planned end; a completed one is returned as it is.

    On CPU the result is bit-identical to that of a run that was never interrupted.

    Raises:
        UserError: If `path` is no run folder, or its checkpoint is damaged.
    """
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"--resume {path}: no config.yaml there, so it is not a run folder; "
            "name a folder that `mdpd train` wrote."
        )
    if (path / "summary.json").is_file():
        return Run.open(path)
    setup = prepare(read_config(path / "config.yaml"))
    with _held(setup, path):
        if setup.state.is_main_process:
            remove_leftovers(path)
            remove_leftovers(path / "checkpoints")
        return _go(setup, path, quiet=quiet)


def _free_out(config: Config) -> Path:
    """Return runs/DATE-TASK-METHOD, the same in every process of a launch."""
    process_state(config.train.device)
    named = [str(free_path(default_out(config, f"{datetime.now():%Y%m%d-%H%M%S}")))]
    return Path(broadcast_object_list(named)[0])


@contextmanager
def _held(setup: Setup, out: Path, check: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep other trainings out of the run folder while the main process writes to it."""
    if not setup.state.is_main_process:
        yield
        return
    with claimed(out):
        if check is not None:
            check()
        yield


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a run, or the beginning of one."""
    names = {path.name for path in folder.iterdir()} - {LOCK}
    return "config.yaml" in names and ("metrics.jsonl" in names or names == {"config.yaml"})


def _go(setup: Setup, out: Path, *, quiet: bool) -> Run:
    main = setup.state.is_main_process
    try:
        with stop_requests() as stop:
            with ProgressBar(setup.steps, enabled=main and not quiet) as bar, stop.waiting():
                say = _LOGGER.info if quiet else bar.say
                for line in (setup.card.words, *setup.notes, setup.data.inventory.line):
                    if main and line:
                        say(line)
                progress = train(setup, out, bar, stop)
            setup.state.wait_for_everyone()
            run = finish(setup, out, progress)
    except (KeyboardInterrupt, SystemExit):
        if main:
            _LOGGER.info("stopped: `mdpd train --resume %s` goes on from its last checkpoint", out)
        raise
    for note in run.summary["notes"][len(setup.notes) :] if main else ():
        say(note)
    setup.state.wait_for_everyone()
    return run


def _clear(out: Path) -> None:
    for name in ("checkpoints", "model", "bundles", "latency"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("summary.json", "metrics.jsonl", "report.html"):
        (out / name).unlink(missing_ok=True)
