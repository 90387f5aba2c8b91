"""Build a bundle's TensorRT engine, verify it on its GPU, and put it beside `model.onnx`.

What is built is verified before it gets into the bundle: the layers must compute in the precision
that was asked for, the golden vectors must come back, and at the corners of the profile the
engine must agree with ONNX Runtime.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.folders import LOCK, claimed, is_claimed
from mdpd_deploy.artifacts.manifest import BARE_FILE, MODEL_FILE
from mdpd_deploy.artifacts.sealed import replace_caches
from mdpd_deploy.checks.compare import Parity
from mdpd_deploy.errors import UserError
from mdpd_deploy.export.tensorrt.build import Plan, build_plan, builder_flags
from mdpd_deploy.export.tensorrt.check import check_engine
from mdpd_deploy.export.tensorrt.layers import LayerReport, check_precision, inspect_layers
from mdpd_deploy.export.tensorrt.options import NO_LEVEL, OPTIMIZATION_LEVEL, EngineOptions
from mdpd_deploy.export.tensorrt.profiles import profile_shapes
from mdpd_deploy.files import read_json, saying_disk_full, sha256_file, write_json
from mdpd_deploy.runtimes.tensorrt.cache import (
    CACHE_FILES,
    KEY_FILE,
    PLAN_FILE,
    TIMING_FILE,
    VERSION_COMPATIBLE,
    EngineKey,
    graph_hashes,
    misfit,
    read_key,
)
from mdpd_deploy.runtimes.tensorrt.cuda import current_gpu
from mdpd_deploy.runtimes.tensorrt.library import import_trt
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner

log = logging.getLogger(__name__)

HEAD = "head."
MOST_WARNINGS = 20
NOT_FOR_TENSORRT = frozenset({"int8-cpu", "int8-openvino"})


@dataclass(frozen=True)
class Installed:
    """The outcome of a build.

    Attributes:
        built: False when the engine that was there is the one asked for.
        reason: Why it was built; "" when it was not.
        record: `model.plan.json`.
    """

    built: bool
    reason: str
    record: dict[str, Any]


def unavailable_reason() -> str | None:
    """Return why no engine can be built in this process, in half a sentence; None when it can."""
    try:
        import_trt()
        current_gpu()
    except UserError as err:
        return str(err).rstrip(".")
    return None


def engine_state(fmt: str) -> dict[str, str]:
    """Return `manifest.engine` of a bundle before an engine was tried."""
    if fmt != "trt":
        return {"status": "not-asked", "reason": ""}
    return {"status": "to-build", "reason": unavailable_reason() or ""}


def install_if_possible(bundle: Bundle, options: EngineOptions) -> None:
    """Build the engine of a bundle that asks for one, where its manifest gives no reason not to."""
    engine = bundle.manifest["engine"]
    if engine["status"] == "to-build" and not engine["reason"]:
        install_engine(bundle, options)


def install_engine(bundle: Bundle, options: EngineOptions, *, rebuild: bool = False) -> Installed:
    """Build and verify the engine of a bundle, unless the one there is what was asked for.

    The bundle stays sound at every moment; when anything fails, it is as it was.

    Raises:
        UserError: If TensorRT or the GPU is missing, or the bundle cannot become such an engine.
        ExportError: If TensorRT refuses the graph or the build.
        VerificationError: If the engine does not compute what the bundle says.
    """
    trt = import_trt("building a TensorRT engine")
    gpu = current_gpu()
    precision = bundle.precision_in("trt")
    if precision in NOT_FOR_TENSORRT:
        raise UserError(
            f"bundle {bundle.path} is {precision}, which TensorRT cannot read: export the run with "
            "--precision int8-trt."
        )
    profiles = profile_shapes(bundle.graph(), static_batch=options.static_batch)
    wanted = EngineKey(
        onnx=graph_hashes(bundle.manifest),
        precision=precision,
        tensorrt=trt.__version__,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
        cuda=gpu.cuda,
        flags=builder_flags(options),
        hardware=options.hardware_compatible or NO_LEVEL,
        optimization_level=OPTIMIZATION_LEVEL,
        workspace_bytes=options.workspace_bytes,
        profiles=profiles,
        refit=list(refit_names(bundle.path, bundle.manifest)) if options.refit else [],
        timing_cache_sha256="",
    )
    reason = "it was asked for" if rebuild else _why_build(bundle, wanted)
    if reason is None:
        return Installed(False, "", read_json(bundle.path / KEY_FILE, "engine"))
    log.info("building the TensorRT engine, which can take minutes: %s", reason)
    with _staging(bundle.path) as staging:
        record = _build(bundle, wanted, options, staging)
        names = [name for name in CACHE_FILES if (staging / name).is_file()]
        replace_caches(bundle.path, staging, names, {"status": "built", "reason": ""})
    return Installed(True, reason, record)


def build_alike(bundle: Bundle, graph: Path, plan: Path) -> TrtRunner:
    """Open another graph's engine, built as the bundle's own was, for a comparison of the two.

    Args:
        bundle: A bundle with an engine.
        graph: An ONNX file with the same inputs.
        plan: Where the engine goes; one that lies there already is opened again.

    Raises:
        UserError: If the bundle holds no engine.
        ExportError: If the build is refused.
    """
    key = read_key(bundle.path, bundle.manifest)
    if key is None:
        raise UserError(
            f"{bundle.path} holds no TensorRT engine: build one with `mdpd build-engine`."
        )
    if not plan.is_file():
        names = {
            tensor.name for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        }
        timings = bundle.path / TIMING_FILE
        built = build_plan(
            graph,
            key.profiles,
            EngineOptions.of(key),
            refit=[name for name in key.refit if name in names],
            timing_cache=timings.read_bytes() if timings.is_file() else b"",
        )
        plan.write_bytes(built.plan)
    return TrtRunner(plan, host_code=VERSION_COMPATIBLE in key.flags)


def refit_names(folder: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of norms and head in a bundle's graph: what a task changes.

    Raises:
        UserError: If its tasks differ in more than that, or its weights are not FP32.
    """
    from safetensors import safe_open

    if not (folder / BARE_FILE).is_file() or manifest["precision"] != "fp32":
        raise UserError(
            "--refit: only an fp32 bundle whose method tunes norms and head can be refitted; this "
            f"one is of the method {manifest['method']!r}, in {manifest['precision']}."
        )
    with safe_open(folder / BARE_FILE, "numpy") as norms:
        tuned = set(norms.keys())
    proto = onnx.load(folder / MODEL_FILE, load_external_data=False)
    names = [tensor.name for tensor in proto.graph.initializer]
    return tuple(sorted(n for n in names if n in tuned or n.startswith(HEAD)))


def _why_build(bundle: Bundle, wanted: EngineKey) -> str | None:
    """Return why the bundle's engine is not the one wanted; None when it is."""
    try:
        key = read_key(bundle.path, bundle.manifest)
    except UserError as err:
        return str(err)
    if key is None:
        return "the bundle holds none"
    foreign = misfit(key, wanted.onnx, wanted.tensorrt, current_gpu())
    if foreign is not None:
        return f"the one there does not fit, {foreign}"
    differences = key.differences(wanted)
    return f"the one there has other {', '.join(differences)}" if differences else None


def _build(
    bundle: Bundle, wanted: EngineKey, options: EngineOptions, staging: Path
) -> dict[str, Any]:
    """Write and verify plan, timing cache and record in `staging`; return the record."""
    earlier = bundle.path / TIMING_FILE
    built = build_plan(
        bundle.path / MODEL_FILE,
        wanted.profiles,
        options,
        refit=wanted.refit,
        timing_cache=earlier.read_bytes() if earlier.is_file() else b"",
    )
    with saying_disk_full(bundle.path / PLAN_FILE):
        (staging / PLAN_FILE).write_bytes(built.plan)
        if built.timing_cache:
            (staging / TIMING_FILE).write_bytes(built.timing_cache)
    timings = sha256_file(staging / TIMING_FILE) if built.timing_cache else ""
    key = wanted.model_copy(update={"timing_cache_sha256": timings})
    runner = TrtRunner(staging / PLAN_FILE, host_code=VERSION_COMPATIBLE in key.flags)
    layers = inspect_layers(import_trt(), runner.engine, key.precision)
    check_precision(layers, key.precision)
    parity = check_engine(bundle, runner, key.profiles, tf32=options.tf32)
    record = _describe(staging, key, built, layers, parity)
    write_json(staging / KEY_FILE, record)
    return record


def _describe(
    staging: Path, key: EngineKey, built: Plan, layers: LayerReport, parity: Parity
) -> dict[str, Any]:
    return {
        "key": key.model_dump(),
        "plan_sha256": sha256_file(staging / PLAN_FILE),
        "plan_bytes": len(built.plan),
        "layers": layers.to_json(),
        "parity": parity.to_json(),
        "build_seconds": round(built.seconds, 1),
        "warnings": built.warnings[:MOST_WARNINGS],
    }


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside the bundle, which one build at a time may have."""
    place = folder.resolve()
    staging = place.parent / f".{place.name}.engine.tmp"
    if is_claimed(staging):
        raise UserError(f"another build of {folder}'s engine is under way: wait for it.")
    with claimed(staging, by="build"):
        for leftover in staging.iterdir():  # of a build that was killed
            if leftover.name != LOCK:
                leftover.unlink()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
