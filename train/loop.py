"""The training loop: one page for every method, interruptible at any moment."""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from mdpd_deploy.config import Config
from mdpd_deploy.data import data_fingerprint
from mdpd_deploy.errors import WorkFailed
from mdpd_deploy.files import saying_disk_full, write_text
from mdpd_deploy.run import read_metrics
from mdpd_deploy.tasks.metrics import compute, is_better
from mdpd_deploy.train.batches import StepDataset, step_loader
from mdpd_deploy.train.checkpoint import (
    Progress,
    load_newest,
    save_best,
    save_checkpoint,
)
from mdpd_deploy.train.evaluate import run_over
from mdpd_deploy.train.fisher import inherit_important
from mdpd_deploy.train.memory.forecast import measured_step
from mdpd_deploy.train.methods import Batch, Method
from mdpd_deploy.train.optim import (
    build_optimizer,
    clip_gradients,
    set_learning_rate,
)
from mdpd_deploy.train.progress import ProgressBar
from mdpd_deploy.train.setup import Setup
from mdpd_deploy.train.stopping import StopRequest
from mdpd_deploy.train.trackers import Trackers

LOG_EVERY = 10  # steps
MEASURED_STEPS = 2  # live bytes are counted on these; they are left out of timings


def train(setup: Setup, out: Path, bar: ProgressBar, stop_request: StopRequest) -> Progress:
    """Train to the planned end, from the newest checkpoint if there is one.

    Args:
        setup: From `prepare`.
        out: The run folder; `config.yaml` is already there.
        bar: Shows how it goes.
        stop_request: Obeyed after a step, with a checkpoint.

    Returns:
        Where the run ended. The method holds the last weights, `best.safetensors` the best.

    Raises:
        WorkFailed: If the run diverges, or its folder is gone.
    """
    config, method, state = setup.config, setup.method, setup.state
    checkpoints = out / "checkpoints"
    optimizer = build_optimizer(method)
    torch.manual_seed(config.train.seed + 1 + state.process_index)
    fingerprint, examples = config.to_yaml(), data_fingerprint(setup.data)
    found = load_newest(checkpoints, method, optimizer, fingerprint, examples, bar.say)
    progress = found or Progress()
    if found:
        if state.process_index:  # the checkpoint holds the first process's random state
            torch.manual_seed(hash((config.train.seed, state.process_index, progress.step)))
        bar.say(f"resuming {out} at step {progress.step} of {setup.steps}")
    else:
        inherit_important(setup, bar.say)
    log = MetricsLog(setup, out, progress.step)
    dataset = StepDataset(
        setup.data.train,
        setup.backbone.preprocess,
        setup.task,
        config,
        setup.schedule,
        state.process_index,
    )
    loader = step_loader(dataset, progress.step, setup.steps, config.data.workers)
    method.train_mode()
    window, choice = Window(), setup.memory.choice
    ended = stops_early(progress, config)  # of a run that was interrupted after its last step
    for step in range(progress.step, progress.step if ended else setup.steps):
        started = time.perf_counter()
        parts = next(loader)
        set_learning_rate(optimizer, step, setup.steps, config.optim)
        if step < MEASURED_STEPS:
            with measured_step(method, optimizer, parts) as peak:
                losses, norms = one_step(setup, optimizer, parts, step)
            progress.memory = {"peak_live_bytes": peak.peak_bytes, "parts": dict(peak.parts)}
            progress.memory |= {"choice": asdict(choice)} if choice else {}
        else:
            losses, norms = one_step(setup, optimizer, parts, step)
            if setup.device.type == "cuda":
                torch.cuda.synchronize()
            window.add(len(setup.schedule.members(step)), time.perf_counter() - started)
            progress.train_s += window.last_s
            progress.samples += window.last_n
        progress.step = step + 1
        last = progress.step == setup.steps
        if step == 0:
            check_gradients(method)
        optimizer.zero_grad(set_to_none=True)
        bar.update(progress.step, float(losses["loss"]), progress.samples_per_s)
        if progress.step % LOG_EVERY == 0 or last or step == 0:
            line = log_line(setup, progress.step, losses, norms, optimizer, window)
            check_finite(line, method.lr)
            log.write(line)
        stop = False
        if progress.step % setup.eval_every == 0 or last:
            stop = evaluate(setup, progress, log, checkpoints, bar)
        due = progress.step % setup.checkpoint_every == 0 and not last
        if (due or stop_request.came) and state.is_main_process:
            require_folder(out)
            save_checkpoint(checkpoints, method, optimizer, progress, fingerprint, examples)
            stop_request.obey()
        if stop:
            bar.say(f"stopped at step {progress.step}: no gain in {progress.stale} evaluations")
            break
    log.close()
    return progress


def one_step(
    setup: Setup, optimizer: torch.optim.Optimizer, parts: Iterable[Batch], step: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run optimiser step `step` (0-based); return its losses and gradient norms by name.

    Gradients stay in place, so that the caller can look at them, and are cleared by it.
    """
    # A process without a share of a short last step adds zeros to the others' losses.
    losses = {name: torch.zeros((), device=setup.device) for name in setup.method.loss_names}
    for batch in parts:
        on_device = replace(
            batch,
            inputs={k: t.to(setup.state.device) for k, t in batch.inputs.items()},
            labels=batch.labels.to(setup.state.device),
            progress=step / setup.steps,
        )
        for name, value in setup.method.step(on_device).items():
            losses[name] = losses[name] + value
    if setup.state.num_processes > 1:
        losses = sum_over_processes(setup, losses)
    norms = clip_gradients(setup.method, setup.config.optim.clip)
    optimizer.step()
    setup.method.after_step(step, setup.steps)
    return losses, norms


def sum_over_processes(setup: Setup, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up the gradients (in place) and losses of all processes, in one message."""
    parameters = [p for group in setup.method.groups.values() for p in group.values()]
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    names = sorted(losses)
    flat = torch.cat([*(p.flatten() for p in pieces), *(losses[n].reshape(1) for n in names)])
    summed = reduce(flat, "sum")
    assert isinstance(summed, Tensor)
    sizes = [p.numel() for p in parameters]
    chunks = summed.split([*sizes, len(names)])
    for parameter, chunk in zip(parameters, chunks, strict=False):
        parameter.grad = chunk.view_as(parameter).clone()
    return dict(zip(names, chunks[-1].unbind(), strict=True))


def evaluate(
    setup: Setup, progress: Progress, log: "MetricsLog", checkpoints: Path, bar: ProgressBar
) -> bool:
    """Measure the validation split, keep the best weights; return whether to stop early."""
    method, data, config = setup.method, setup.data, setup.config
    split = data.evaluation["validation"]
    method.eval_mode()
    outputs = run_over(
        method.outputs,
        split,
        setup.backbone.preprocess,
        batch=config.train.eval_batch,
        state=setup.state,
    )
    method.train_mode()
    measured = {name: compute(data.metrics, out, split.labels) for name, out in outputs.items()}
    score = measured["deployed"][data.metrics[0]]
    if not method.may_deploy(progress.step, setup.steps):
        pass  # measured and logged only
    elif not progress.best_step or is_better(score, progress.best):
        progress.best, progress.best_step, progress.stale = score, progress.step, 0
        if setup.state.is_main_process:
            require_folder(checkpoints.parent)
            save_best(checkpoints, method)
    else:
        progress.stale += 1
    epoch = progress.step / setup.schedule.steps_per_epoch
    log.write({"step": progress.step, "epoch": epoch, "split": "validation", **measured})
    metric = data.metrics[0]
    scores = {name: values[metric] for name, values in measured.items()}
    bar.evaluated(progress.step, "validation", len(split), metric, scores)
    return stops_early(progress, config)


def stops_early(progress: Progress, config: Config) -> bool:
    """Return whether `train.patience` evaluations have passed without a gain."""
    return config.train.patience is not None and progress.stale >= config.train.patience


def require_folder(out: Path) -> None:
    """Stop a run whose folder was deleted, before anything is written to another one of its name."""
    if not (out / "config.yaml").is_file():
        raise WorkFailed(
            f"the run folder {out} was deleted or moved while training: put it back and go on with "
            "--resume, or start the run again."
        )


def check_gradients(method: Method) -> None:
    """Assert after the first step that every trained tensor has a gradient."""
    for group in method.groups.values():
        missing = [name for name, p in group.items() if p.grad is None]
        if missing:
            raise AssertionError(f"declared as trained but without a gradient: {missing[:5]}")


def check_finite(line: dict[str, Any], lr: float) -> None:
    """Stop a run that has diverged."""
    if not math.isfinite(line["loss"]):
        raise WorkFailed(
            f"the loss became {line['loss']} at step {line['step']}: the run diverged. Lower "
            f"optim.lr (now {lr:g}), raise optim.warmup or lower optim.clip, and start again."
        )


def log_line(
    setup: Setup,
    step: int,
    losses: dict[str, Tensor],
    norms: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    window: "Window",
) -> dict[str, Any]:
    """Return one `train` line of metrics.jsonl."""
    line: dict[str, Any] = {
        "step": step,
        "epoch": step / setup.schedule.steps_per_epoch,
        "split": "train",
    }
    line |= {name: float(value) for name, value in losses.items()}
    line |= {f"grad_norm_{name}": float(value) for name, value in norms.items()}
    line["lr"] = optimizer.param_groups[0]["lr"]
    if window.seconds:
        line["samples_per_s"] = round(window.samples / window.seconds, 2)
    window.clear()
    return line


class Window:
    """Throughput since the last log line."""

    def __init__(self) -> None:
        self.last_n, self.last_s = 0, 0.0
        self.clear()

    def add(self, samples: int, seconds: float) -> None:
        self.last_n, self.last_s = samples, seconds
        self.samples += samples
        self.seconds += seconds

    def clear(self) -> None:
        self.samples, self.seconds = 0, 0.0


class MetricsLog:
    """Appends lines to metrics.jsonl and sends them to the trackers that were asked for.

    On a resume, lines after the checkpoint are dropped. Only the main process writes.
    """

    def __init__(self, setup: Setup, out: Path, step: int) -> None:
        self.path = out / "metrics.jsonl"
        self.enabled = setup.state.is_main_process
        if self.enabled:
            kept = read_metrics(self.path) if self.path.is_file() else []
            text = "".join(json.dumps(line) + "\n" for line in kept if line["step"] <= step)
            write_text(self.path, text)
            self.trackers = Trackers(setup.config.track.to, out)

    def write(self, line: dict[str, Any]) -> None:
        if self.enabled:
            require_folder(self.path.parent)
            with saying_disk_full(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            self.trackers.write(line)

    def close(self) -> None:
        if self.enabled:
            self.trackers.close()
