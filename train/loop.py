"""The training loop: one page for every method, interruptible at any moment."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from mdpd_deploy.config import Config
from mdpd_deploy.data.examples import data_fingerprint
from mdpd_deploy.errors import WorkFailed
from mdpd_deploy.tasks.metrics import compute, is_better
from mdpd_deploy.train.batches import StepDataset, step_loader
from mdpd_deploy.train.checkpoint import (
    Checkpoints,
    Progress,
    save_best,
)
from mdpd_deploy.train.evaluate import run_over
from mdpd_deploy.train.fisher import inherit_important
from mdpd_deploy.train.log import MetricsLog, require_folder
from mdpd_deploy.train.mean import WeightMean
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

LOG_EVERY = 10  # steps
MEASURED_STEPS = 2  # of each turn live bytes are counted on these; they are left out of timings


def train(setup: Setup, out: Path, bar: ProgressBar, stop_request: StopRequest) -> Progress:
    """Train to the planned end, from the newest checkpoint if there is one.

    Args:
        setup: From `prepare`.
        out: The run folder; `config.yaml` is already there.
        bar: Shows how it goes.
        stop_request: Obeyed after a step, with a checkpoint.

    Returns:
        Where the run ended. The method holds the last weights, or their mean if there is one,
        `best.safetensors` the best.

    Raises:
        WorkFailed: If the run diverges, or its folder is gone.
    """
    config, method, state = setup.config, setup.method, setup.state
    optimizer = build_optimizer(method)
    torch.manual_seed(config.train.seed + 1 + state.process_index)
    mean = WeightMean(method, config.train.ema)
    checkpoints = Checkpoints(
        out / "checkpoints", method, optimizer, mean, config.to_yaml(), data_fingerprint(setup.data)
    )
    found = checkpoints.load_newest(bar.say)
    progress = found or Progress()
    if found:
        if state.process_index:  # the checkpoint holds the first process's random state
            torch.manual_seed(hash((config.train.seed, state.process_index, progress.step)))
        bar.say(f"resuming {out} at step {progress.step} of {setup.steps}")
    else:
        inherit_important(setup, bar.say)
        mean.start()
    log = MetricsLog(out, progress.step, config.track.to, enabled=state.is_main_process)
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
    choice, logged = setup.memory.choice, (progress.samples, progress.train_s)
    norms: dict[str, Tensor] = {}
    ended = stops_early(progress, config)  # of a run that was interrupted after its last step
    for step in range(progress.step, progress.step if ended else setup.steps):
        started = time.perf_counter()
        parts = next(loader)
        still = step < config.optim.norms_after * setup.steps
        set_learning_rate(optimizer, setup.rate.share(step), norms_still=still)
        if step < MEASURED_STEPS * method.turns:
            with measured_step(method, optimizer, parts, mean.tensors) as peak:
                losses, now = one_step(setup, optimizer, parts, step)
            most = (progress.memory or {}).get("peak_live_bytes", 0)
            if step < MEASURED_STEPS or peak.peak_bytes > most:
                progress.memory = {"peak_live_bytes": peak.peak_bytes, "parts": dict(peak.parts)}
                progress.memory |= {"choice": asdict(choice)} if choice else {}
        else:
            losses, now = one_step(setup, optimizer, parts, step)
            if is_read(setup, step + 1) and setup.device.type == "cuda":
                torch.cuda.synchronize()
            progress.train_s += time.perf_counter() - started
            progress.samples += len(setup.schedule.members(step))
        mean.update()
        norms |= now
        progress.step = step + 1
        last = progress.step == setup.steps
        if step < method.turns:
            check_gradients(method, step)
        optimizer.zero_grad(set_to_none=True)
        loss = float(losses["loss"]) if is_read(setup, progress.step) else None
        bar.update(progress.step, loss, progress.samples_per_s)
        if progress.step % LOG_EVERY == 0 or last or step == 0:
            lr = optimizer.param_groups[0]["lr"]
            line = log_line(setup, progress, losses, norms, lr, logged)
            logged = progress.samples, progress.train_s
            check_finite(line, method.lr)
            log.write(line)
        stop = False
        if progress.step % setup.eval_every == 0 or last:
            with mean.in_place():
                stop = evaluate(setup, progress, log, checkpoints.folder, bar, parts)
        due = progress.step % setup.checkpoint_every == 0 and not last
        if (due or stop_request.came) and state.is_main_process:
            require_folder(out)
            checkpoints.save(progress)
            stop_request.obey()
        if stop:
            bar.say(f"stopped at step {progress.step}: no gain in {progress.stale} evaluations")
            break
    log.close()
    mean.take()
    return progress


def is_read(setup: Setup, done: int) -> bool:
    """Return whether anything looks at the step after which `done` are done.

    A card is not waited for behind the others, so that the next one's batch is made meanwhile.
    """
    every = (LOG_EVERY, setup.eval_every, setup.checkpoint_every)
    return done in (1, setup.steps) or any(done % count == 0 for count in every)


def one_step(
    setup: Setup, optimizer: torch.optim.Optimizer, parts: Iterable[Batch], step: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run optimiser step `step` (0-based); return its losses and gradient norms by name.

    Gradients stay in place, so that the caller can look at them, and are cleared by it.
    """
    # A process without a share of a short last step adds zeros to the others' losses.
    losses = {name: torch.zeros((), device=setup.device) for name in setup.method.loss_names}
    for batch in parts:
        for name, value in setup.method.step(on_device(setup, batch, step)).items():
            losses[name] = losses[name] + value
    if setup.state.num_processes > 1:
        losses = sum_over_processes(setup, losses, step)
    norms = clip_gradients(setup.method, setup.config.optim.clip, step)
    optimizer.step()
    setup.method.after_step(step, setup.steps)
    return losses, norms


def on_device(setup: Setup, batch: Batch, step: int) -> Batch:
    """Return a batch of step `step` (0-based) where the method is."""
    return replace(
        batch,
        inputs={k: t.to(setup.state.device) for k, t in batch.inputs.items()},
        labels=batch.labels.to(setup.state.device),
        progress=step / setup.steps,
    )


def sum_over_processes(setup: Setup, losses: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Add up the gradients (in place) and losses of all processes, in one message."""
    parameters = [p for group in setup.method.moved(step).values() for p in group.values()]
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
    setup: Setup,
    progress: Progress,
    log: MetricsLog,
    checkpoints: Path,
    bar: ProgressBar,
    parts: Sequence[Batch],
) -> bool:
    """Measure the validation split, keep the best weights; return whether to stop early.

    Args:
        setup: The run.
        progress: Where it stands.
        log: Gets the scores, and how much of the distillation is felt on `parts`.
        checkpoints: The folder of the best weights.
        bar: Shows the scores.
        parts: This process's batches of the last step.
    """
    method, data, config = setup.method, setup.data, setup.config
    split = data.evaluation["validation"]
    method.eval_mode()
    outputs = run_over(setup, "validation", method.outputs)
    felt = method.felt(on_device(setup, parts[0], progress.step)) if parts else None
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
    line = {"step": progress.step, "epoch": epoch, "split": "validation", **measured}
    log.write(line if felt is None else {**line, "felt": felt})
    metric = data.metrics[0]
    scores = {name: values[metric] for name, values in measured.items()}
    bar.evaluated(progress.step, "validation", len(split), metric, scores)
    return stops_early(progress, config)


def stops_early(progress: Progress, config: Config) -> bool:
    """Return whether `train.patience` evaluations have passed without a gain."""
    return config.train.patience is not None and progress.stale >= config.train.patience


def check_gradients(method: Method, step: int) -> None:
    """Assert that every tensor that a step trains has a gradient."""
    for group in method.moved(step).values():
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
    progress: Progress,
    losses: dict[str, Tensor],
    norms: dict[str, Tensor],
    lr: float,
    logged: tuple[int, float],
) -> dict[str, Any]:
    """Return one `train` line of metrics.jsonl.

    Args:
        setup: The run.
        progress: Where it stands.
        losses: Of the last step.
        norms: Its gradient norms by group.
        lr: Of the first group.
        logged: Samples and seconds at the line before.
    """
    line: dict[str, Any] = {
        "step": progress.step,
        "epoch": progress.step / setup.schedule.steps_per_epoch,
        "split": "train",
    }
    line |= {name: float(value) for name, value in losses.items()}
    line |= {f"grad_norm_{name}": float(value) for name, value in norms.items()}
    line["lr"] = lr
    samples, seconds = progress.samples - logged[0], progress.train_s - logged[1]
    if seconds:
        line["samples_per_s"] = round(samples / seconds, 2)
    return line
