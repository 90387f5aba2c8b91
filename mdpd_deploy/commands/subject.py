"""What a benchmark times: a run, a bundle, or a bundle in its run; with inputs and a name for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.artifacts.bundle import Bundle
    from mdpd_deploy.artifacts.run import Run
    from mdpd_deploy.serve.latency.inputs import InputSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What is timed: a run, a bundle, or a bundle that lies in its run."""

    path: Path
    run: Run | None
    bundle: Bundle | None


def open_subject(path: Path | None) -> Subject:
    """Open what a user named; None = the newest completed run.

    Raises:
        UserError: If it is neither, answers several tasks, or lies in a run of another config.
    """
    from mdpd_deploy.artifacts.bundle import is_bundle, load_bundle
    from mdpd_deploy.artifacts.run import Run

    if path is None or not is_bundle(path):
        run = Run.open(path)
        if path is None:
            log.info("run: %s (the newest)", run.path)
        return Subject(run.path, run, None)
    bundle = load_bundle(path)
    if bundle.mixed:
        raise UserError(
            f"bundle {path} answers several tasks, and rivals belong to one: name a run, or a "
            "bundle of one task."
        )
    precision = bundle.precision_in("onnx")
    if precision != "fp32":
        log.info("%s bundle: timed alone, since its run's rivals exist in fp32 only", precision)
        return Subject(path, None, bundle)
    home = path.resolve().parent
    if home.name != "bundles" or not (home.parent / "summary.json").is_file():
        return Subject(path, None, bundle)
    run = Run.open(home.parent)
    if bundle.manifest["source"].get("config_sha256") != run.config.sha256():
        raise UserError(
            f"bundle {path} was not exported from the run it lies in ({run.path}): "
            "export that run again, or move the bundle elsewhere to time it alone."
        )
    log.info("run of this bundle: %s", run.path)
    return Subject(path, run, bundle)


def inputs_of(subject: Subject) -> InputSource:
    """Return real inputs where the run's data can be read, else random ones."""
    from mdpd_deploy.serve.latency.inputs import InputSource

    if subject.run is not None:
        return input_source(subject.run)
    assert subject.bundle is not None
    outputs = subject.bundle.task().width
    return InputSource("random, shaped like real inputs", subject.bundle.preprocess, outputs)


def input_source(run: Run) -> InputSource:
    """Return the validation examples of a run, or random ones where they cannot be read."""
    from mdpd_deploy.serve.latency.inputs import InputSource

    outputs = run.task.width
    try:
        raws = run.load_evaluation()["validation"].inputs
    except UserError as err:
        log.info("timing with random inputs, since the run's data cannot be read: %s", err)
        return InputSource("random, shaped like real inputs", run.preprocess, outputs)
    return InputSource("validation examples of the run", run.preprocess, outputs, raws)


def source_of(subject: Subject) -> dict[str, Any]:
    """Names only: a report is shown to others, and paths of this machine are nobody's business."""
    if subject.run is not None:
        kind = "run" if subject.bundle is None else "bundle of a run"
        facts = subject.run.summary
    else:
        assert subject.bundle is not None
        kind, facts = "bundle", {**subject.bundle.manifest["source"], **subject.bundle.manifest}
    return {
        "kind": kind,
        "name": subject.path.resolve().name,
        **{key: facts.get(key) for key in ("task", "method", "side")},
        "backbone": backbone_name(facts.get("backbone")),
    }


def backbone_name(backbone: Any) -> str:
    """Return what a report calls a backbone: never a path."""
    name = str(backbone.get("name") if isinstance(backbone, dict) else backbone)
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def default_folder(subject: Subject) -> Path:
    """`RUN/latency`, or beside a bundle that has no run (inside it, it would break the bundle)."""
    if subject.run is not None:
        first = subject.run.path / "latency"
    else:
        first = Path(f"{subject.path.resolve()}-latency")
    folders = (first if n == 1 else first.with_name(f"{first.name}-{n}") for n in count(1))
    return next(folder for folder in folders if not (folder.exists() and any(folder.iterdir())))
