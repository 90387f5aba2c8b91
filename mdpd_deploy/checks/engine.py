"""What an engine is held to, and at which shapes. No torch here.

The policy is that of the graph's own parity: differences are scaled by the spread of the reference
outputs. TF32 has the mantissa of FP16, so an engine that may use it is held to FP16's tolerance. A
quantised engine may be off by what golden vectors may be anywhere: `allowed_again`, twice what its
graph was off by at the export. Which rows must keep their class never depends on what the engine
gave: those whose margin exceeds the policy's drift.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.golden import Golden
from mdpd_deploy.checks.compare import Limits
from mdpd_deploy.checks.policy import POLICIES, allowed_again
from mdpd_deploy.runtimes.base import Arrays


def limits(precision: str, *, tf32: bool, known: float) -> Limits:
    """Return what an engine is held to.

    Args:
        precision: `manifest.precision`.
        tf32: Whether FP32 products may use TF32.
        known: How far the graph's own golden outputs are from PyTorch's, in standard deviations.
    """
    policy = POLICIES["fp16" if precision == "fp32" and tf32 else precision]
    tolerance = policy.scaled_diff
    if tolerance is None:
        tolerance = allowed_again(known, on_cpu=False)
    return Limits(tolerance, policy.drift, policy.agreement)


def shape_batches(
    golden: Golden, profiles: Mapping[str, Mapping[str, Sequence[int]]]
) -> Iterator[tuple[str, Arrays]]:
    """Yield batches at the corners of an engine's profile, made of the golden inputs' own values.

    Args:
        golden: Where token ids and pixels come from.
        profiles: `min`, `opt` and `max` shape of every input.
    """
    corners = {tuple(tuple(p[bound]) for p in profiles.values()): bound for bound in _BOUNDS}
    for shapes, bound in corners.items():
        yield f"{bound} shape", _batch(golden, dict(zip(profiles, shapes, strict=True)))
    first = next(iter(profiles.values()))
    if any(low != high for low, high in zip(first["min"][1:], first["max"][1:], strict=True)):
        crossed = {n: [p["min"][0], *p["max"][1:]] for n, p in profiles.items()}
        yield "min batch at the max length", _batch(golden, crossed)


_BOUNDS = ("max", "opt", "min")  # equal shapes keep the last name


def _batch(golden: Golden, shapes: Mapping[str, Sequence[int]]) -> Arrays:
    """Repeat golden values to the shapes wanted; masks keep whole first tokens in every row."""
    arrays = {}
    for name, shape in shapes.items():
        source = golden.arrays[name]
        if name == "attention_mask":
            arrays[name] = _mask(tuple(shape), source.dtype)
        else:
            arrays[name] = np.resize(source, tuple(shape))
    return arrays


def _mask(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Row i of several is padded from token 2 + i on; the last row is whole."""
    mask = np.ones(shape, dtype=dtype)
    for row in range(shape[0] - 1):
        mask[row, 2 + row :] = 0
    return mask
