"""Build a TensorRT plan from an ONNX file, by one code path for 10.12 to 11.

Builds are not deterministic: what comes out is verified by itself, never by its recipe.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdpd_deploy.errors import ExportError
from mdpd_deploy.export.tensorrt.network import mark_refittable, parse_graph
from mdpd_deploy.export.tensorrt.options import OPTIMIZATION_LEVEL, EngineOptions
from mdpd_deploy.export.tensorrt.profiles import Profiles, add_profile
from mdpd_deploy.runtimes.tensorrt.cache import AMPERE_PLUS, SAME_CAPABILITY
from mdpd_deploy.runtimes.tensorrt.library import import_trt, recording_logger, said

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Plan:
    """A serialised engine, and what its build told.

    Attributes:
        plan: The serialised engine, as it goes to the file.
        timing_cache: Kernel timings, for the next build.
        warnings: What TensorRT remarked.
        seconds: How long the build took.
    """

    plan: bytes
    timing_cache: bytes
    warnings: list[str]
    seconds: float


def build_plan(
    graph: Path,
    profiles: Profiles,
    options: EngineOptions,
    *,
    refit: Sequence[str] = (),
    timing_cache: bytes = b"",
) -> Plan:
    """Build the engine of a graph on the GPU of this process.

    Args:
        graph: The `.onnx` file.
        profiles: From `profile_shapes`.
        options: What was asked for.
        refit: Weights that can be exchanged afterwards; needs `options.refit`.
        timing_cache: Of an earlier build on this GPU; another GPU's is left aside.

    Raises:
        UserError: If TensorRT is not installed.
        ExportError: If the graph, the shapes or the build are refused, with TensorRT's reason.
    """
    trt = import_trt("building a TensorRT engine")
    logger = recording_logger(trt)
    builder = trt.Builder(logger)
    network, parser = parse_graph(trt, builder, logger, graph)
    mark_refittable(network, logger, refit)
    config = builder.create_builder_config()
    configure(trt, config, options)
    add_profile(builder, network, config, logger, profiles)
    _use_timing_cache(config, timing_cache)
    started = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    del parser  # not before: the network reads the weights that it holds
    if plan is None:
        raise ExportError(
            f"TensorRT could not build the engine{_limit(options)}: {said(logger.errors)}."
        )
    kept = config.get_timing_cache()
    timings = b"" if kept is None else bytes(kept.serialize())
    return Plan(bytes(plan), timings, logger.warnings, time.monotonic() - started)


def configure(trt: Any, config: Any, options: EngineOptions) -> None:
    """Set flags, limits and the detail that the layer report needs."""
    known = {
        "TF32": trt.BuilderFlag.TF32,
        "VERSION_COMPATIBLE": trt.BuilderFlag.VERSION_COMPATIBLE,
        "REFIT_INDIVIDUAL": trt.BuilderFlag.REFIT_INDIVIDUAL,
    }
    wanted = builder_flags(options)
    for name, flag in known.items():
        (config.set_flag if name in wanted else config.clear_flag)(flag)
    if options.hardware_compatible == AMPERE_PLUS:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.hardware_compatible == SAME_CAPABILITY:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    limit, pool = options.workspace_bytes, trt.MemoryPoolType.WORKSPACE
    if limit is not None:
        config.set_memory_pool_limit(pool, limit)
        if config.get_memory_pool_limit(pool) != limit:
            raise ExportError(f"--workspace {options.workspace_mib}: TensorRT refuses this limit.")


def builder_flags(options: EngineOptions) -> list[str]:
    """Return the builder flags that are set, sorted; TensorRT sets TF32 unless it is cleared."""
    chosen = {
        "TF32": options.tf32,
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT_INDIVIDUAL": options.refit,
    }
    return sorted(name for name, wanted in chosen.items() if wanted)


def _use_timing_cache(config: Any, timing_cache: bytes) -> None:
    """Start from earlier timings where they are of this GPU, else from none."""
    if timing_cache:
        earlier = config.create_timing_cache(timing_cache)
        if earlier is not None and config.set_timing_cache(earlier, ignore_mismatch=False):
            return
        log.info("the bundle's timing cache is of another GPU or TensorRT: not used")
    if not config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False):
        raise ExportError("TensorRT refuses an empty timing cache.")


def _limit(options: EngineOptions) -> str:
    if options.workspace_mib is None:
        return ""
    return f" within --workspace {options.workspace_mib} (MiB)"
