"""What a training step will need in memory, before anything is computed or downloaded.

The very code that trains runs on fake tensors: shapes and types, no memory, no values
(`live.fake_tensors`). It is a second step that counts, with the optimiser's state in place.
`measured_step` is the same measurement around a real step; they agree within 2 %.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mdpd_deploy.backbones import Backbone, load_backbone
from mdpd_deploy.config import Config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify, Task
from mdpd_deploy.train.mean import WeightMean
from mdpd_deploy.train.memory.live import PeakBytes, fake_tensors, measure_peak
from mdpd_deploy.train.methods import Batch, Method, build_method
from mdpd_deploy.train.norm_grad import exact_ways
from mdpd_deploy.train.optim import build_optimizer, clip_gradients


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that one optimiser step needs, and how many numbers it is for.

    Attributes:
        peak_bytes: Weights, batch, activations, gradients and optimiser state at the peak.
        parts: The same by part (weights, trained, optimizer_state, mean, batch, activations).
        trained: Trained parameters.
        deployed_delta: Those by which the deployed model differs from the bare backbone.
    """

    peak_bytes: int
    parts: dict[str, int]
    trained: int
    deployed_delta: int


def forecast(config: Config, task: Task, *, text_length: int | None = None) -> MemoryForecast:
    """Forecast the peak of live tensor memory of a training step, on any machine.

    It is the live-tensor peak of one process on CPU; a CUDA run adds its context and the
    allocator's rounding, and its optimiser works on all tensors at once (a few copies of the
    trained parameters).

    Args:
        config: The run. Data are not read: the batch has `train.batch` examples,
            `train.accumulate` times.
        task: What is to be learnt.
        text_length: Tokens of the longest text in a batch; None takes `data.max_length`. Images
            ignore it.

    Raises:
        UserError: For a backbone, side network or method that cannot be built.
    """
    with fake_tensors():
        backbone = load_backbone(
            config.backbone, max_length=config.data.max_length, pad=config.data.pad, fake=True
        )
        method = build_method(backbone, task.example(config), config)
        method.train_mode()
        optimizer = build_optimizer(method)
        parts = example_batches(backbone, method, config, text_length or config.data.max_length)
        mean = WeightMean(method, config.train.ema)
        _make_state(optimizer)
        peaks = []
        for step in range(method.turns):
            turn = [replace(part, step=step) for part in parts]
            with measured_step(method, optimizer, turn, mean.tensors) as peak:
                _step(method, optimizer, turn[:2])  # a third pass needs what the second did
            peaks.append(peak)
    most = max(peaks, key=lambda peak: peak.peak_bytes)
    trained = sum(method.parameter_counts.values())
    return MemoryForecast(most.peak_bytes, most.parts, trained, method.deployed_delta)


def reason_against(config: Config) -> str | None:
    """Return why a run's method or side network does not fit its backbone; None where it does.

    Raises:
        UserError: If the backbone itself cannot be used.
    """
    with fake_tensors():
        backbone = load_backbone(
            config.backbone, max_length=config.data.max_length, pad=config.data.pad, fake=True
        )
        try:
            build_method(backbone, Classify.numbered(2).example(config), exact_ways(config)[0])
        except UserError as err:
            return str(err)
    return None


def measured_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Batch],
    mean: Mapping[str, Tensor] | None = None,
) -> AbstractContextManager[PeakBytes]:
    """Measure an optimiser step in the block: all that lives in it, and all that it makes.

    Args:
        method: With its backbone's weights and what it trains.
        optimizer: Its state counts from the second step on.
        parts: The batches of the step; on another device than the method they do not count, but
            their copies on its device do.
        mean: Of what is trained, if one is kept.
    """
    return measure_peak(
        device_type=next(method.backbone.parameters()).device.type,
        weights=method.backbone,
        trained=method.modules,
        optimizer_state=optimizer,
        mean=mean,
        batch=[(part.inputs, part.labels) for part in parts],
    )


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser the state that a first step would, without its passes."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _step(method: Method, optimizer: torch.optim.Optimizer, parts: Sequence[Batch]) -> None:
    for part in parts:
        method.step(part)
    clip_gradients(method, method.config.optim.clip, parts[0].step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def example_batches(
    backbone: Backbone, method: Method, config: Config, text_length: int
) -> list[Batch]:
    """Return the batches of one optimiser step, random inputs of the config's sizes.

    Args:
        backbone: Gives the inputs, on its device; labels lie there too.
        method: Knows the task.
        config: `train.batch` examples, `train.accumulate` times.
        text_length: Tokens; images ignore it.
    """
    size, count = config.train.batch_size, config.train.step_size
    tokens = text_length if backbone.takes == "text" else None
    device = next(backbone.parameters()).device
    return [
        Batch(
            inputs=backbone.example_inputs(size, tokens),
            labels=method.task.example_labels(size, device),
            keys=np.arange(size, dtype=np.int64) + size * index,
            step=0,
            count=float(count),
            weight=float(count),
        )
        for index in range(config.train.accumulate)
    ]
