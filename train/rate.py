"""The learning rate over a run, as a share of its peak: warm-up, decay, tail.

With t in steps, or with `optim.per_epoch` the step at which the epoch of t began:

    t < warmup   from `start` in a line to 1, which comes at t = warmup; without a start from 0, as
                 if at t = -1, so that the last step of the warm-up has 1
    t < end      cosine or line from 1 to `floor`, at t = end; its own t counts from the warm-up's
                 end, or with `optim.warmup_prefix=false` from 0, as timm's CosineLRScheduler does
    beyond       `floor`

Groups with another rate than `optim.lr` have the same shares: floor and start keep their ratio.
"""

import math
from dataclasses import dataclass
from typing import Literal

from mdpd_deploy.config import OptimConfig
from mdpd_deploy.errors import UserError


@dataclass(frozen=True)
class Rate:
    """The course of the learning rate.

    Attributes:
        peak: `optim.lr` or the method's own.
        schedule: How it decays.
        warmup: Steps of the warm-up.
        begin: Step at which the decay's own count begins.
        end: Step at which it ends and the tail begins, if there is one.
        unit: Steps for which the rate stays: 1, or those of an epoch.
        start: Share of the peak at step 0; None = one unit's share of the way.
        floor: Share of the peak at `end`.
    """

    peak: float
    schedule: Literal["cosine", "linear", "constant"]
    warmup: int
    begin: int
    end: int
    unit: int = 1
    start: float | None = None
    floor: float = 0.0

    def share(self, step: int) -> float:
        """Return the share of the peak at a step (0-based)."""
        t = step - step % self.unit
        if t < self.warmup:
            if self.start is None:
                return min(1.0, (t + self.unit) / self.warmup)
            return self.start + (1 - self.start) * t / self.warmup
        if t >= self.end:
            return self.floor
        if self.schedule == "constant":
            return 1.0
        done = (t - self.begin) / (self.end - self.begin)
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.floor + (1 - self.floor) * left

    def words(self, steps: int) -> str:
        """Say how it goes in a run of so many steps, for a plan."""
        start = "" if self.start is None else f" from {self.start * self.peak:g}"
        floor = f"{self.floor * self.peak:g}"
        parts = [f"{self.peak:g}"]
        parts += [f"warm-up of {self.warmup:,} steps{start}"] if self.warmup else []
        parts += [self.schedule + ("" if self.schedule == "constant" else f" to {floor}")]
        parts += [f"the last {steps - self.end:,} steps at {floor}"] if self.end < steps else []
        parts += ["stays within an epoch"] if self.unit > 1 else []
        return ", ".join(parts)


def build_rate(peak: float, steps: int, steps_per_epoch: int, config: OptimConfig) -> Rate:
    """Settle the lengths of a run's phases in steps.

    Args:
        peak: The rate of `optim.lr`'s group.
        steps: Of the run.
        steps_per_epoch: Of its data.
        config: The options.

    Raises:
        UserError: If the phases do not fit into the run, or a rate is above the peak.
    """
    tail = round((config.cooldown_epochs or 0) * steps_per_epoch)
    option, warmup = _warmup(steps, steps_per_epoch, config)
    if warmup + tail > steps or tail == steps:
        tail_words = f" and a tail of {tail:,}" if tail else ""
        raise UserError(
            f"optim.{option}: a warm-up of {warmup:,} steps{tail_words} does not fit into a run of "
            f"{steps:,}: make it shorter, or train longer."
        )
    for name in ("warmup_lr", "min_lr"):
        if (value := getattr(config, name) or 0) > peak:
            raise UserError(
                f"optim.{name}={value:g} is above the learning rate {peak:g}: lower it, or raise "
                "optim.lr."
            )
    return Rate(
        peak,
        config.schedule,
        warmup,
        begin=0 if config.warmup_prefix is False else min(warmup, steps - tail - 1),
        end=steps - tail,
        unit=steps_per_epoch if config.per_epoch else 1,
        start=None if config.warmup_lr is None else config.warmup_lr / peak,
        floor=(config.min_lr or 0) / peak,
    )


def _warmup(steps: int, steps_per_epoch: int, config: OptimConfig) -> tuple[str, int]:
    """Return the option that says how long the warm-up is, and its steps."""
    if config.warmup_steps is not None:
        return "warmup_steps", config.warmup_steps
    if config.warmup_epochs is not None:
        return "warmup_epochs", round(config.warmup_epochs * steps_per_epoch)
    return "warmup", math.ceil(config.warmup * steps)
