"""Engines for `--precision auto` on a GPU: what is timed there, and held to its own parity first."""

from dataclasses import replace
from pathlib import Path

from mdpd_deploy.artifacts.golden import Golden
from mdpd_deploy.export.precision.convert import Candidate
from mdpd_deploy.export.tensorrt.build import build_plan
from mdpd_deploy.export.tensorrt.check import require_parity
from mdpd_deploy.export.tensorrt.layers import check_precision, inspect_layers
from mdpd_deploy.export.tensorrt.options import EngineOptions
from mdpd_deploy.export.tensorrt.profiles import Profiles
from mdpd_deploy.runtimes.tensorrt.cache import PLAN_FILE
from mdpd_deploy.runtimes.tensorrt.library import import_trt
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner


def with_engine(
    candidate: Candidate, folder: Path, golden: Golden, profiles: Profiles, options: EngineOptions
) -> Candidate:
    """Return a candidate with the engine of its graph.

    Raises:
        ExportError: If TensorRT refuses the graph or the build.
        VerificationError: If the engine computes something else, or in another precision.
    """
    precision, graph = candidate.form.precision, candidate.graph
    plan = folder / f"{precision}-{PLAN_FILE}"
    plan.write_bytes(build_plan(graph, profiles, options).plan)
    runner = TrtRunner(plan, host_code=options.version_compatible)
    check_precision(inspect_layers(import_trt(), runner.engine, precision), precision)
    replay = candidate.gates.get("golden")
    known = replay.details["output_diff"] if replay else 0.0
    require_parity(runner, graph, golden, profiles, precision, tf32=options.tf32, known=known)
    return replace(candidate, engine=plan)
