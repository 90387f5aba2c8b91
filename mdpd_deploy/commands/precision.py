"""The precision of `mdpd export`: what can be made, how `auto` times it, and what was tried."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.artifacts.run import Run
    from mdpd_deploy.export.options import ExportOptions
    from mdpd_deploy.export.precision.convert import Candidate
    from mdpd_deploy.export.precision.forms import Form
    from mdpd_deploy.export.precision.trials import Race
    from mdpd_deploy.report.terminal import Console
    from mdpd_deploy.serve.latency.runtimes import Session

log = logging.getLogger(__name__)


def checked_form(
    precision: str, target: str, *, converted: object, seconds: float | None
) -> Form | None:
    """Return what to make, None for auto; refuse what cannot be made or measured."""
    from mdpd_deploy.export.precision.forms import AUTO, form_of
    from mdpd_deploy.export.tensorrt.install import unavailable_reason
    from mdpd_deploy.runtimes.openvino import import_openvino

    if precision == AUTO:
        unavailable = unavailable_reason() if target == "gpu" else None
        if unavailable is not None:
            raise UserError(
                "--precision auto --target gpu times a TensorRT engine of each precision, and none "
                f"can be built here: {unavailable}. Name a precision (fp16 is the usual choice), or "
                "run this on the GPU machine."
            )
        if converted is not None:
            raise UserError("--converted belongs to one precision: name it instead of auto.")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise UserError(f"--seconds {seconds}: give a time above 0.")
        return None
    form = form_of(precision, "gpu" if target == "gpu" else "cpu")
    if converted is not None and not form.takes_converted:
        raise UserError(
            f"--converted belongs to fp16 and bf16 with --fmt trt: given with {precision}."
        )
    if form.runtime == "openvino":
        import_openvino()
    if seconds is not None:
        raise UserError("--seconds belongs to --precision auto: add that, or leave it out.")
    return form


def timer_of(
    run: Run, options: ExportOptions, seconds: float | None
) -> Callable[[Mapping[str, Candidate]], Race]:
    """Return what times graphs or engines against fp32: batch 1 if it can, validation examples."""
    from mdpd_deploy.commands.subject import input_source
    from mdpd_deploy.export.precision.trials import Race
    from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner
    from mdpd_deploy.serve.latency.cells import Plan
    from mdpd_deploy.serve.latency.graph_race import race_graphs
    from mdpd_deploy.serve.latency.runtimes import TrtSession, open_on_cpu

    def opener_of(made: Candidate) -> Callable[[], Session]:
        if (engine := made.engine) is not None:
            host_code = options.engine.version_compatible
            return lambda: TrtSession(TrtRunner(engine, host_code=host_code))
        form = made.form
        return partial(open_on_cpu, made.graph, form.runtime, precision=form.precision)

    def time_graphs(candidates: Mapping[str, Candidate]) -> Race:
        log.info("timing %s in turn", ", ".join(candidates))
        found = race_graphs(
            {name: opener_of(made) for name, made in candidates.items()},
            input_source(run),
            batch=options.engine.static_batch or 1,
            plan=Plan(seconds=seconds),
            device="cuda" if options.target == "gpu" else "cpu",
        )
        return Race(found.timings, found.settings)

    return time_graphs


def print_precision(console: Console, manifest: dict[str, Any]) -> None:
    """Print the receipt, and what `auto` tried."""
    from mdpd_deploy.report.terminal import print_table

    receipt = manifest["receipt"]
    weights = ", ".join(f"{n / 1e6:.1f} MB {kind}" for kind, n in receipt["weight_bytes"].items())
    nodes = ", ".join(f"{n} {kind}" for kind, n in receipt["compute_nodes"].items())
    islands = Counter(name.partition(" ")[0] for name in receipt["fp32_islands"])
    kept = ", ".join(f"{count} {operator}" for operator, count in islands.most_common())
    console.print(f"{manifest['precision']} ({manifest['conversion']}): weights {weights}")
    said = f"; left in FP32: {kept} (named in parity.json)" if kept else ""
    console.print(f"compute nodes: {nodes}{said}")
    if "precision_trials" in manifest:
        tried = manifest["precision_trials"]
        headings = ("precision", "gates", "MB", "time / fp32 [95 %]", "p50 ms", "metric drop")
        rows = [(row["name"], *_cells(row)) for row in tried["trials"]]
        print_table("precisions, timed in turn against fp32", headings, rows)
        console.print(tried["recommendation"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["verdict"] == "failed":
        return (f"failed: {row['reason']}",)
    low, high = row["ci95"]
    points = f"{100 * row['drop']['value']:+.2f} points" if row["drop"] else ""
    ratio = f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return (row["verdict"], f"{row['bytes'] / 1e6:.1f}", ratio, f"{row['p50_ms']:.3f}", points)
