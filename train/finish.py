"""The end of a run: write the model, measure what was written, then the summary and the report.

The deployed metric is measured on the faded model, rebuilt from the files in float32, not on the
network in memory: what is reported is what will be exported.
"""

import os
import resource
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mdpd_deploy.artifacts.folders import atomic_folder
from mdpd_deploy.artifacts.outputs import write_outputs
from mdpd_deploy.artifacts.run import BACKBONE, LABELS, SCHEMA, Run, read_metrics
from mdpd_deploy.artifacts.scores import key_of
from mdpd_deploy.files import sha256_file, write_json
from mdpd_deploy.machine import versions
from mdpd_deploy.model import TaskModel
from mdpd_deploy.report.predictions import Predictions, pick_samples
from mdpd_deploy.tasks.metrics import Values, compute
from mdpd_deploy.train.cautions import felt_caution, result_cautions
from mdpd_deploy.train.checkpoint import Progress, load_best
from mdpd_deploy.train.evaluate import Outputs, run_over
from mdpd_deploy.train.log import require_folder
from mdpd_deploy.train.report import write_report
from mdpd_deploy.train.setup import Setup


def finish(setup: Setup, out: Path, progress: Progress) -> Run:
    """Turn a trained method into a completed run directory.

    Args:
        setup: From `prepare`; its method holds the last weights.
        out: The run folder.
        progress: From `train`.
    """
    if setup.state.is_main_process:
        require_folder(out)
    if setup.config.train.keep == "best":
        load_best(out / "checkpoints", setup.method)
    if setup.state.is_main_process:
        shutil.rmtree(out / "model", ignore_errors=True)
        with atomic_folder(out / "model") as folder:
            write_model(setup, folder)
    setup.state.wait_for_everyone()
    summary = describe(setup, progress)
    summary["felt"] = felt_share(out)
    summary["files"] = {p.name: sha256_file(p) for p in sorted((out / "model").iterdir())}
    run = Run(out, setup.config, summary, setup.data.task)
    deployed = run.load_deployed().to(setup.state.device)
    outputs = {name: measure(setup, deployed, name) for name in setup.data.evaluation}
    side = {}
    if setup.config.method == "mdpd":
        with_side = run.load_with_side()[0].to(setup.state.device)
        side = {name: measure(setup, with_side, name) for name in setup.data.evaluation}
    for name, split in setup.data.evaluation.items():
        measured = {"deployed": metrics_of(setup, outputs, name)}
        if side:
            measured["side"] = metrics_of(setup, side, name)
        summary[key_of("metrics", name)] = measured
        floor = setup.data.task.floor(setup.data.metrics, setup.data.train.labels, split.labels)
        if floor is not None:
            summary[key_of("majority", name)] = floor
    summary["notes"] += felt_caution(summary["felt"])
    summary["notes"] += result_cautions(
        setup.data, summary["metrics"], summary.get("majority"), outputs["validation"]
    )
    summary["status"] = "completed"
    if setup.state.is_main_process:
        require_folder(out)
        report(setup, out, summary, outputs["validation"], side.get("validation"))
        write_outputs(
            out,
            {
                name: {
                    "labels": split.labels,
                    "deployed": outputs[name]["output"],
                    **({"side": side[name]["output"]} if side else {}),
                }
                for name, split in setup.data.evaluation.items()
            },
        )
        write_json(out / "summary.json", summary)
    return run


def felt_share(out: Path) -> float | None:
    """Return the mean over a run's evaluations of what `Method.felt` found; None where it found nothing."""
    path = out / "metrics.jsonl"
    found = [line["felt"] for line in read_metrics(path) if "felt" in line]
    return sum(found) / len(found) if found else None


def write_model(setup: Setup, folder: Path) -> None:
    """Write trained tensors, labels, preprocessing and, where needed, the backbone."""
    for file, tensors in setup.method.model_files(setup.frozen_weights).items():
        _save(tensors, folder / file)
    write_json(folder / LABELS, {"names": list(setup.data.task.labels)})
    setup.backbone.preprocess.save(folder)
    if not setup.config.backbone.pretrained:
        _save(setup.frozen_weights(), folder / BACKBONE)


def _chose(setup: Setup) -> bool:
    """Whether the validation split chose the kept weights: of one evaluation nothing is chosen."""
    return setup.config.train.keep == "best" and setup.eval_every < setup.steps


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.cpu().float().contiguous() for name, t in sorted(tensors.items())}, path)


def measure(setup: Setup, model: nn.Module, split: str) -> Outputs:
    """Return a rebuilt model's outputs on a split."""
    assert isinstance(model, TaskModel)
    names = model.backbone.input_names
    return run_over(
        setup, split, lambda inputs: {"output": model(*(inputs[name] for name in names))}
    )


def metrics_of(setup: Setup, outputs: dict[str, Outputs], split: str) -> Values:
    labels = setup.data.evaluation[split].labels
    return compute(setup.data.metrics, outputs[split]["output"], labels)


def describe(setup: Setup, progress: Progress) -> dict[str, Any]:
    """Return summary.json but for the metrics."""
    config, method, backbone = setup.config, setup.method, setup.backbone
    groups = method.parameter_counts
    need = setup.memory.forecast
    memory = {
        **(progress.memory or {}),
        "forecast_bytes": need.peak_bytes,
        "forecast_parts": need.parts,
        "norm_grad": config.train.norm_grad if method.tunes_norms else None,
        "precision": config.train.precision,
        "hold": config.train.hold,
    }
    memory["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cuda = setup.device.type == "cuda"
    memory["peak_cuda_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    rate = progress.samples_per_s
    return {
        "schema": SCHEMA,
        "task": config.task,
        "kind": setup.data.task.kind,
        "method": config.method,
        "side": config.side.name if method.uses_side else None,
        "backbone": {
            "name": backbone.source.name,
            "revision": backbone.source.revision,
            "sha256": backbone.source.sha256,
            "pretrained": backbone.source.pretrained,
            "taps": backbone.has_taps,
            "sees": setup.card.sees,
            "licence": setup.card.licence,
        },
        "primary_metric": setup.data.metrics[0],
        "metrics": {},
        "params": {
            "backbone": method.backbone_numbers,
            "trained": sum(groups.values()),
            "deployed_delta": method.deployed_delta,
            "side": groups.get("side", 0),
            "groups": groups,
        },
        "memory": memory,
        "time": {
            "train_s": round(progress.train_s, 3),
            "samples_per_s": None if rate is None else round(rate, 2),
        },
        "steps": progress.step,
        "best_step": progress.best_step,
        "weights_chosen_on": "validation" if _chose(setup) else None,
        "data": setup.examples,
        "tokens": {name: asdict(found) for name, found in setup.lengths.items()},
        "notes": list(setup.notes),
        "inventory": setup.data.inventory.to_dict(),
        "versions": versions(),
        "device": str(setup.state.device),
        "processes": setup.state.num_processes,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "seed": config.train.seed,
        "status": "running",
    }


def report(
    setup: Setup, out: Path, summary: dict[str, Any], deployed: Outputs, side: Outputs | None
) -> None:
    """Write report.html; single predictions are of validation, so that test stays unseen."""
    split = setup.data.evaluation["validation"]
    predictions = Predictions(
        setup.data.task,
        split.labels,
        deployed["output"],
        None if side is None else side["output"],
        pick_samples(setup.data.task, split.inputs, split.labels, deployed["output"]),
        "validation",
    )
    write_report(
        out / "report.html",
        summary=summary,
        metrics=read_metrics(out / "metrics.jsonl"),
        predictions=predictions,
    )
