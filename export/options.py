"""What a user can ask of an export."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mdpd_deploy.checks.policy import ParityMode
from mdpd_deploy.export.golden import GoldenSource
from mdpd_deploy.export.precision.forms import Target
from mdpd_deploy.export.tensorrt.options import EngineOptions

Format = Literal["onnx", "trt"]


@dataclass(frozen=True)
class ExportOptions:
    """What a user can ask of an export.

    Attributes:
        fmt: onnx, or trt: the same bundle with the recipe for a TensorRT engine, and the engine
            itself where TensorRT and a GPU are.
        eval_data: Data for the metric gate in place of the run's own.
        metric_gate: False leaves the task metric unmeasured; the manifest says so.
        golden: Where golden inputs come from.
        overwrite: Replace what lies at the target.
        precision: Of `forms.PRECISIONS`, or auto: the fastest that passes its gates.
        target: Where the bundle runs.
        parity: Whether a missed parity or metric gate fails or warns.
        autocast_python: Interpreter of the environment that holds ModelOpt.
        converted: A file that was already converted to `precision`.
        engine: How a TensorRT engine is built, with trt.
    """

    fmt: Format = "onnx"
    eval_data: str | None = None
    metric_gate: bool = True
    golden: GoldenSource = "validation"
    overwrite: bool = False
    precision: str = "fp32"
    target: Target = "cpu"
    parity: ParityMode = "fail"
    autocast_python: Path | None = None
    converted: Path | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
