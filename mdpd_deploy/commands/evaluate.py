"""`mdpd eval`: the task metrics of a run (PyTorch) or of a bundle (no torch)."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdpd_deploy.commands.options import CpuRuntimeWord
from mdpd_deploy.commands.torch_defaults import torch_defaults
from mdpd_deploy.commands.verb import Json, print_json
from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mdpd_deploy.artifacts.bundle import Bundle
    from mdpd_deploy.artifacts.tasks import BundleTask
    from mdpd_deploy.data.examples import Split
    from mdpd_deploy.data.preprocess import Preprocess
    from mdpd_deploy.runtimes.base import Forward
    from mdpd_deploy.tasks.metrics import Values


log = logging.getLogger(__name__)

SELF_CONTAINED = ("digits",)  # tasks whose data comes with the package


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        source: The run or bundle.
        task: Its task.
        runtime: `onnx`, `openvino` or `torch`.
        provider: The execution provider of ONNX Runtime, OpenVINO, or torch's device.
        examples: Examples by split.
        metrics: Split → model (`deployed`, and `side` for an MDPD run) → metric → value.
    """

    source: str
    task: str
    runtime: str
    provider: str
    examples: dict[str, int]
    metrics: dict[str, dict[str, Values]]


def command(
    run_or_bundle: Annotated[
        Path | None, typer.Argument(metavar="RUN|BUNDLE", help="Default: the newest run.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="File or folder to measure on. Default: the evaluation data of training."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Which task to measure, where a bundle has several.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples per forward pass.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    runtime: CpuRuntimeWord = None,
    json: Json = False,
) -> None:
    """Measure a run or a bundle on data."""
    from mdpd_deploy.artifacts.bundle import is_bundle

    if run_or_bundle is not None and is_bundle(run_or_bundle):
        found = evaluate_bundle(
            run_or_bundle, data, task=task, batch=batch, device=device, runtime=runtime
        )
    elif runtime is not None:
        raise UserError("--runtime is of a bundle, and PyTorch measures a run: leave it out.")
    elif task is not None:
        raise UserError("--task names a task of a bundle, and a run has one: leave it out.")
    else:
        found = evaluate_run(run_or_bundle, data, batch=batch, device=device)
    if json:
        print_json(asdict(found))
    else:
        _print(found)


def evaluate_bundle(
    path: Path,
    data: str | None,
    *,
    task: str | None = None,
    batch: int,
    device: str,
    runtime: str | None = None,
) -> Evaluation:
    """Measure a bundle with ONNX Runtime or OpenVINO.

    Without data it works where the data needs no path (`digits`, `hub:NAME`).

    Raises:
        UserError: If the bundle or the data cannot be used.
    """
    from mdpd_deploy.artifacts.bundle import load_bundle

    bundle = load_bundle(path)
    asked = bundle.task(task)
    splits = bundle_splits(bundle, asked, data)
    runner = bundle.runner(device, runtime=runtime)
    models: dict[str, Forward] = {"deployed": bundle.runner_of(asked, runner)}
    metrics = _measure(models, asked.preprocess, splits, asked.facts["metrics"], batch)
    used = runtime or bundle.runtime
    return Evaluation(
        str(path), asked.facts["task"], used, runner.provider, _sizes(splits), metrics
    )


def bundle_splits(bundle: Bundle, asked: BundleTask, data: str | None) -> dict[str, Split]:
    """Read what a task of a bundle is to be measured on, as its training did.

    Args:
        bundle: The bundle.
        asked: The task.
        data: A file or folder; None works where the data needs no path (`digits`, `hub:NAME`).

    Raises:
        UserError: If the data is needed and not named, or cannot be used.
    """
    from mdpd_deploy.config import check_config
    from mdpd_deploy.data.load import load_evaluation, load_task

    name, kept = asked.facts["task"], asked.facts["data"]
    seed = kept.get("seed", 0)
    options = {
        **kept.get("options", {}),
        "eval_path": data,
        "labels": list(asked.task.labels) or None,
    }
    config = check_config({"data": options}).data
    if data is not None:
        return load_evaluation(name, asked.task, config, seed=seed)
    if config.path is not None or name in SELF_CONTAINED:
        return load_task(name, config, seed=seed).evaluation
    raise UserError(
        f"bundle {bundle.path} does not keep where its data lies: add --data with a file or folder "
        f"of task {name}."
    )


@torch_defaults()
def evaluate_run(path: Path | None, data: str | None, *, batch: int, device: str) -> Evaluation:
    """Measure a run with PyTorch: the deployed model and, for MDPD, its side network.

    Raises:
        UserError: If the run, the data or the device cannot be used.
    """
    from mdpd_deploy.artifacts.run import Run

    run = Run.open(path)
    if path is None:
        log.info("run: %s (the newest)", run.path)
    splits = run.load_evaluation(data)
    names = list(run.summary["metrics"]["deployed"])
    metrics = _measure(_torch_models(run, device), run.preprocess, splits, names, batch)
    return Evaluation(str(run.path), run.config.task, "torch", device, _sizes(splits), metrics)


def _torch_models(run: Any, device: str) -> dict[str, Forward]:
    import torch

    from mdpd_deploy.checks.reference import torch_outputs

    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: choose one of cpu, cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu.")
    models = {"deployed": run.load_deployed()}
    if run.config.method == "mdpd":
        models["side"] = run.load_with_side()[0]

    def forward_of(model: Any) -> Forward:
        model.to(device).eval()
        return lambda arrays: torch_outputs(model, arrays)

    return {name: forward_of(model) for name, model in models.items()}


def _measure(
    models: dict[str, Forward],
    preprocess: Preprocess,
    splits: dict[str, Split],
    names: list[str],
    batch: int,
) -> dict[str, dict[str, Values]]:
    """Return split → model → metric → value; every batch is preprocessed once for all models."""
    import numpy as np

    from mdpd_deploy.artifacts.bundle import batches
    from mdpd_deploy.artifacts.scores import in_order
    from mdpd_deploy.runtimes.base import only
    from mdpd_deploy.tasks.metrics import compute

    metrics = {}
    for split in in_order(splits):
        examples = splits[split]
        parts: dict[str, list[NDArray[np.float32]]] = {model: [] for model in models}
        for raws in batches(examples.inputs, batch):
            arrays = preprocess(raws)
            for model, forward in models.items():
                parts[model].append(only(forward(arrays)))
        metrics[split] = {
            model: compute(names, np.concatenate(found), examples.labels)
            for model, found in parts.items()
        }
    return metrics


def _sizes(splits: dict[str, Split]) -> dict[str, int]:
    return {name: len(split) for name, split in splits.items()}


def _print(found: Evaluation) -> None:
    from mdpd_deploy.report.terminal import print_table
    from mdpd_deploy.tasks.metrics import metric_text

    rows = [
        (split, str(found.examples[split]), model, metric, metric_text(value))
        for split, models in found.metrics.items()
        for model, metrics in models.items()
        for metric, value in metrics.items()
    ]
    title = f"{found.task} · {found.runtime} on {found.provider}"
    console = print_table(title, ("split", "examples", "model", "metric", "value"), rows)
    console.print(f"measured: {found.source}")
