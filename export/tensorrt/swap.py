"""The base graph of several tasks as one engine whose norms and head can be exchanged.

The graph is the bundle's `base.onnx` with the weights of tasks as constants instead of inputs, so
that TensorRT may fuse them; the engine is then any of the tasks by a refit.
"""

import tempfile
from pathlib import Path

import onnx

from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.manifest import BASE, BASE_FILE, DELTA_FILE, EXTERNAL_FILE, TASKS
from mdpd_deploy.checks.compare import Case
from mdpd_deploy.checks.engine import limits
from mdpd_deploy.errors import UserError
from mdpd_deploy.export.tensorrt.build import build_plan
from mdpd_deploy.export.tensorrt.options import EngineOptions
from mdpd_deploy.export.tensorrt.profiles import Profiles, profile_shapes
from mdpd_deploy.files import saying_disk_full
from mdpd_deploy.graphs.deltas import load_delta
from mdpd_deploy.runtimes.tensorrt.library import import_trt
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner
from mdpd_deploy.runtimes.tensorrt.swap import EngineSwap, SwapTask

PRECISION = "fp32"


def build_swap(bundle: Bundle, plan: Path, options: EngineOptions | None = None) -> EngineSwap:
    """Build one engine for all tasks of a bundle, put each of them in, and verify it.

    Args:
        bundle: A bundle of several tasks that `load_bundle` has just accepted.
        plan: Where the engine goes, outside of the bundle; it is replaced.
        options: How to build it; `refit` is set.

    Raises:
        UserError: If the bundle has one task, or TensorRT or a GPU is missing.
        ExportError: If TensorRT refuses the graph or the build.
        VerificationError: If a task's golden vectors do not come back.
    """
    if not bundle.mixed:
        raise UserError(f"bundle {bundle.path} has one task: there is nothing to swap.")
    import_trt("building a TensorRT engine")
    chosen = (options or EngineOptions()).override({"refit": True})
    with tempfile.TemporaryDirectory(prefix="mdpd-swap-") as folder, saying_disk_full(plan):
        graph, shapes = constant_base(bundle, Path(folder))
        profiles = swap_profiles(bundle, chosen.static_batch)
        plan.write_bytes(build_plan(graph, profiles, chosen, refit=sorted(shapes)).plan)
    runner = TrtRunner(plan, host_code=chosen.version_compatible)
    tolerance = limits(PRECISION, tf32=chosen.tf32, known=0.0).tolerance
    return EngineSwap(runner, _tasks(bundle, shapes), tolerance=tolerance)


def constant_base(bundle: Bundle, folder: Path) -> tuple[Path, dict[str, tuple[int, ...]]]:
    """Write the base graph without the inputs that stand for weights, its weights beside it.

    Returns:
        The graph, and the shapes of the weights that tasks exchange, by name.
    """
    proto = onnx.load_model_from_string(bundle.read(bundle.path / BASE_FILE))
    weights = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    fed = [value.name for value in proto.graph.input if value.name in weights]
    kept = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    onnx.save(proto, folder / BASE_FILE)
    bundle.copy(EXTERNAL_FILE, folder / EXTERNAL_FILE)
    return folder / BASE_FILE, {name: weights[name] for name in fed}


def swap_profiles(bundle: Bundle, static_batch: int | None) -> Profiles:
    """Return the engine's shapes: those of the bundle, without `task_id`."""
    return profile_shapes(bundle.graph(BASE), static_batch=static_batch)


def _tasks(bundle: Bundle, shapes: dict[str, tuple[int, ...]]) -> dict[str, SwapTask]:
    base = bundle.manifest["files"][BASE_FILE]["sha256"]
    found = {}
    for task in bundle.tasks:
        place = bundle.path / TASKS / task.name
        golden = bundle.golden(task)
        tensors = load_delta(place / DELTA_FILE, base, bundle.read).fit(shapes)
        case = Case("golden inputs", golden.arrays, golden.outputs)
        found[task.name] = SwapTask(tensors, case)
    return found
