"""One cell of the latency grid: every variant of a backbone, one runtime, one batch size.

Rounds, openings and intervals are those of `mdpd bench-latency`; beside the time of the whole call
there is the device's own, between two events, in the same rounds.
"""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from apart import reason_of
from gpu_models import RUNTIMES, WORDS, Prepare, RandomModels
from numpy.typing import NDArray
from torch import Tensor

from mdpd_deploy.config import Config
from mdpd_deploy.serve.latency.cells import CellTimes, Plan, join, measure
from mdpd_deploy.serve.latency.estimate import (
    MARGIN,
    milliseconds,
    paired_ratio,
    percentiles_ms,
    verdict,
)
from mdpd_deploy.serve.latency.gpu_state import gpu_state
from mdpd_deploy.serve.latency.inputs import Arrays, InputSource, size_of
from mdpd_deploy.serve.latency.report import CONTROL, DEPLOYED
from mdpd_deploy.serve.latency.runtimes import PreparedCall, TorchSession
from mdpd_deploy.serve.latency.variants import Variant, variants_of_run

Row = dict[str, Any]
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How far a runtime's outputs may lie from eager mode's, as a share of the largest one.
AGREEMENT = {"fp32": 0.01, "bf16": 0.1}


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        config: Backbone, side network and adapter options.
        outputs: C, classes.
        precision: fp32 or bf16, of all weights.
        runtime: Of `gpu_models.RUNTIMES`.
        batch: Examples per call.
        rivals: Names from `serve.rival_names`.
        device: "cpu" or "cuda".
        plan: Warm-up and length, openings included.
        seed: Of inputs, order and bootstrap.
    """

    config: Config
    outputs: int
    precision: str
    runtime: str
    batch: int
    rivals: Sequence[str]
    device: str
    plan: Plan
    seed: int = 0


@dataclass
class _Measured:
    """What is known of a cell so far."""

    shares: list[CellTimes] = field(default_factory=list)
    device_ns: list[dict[str, NDArray[np.int64]]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def measure_cell(cell: Cell) -> Row:
    """Time a cell's variants in several openings; call it in a fresh process.

    A variant that cannot be run this way has its reason in `failed`.

    Raises:
        RuntimeError: If the deployed model itself cannot be run.
    """
    torch.manual_seed(cell.seed)
    models = RandomModels(cell.config, cell.outputs)
    variants = variants_of_run(models, cell.rivals)
    inputs = InputSource("random inputs", models.preprocess, cell.outputs)
    sets = inputs.batches(cell.batch, seed=cell.seed)
    prepare = RUNTIMES[cell.runtime]()
    measured = _Measured()
    before = gpu_state()
    for opening in range(cell.plan.openings):
        _measure_opening(cell, opening, variants, sets, prepare, measured)
        gc.collect()
    return {
        "size": size_of(sets),
        **_summary(cell, measured),
        "gpu_state_before": before,
        "gpu_state_after": gpu_state(),
    }


def _measure_opening(
    cell: Cell,
    opening: int,
    variants: Sequence[Variant],
    sets: list[Arrays],
    prepare: Prepare,
    measured: _Measured,
) -> None:
    calls: dict[str, PreparedCall] = {}
    for place in np.random.default_rng(cell.seed + opening).permutation(len(variants)):
        name = variants[place].name
        if name in measured.failed:
            continue
        try:
            calls[name] = _open(cell, variants[place], sets, prepare)
        except Exception as err:  # noqa: BLE001 - whatever a compiler can raise
            measured.failed[name] = reason_of(err)
    for name in (DEPLOYED, CONTROL):
        if name in measured.failed:
            raise RuntimeError(f"{name}: {measured.failed[name]}")
    calls = {v.name: calls[v.name] for v in variants if v.name in calls}
    share = measure(
        calls, inputs=len(sets), plan=cell.plan.share(opening), seed=cell.seed + opening
    )
    measured.shares.append(share)
    if cell.device == "cuda":
        last = {name: call.device_ms[-share.rounds :] for name, call in calls.items()}
        measured.device_ns.append({n: np.rint(1e6 * np.array(ms)) for n, ms in last.items()})


def _open(cell: Cell, variant: Variant, sets: list[Arrays], prepare: Prepare) -> PreparedCall:
    """Open a variant, let the runtime do its first call, and compare its answer to eager mode's."""
    assert variant.load is not None
    model = variant.load()[0].to(DTYPE[cell.precision])
    names = model.backbone.input_names
    eager = TorchSession(model, names, device=cell.device).prepare(sets)
    call = TorchSession(prepare(variant.name, model), names, device=cell.device).prepare(sets)
    call(0)
    expected, found = eager(len(sets) - 1), call(len(sets) - 1)
    assert isinstance(expected, Tensor) and isinstance(found, Tensor)
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= AGREEMENT[cell.precision]:
        raise RuntimeError(f"its outputs lie {off:.1%} from those of eager mode")
    return call


def _summary(cell: Cell, measured: _Measured) -> Row:
    names = [name for name in measured.shares[0].times if name not in measured.failed]
    times = join([_only(share, names) for share in measured.shares])
    wall = _ratios(cell, times.times, times.openings)
    device: dict[str, Row] = {}
    if measured.device_ns:
        joined = {n: np.concatenate([ns[n] for ns in measured.device_ns]) for n in names}
        device = _ratios(cell, joined, times.openings)
    return {
        "rounds": times.rounds,
        "openings": list(times.openings),
        "seconds": times.elapsed,
        "reached": times.reached,
        "variants": {name: {"wall": wall[name], "device": device.get(name)} for name in names},
        "unsettled": [name for name in names if not times.warmup[name].settled],
        "failed": measured.failed,
    }


def _only(share: CellTimes, names: Sequence[str]) -> CellTimes:
    return replace(
        share,
        times={name: share.times[name] for name in names},
        warmup={name: share.warmup[name] for name in names},
    )


def _ratios(
    cell: Cell, times: dict[str, NDArray[np.int64]], openings: tuple[int, ...]
) -> dict[str, Row]:
    """Return percentiles of every variant, and its ratio to the deployed model's time."""
    found = {
        name: paired_ratio(taken, times[DEPLOYED], openings=openings, seed=cell.seed)
        for name, taken in times.items()
    }
    rows: dict[str, Row] = {}
    for name, ratio in found.items():
        rows[name] = {**percentiles_ms(times[name])}
        if name != DEPLOYED:
            said = verdict(ratio, found[CONTROL], MARGIN[cell.device])
            rows[name] |= {
                "ratio": ratio.median,
                "ci95": [ratio.low, ratio.high],
                "openings": list(ratio.openings),
                "verdict": "control" if name == CONTROL else said.code,
            }
    return rows


def latency_table(cells: Iterable[Row]) -> str:
    """Return the Markdown table of one shape, precision and runtime: a group per batch size."""
    cells = sorted(cells, key=lambda cell: cell["batch"])
    good = [cell for cell in cells if cell["reason"] is None]
    lines = []
    if good:
        on_cuda = good[0]["variants"][DEPLOYED]["device"] is not None
        kinds = ("wall", "device") if on_cuda else ("wall",)
        columns = [
            f"batch {cell['batch']}: {words}"
            for cell in good
            for kind in kinds
            for words in (f"{kind} ms", f"× deployed, {kind} (95 %)")
        ]
        lines += [f"| model | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
        for name in dict.fromkeys(name for cell in good for name in cell["variants"]):
            found = [_cells(cell["variants"].get(name), kinds) for cell in good]
            lines.append(f"| `{name}` | {' | '.join(word for words in found for word in words)} |")
    remarks = list(_remarks(cells))
    return "\n".join([*lines, *(["", *remarks] if remarks else [])])


def _cells(variant: Row | None, kinds: Sequence[str]) -> Iterable[str]:
    for kind in kinds:
        if variant is None:
            yield from ("–", "–")
            continue
        yield milliseconds(variant[kind]["p50_ms"])
        if "ratio" not in variant[kind]:
            yield "1"
            continue
        low, high = variant[kind]["ci95"]
        yield f"{variant[kind]['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def _remarks(cells: Iterable[Row]) -> Iterable[str]:
    for cell in cells:
        where = f"{WORDS[cell['runtime']]}, batch {cell['batch']}"
        if cell["reason"] is not None:
            yield f"{where}: not measured: {cell['reason']}"
            continue
        for name, reason in cell["failed"].items():
            yield f"{where}: `{name}` not measured: {reason}"
        if not cell["reached"]:
            yield f"{where}: {cell['rounds']} rounds in {cell['seconds']:.1f} s, a short measurement"
