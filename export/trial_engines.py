"""Engines for `--precision auto` on a GPU: what is timed there, and held to its own parity first."""

from dataclasses import dataclass, replace
from pathlib import Path

from mdpd_deploy.engine_cache import PLAN_FILE
from mdpd_deploy.export.engine_check import require_parity
from mdpd_deploy.export.engine_options import EngineOptions
from mdpd_deploy.export.reduced import Candidate
from mdpd_deploy.export.trt_build import build_plan
from mdpd_deploy.export.trt_layers import check_precision, inspect_layers
from mdpd_deploy.export.trt_profiles import Profiles
from mdpd_deploy.golden import Golden
from mdpd_deploy.trt_library import import_trt
from mdpd_deploy.trt_runner import TrtRunner


@dataclass(frozen=True)
class EngineTrials:
    """Builds the engines of one model's candidates.

    Attributes:
        folder: Where they go.
        golden: Inputs with PyTorch's outputs.
        profiles: Ranges of shapes.
        options: How they are built.
    """

    folder: Path
    golden: Golden
    profiles: Profiles
    options: EngineOptions

    def of(self, candidate: Candidate) -> Candidate:
        """Return a candidate with its engine.

        Raises:
            ExportError: If TensorRT refuses the graph or the build.
            VerificationError: If the engine computes something else, or in another precision.
        """
        precision, graph = candidate.form.precision, candidate.graph
        plan = self.folder / f"{precision}-{PLAN_FILE}"
        plan.write_bytes(build_plan(graph, self.profiles, self.options).plan)
        runner = TrtRunner(plan, host_code=self.options.version_compatible)
        check_precision(inspect_layers(import_trt(), runner.engine, precision), precision)
        tf32 = self.options.tf32
        require_parity(runner, graph, self.golden, self.profiles, precision, tf32=tf32)
        return replace(candidate, engine=plan)
