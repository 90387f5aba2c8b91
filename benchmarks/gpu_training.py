"""One method's training step on a device: its bytes beside the forecast, and its time."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import Config
from mdpd_deploy.serve.latency.estimate import milliseconds, paired_ratio
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.memory.forecast import example_batches, measured_step
from mdpd_deploy.train.methods import build_method
from mdpd_deploy.train.optim import build_optimizer, clip_gradients

Row = dict[str, Any]
WARM = 2  # steps before anything is measured: the optimiser's state is there, kernels are loaded


def measure_training(config: Config, outputs: int, device: str, steps: int) -> Row:
    """Take training steps of a method on a device; call it in a fresh process.

    The batch lies on the device, data loading is not part of it.

    Args:
        config: The run.
        outputs: C, classes.
        device: "cpu" or "cuda".
        steps: Timed ones; memory is measured on others before.

    Returns:
        `live_bytes` (peak of live tensors, by our tracker), `allocated_bytes` and
        `reserved_bytes` (peaks of CUDA's allocator, None on a CPU), `step_ms` and `ci95_ms`
        (median and its 95 % bootstrap interval) and `steps`.
    """
    on_cuda = device == "cuda"
    data = config.data
    backbone = load_backbone(config.backbone, max_length=data.max_length, pad=data.pad)
    torch.manual_seed(config.train.seed)
    method = build_method(backbone, Classify.numbered(outputs).example(config), config)
    backbone.to(device)
    method.modules.to(device)
    method.train_mode()
    optimizer = build_optimizer(method)
    parts = example_batches(backbone, method, config, data.max_length)
    total = WARM + 2 + steps
    done = 0

    def step() -> None:
        nonlocal done
        for part in parts:
            method.step(part)
        clip_gradients(method, config.optim.clip)
        optimizer.step()
        method.after_step(done, total)
        optimizer.zero_grad(set_to_none=True)
        if on_cuda:
            torch.cuda.synchronize()
        done += 1

    for _ in range(WARM):
        step()
    allocated = reserved = None
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    with measured_step(method, optimizer, parts) as peak:
        step()
    taken = []
    for _ in range(steps):
        start = time.perf_counter_ns()
        step()
        taken.append(time.perf_counter_ns() - start)
    a_millisecond = np.full(steps, 1_000_000, dtype=np.int64)
    found = paired_ratio(np.array(taken, dtype=np.int64), a_millisecond, seed=0)
    return {
        "live_bytes": peak.peak_bytes,
        "live_parts": dict(peak.parts),
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "step_ms": found.median,
        "ci95_ms": [found.low, found.high],
        "steps": steps,
    }


def measured_bytes(row: Row) -> int:
    """Return the bytes that the forecast is held against: the allocator's where there is one."""
    return row["live_bytes"] if row["allocated_bytes"] is None else row["allocated_bytes"]


def training_table(rows: Iterable[Row]) -> str:
    """Return the Markdown table of one shape and precision, least measured memory first."""
    rows = list(rows)
    good = sorted((row for row in rows if row["reason"] is None), key=measured_bytes)
    on_cuda = any(row["allocated_bytes"] is not None for row in good)
    small = all(measured_bytes(row) < 1e8 for row in good)
    unit, size = ("MB", 1e6) if small else ("GB", 1e9)
    columns = [f"forecast, {unit}", f"live, {unit}"]
    columns += [f"allocated, {unit}", f"reserved, {unit}"] if on_cuda else []
    columns += ["measured / forecast", "ms per step (95 %)"]
    lines = [f"| method | trained | {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) + 1)}"]
    for row in good:
        kinds = ["forecast_bytes", "live_bytes", "allocated_bytes", "reserved_bytes"]
        cells = [f"{row[kind] / size:.2f}" for kind in kinds if row[kind] is not None]
        low, high = map(milliseconds, row["ci95_ms"])
        cells += [f"{row['ratio']:.3f}", f"{milliseconds(row['step_ms'])} [{low}, {high}]"]
        lines.append(f"| `{row['method']}` | {row['trained']:,} | {' | '.join(cells)} |")
    failed = [f"`{row['method']}` has no row: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join([*lines, *(["", *failed] if failed else [])])
