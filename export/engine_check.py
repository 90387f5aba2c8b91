"""Is a built engine the bundle's model? Asked on its GPU, before it gets into the bundle."""

from mdpd_deploy.bundle import Bundle
from mdpd_deploy.engine_parity import Case, EngineParity, compare_engine, policy, shape_batches
from mdpd_deploy.errors import VerificationError
from mdpd_deploy.export.trt_profiles import Profiles
from mdpd_deploy.golden import load_golden
from mdpd_deploy.manifest import GOLDEN_FILE, MODEL_FILE
from mdpd_deploy.runner import OnnxRunner
from mdpd_deploy.trt_runner import TrtRunner

CPU_LESS = frozenset({"bf16"})  # ONNX Runtime has no CPU kernels: golden vectors alone must do


def check_engine(
    bundle: Bundle, runner: TrtRunner, profiles: Profiles, *, tf32: bool
) -> EngineParity:
    """Compare an engine with the golden vectors and, at its profile's corners, with the graph.

    Raises:
        VerificationError: If it computes something else.
    """
    precision = str(bundle.manifest["precision"])
    golden = load_golden(bundle.path / GOLDEN_FILE)
    reference = None if precision in CPU_LESS else OnnxRunner(bundle.path / MODEL_FILE)
    cases = [Case("golden inputs", golden.arrays, golden.outputs)]
    for name, arrays in shape_batches(golden, profiles):
        cases.append(Case(name, arrays, None if reference is None else reference(arrays)))
    tolerance, agreement = policy(precision, tf32=tf32)
    parity = compare_engine(runner, cases, tolerance=tolerance, agreement=agreement)
    if parity.passed:
        return parity
    worst = max(parity.cases, key=lambda name: parity.cases[name])
    if parity.agreement < agreement:
        what = f"{parity.agreement:.1%} of the classes agree, wanted are {agreement:.1%}"
    else:
        what = f"outputs are off by {parity.scaled_diff:.1e} of their spread at {worst}"
        what += "" if tolerance is None else f", allowed {tolerance:.0e}"
    raise VerificationError(f"engine parity: {what}; the bundle is as it was.")
