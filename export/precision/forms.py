"""Which precision exists for which target, and who makes it.

The target is where the file will run: `cpu` is ONNX Runtime or OpenVINO on the CPU, `gpu` is
TensorRT. One int8 file cannot serve all: TensorRT refuses the operators of ONNX Runtime's form, its
own form is slower than FP32 in ONNX Runtime, and ONNX Runtime's is slower than FP32 in OpenVINO.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.export.precision.autocast import autocast
from mdpd_deploy.export.precision.int8_openvino import quantise_for_openvino
from mdpd_deploy.export.precision.int8_trt import quantise_symmetric
from mdpd_deploy.export.precision.material import Material
from mdpd_deploy.export.precision.onnxruntime_cpu import fp16_for_size, quantise_dynamic

Target = Literal["cpu", "gpu"]
AUTO = "auto"


@dataclass(frozen=True)
class Form:
    """One precision for one target.

    Attributes:
        precision: As typed after `--precision`.
        target: Where it runs.
        runtime: What its gates are passed in, `onnx` or `openvino`.
        weights: Type that the weights of matrix products must have.
        convert: Writes the converted graph and says in a phrase how; None = the graph as it is.
        note: What its user should know; empty = nothing.
        takes_converted: Whether a file that was converted elsewhere can be given instead.
    """

    precision: str
    target: Target
    weights: str
    convert: Callable[[Path, Path, Material], str] | None
    note: str = ""
    takes_converted: bool = False
    runtime: str = "onnx"

    @property
    def name(self) -> str:
        """What tables call it: fp32 has two forms on the CPU."""
        own = self.runtime != "openvino" or self.precision.endswith("openvino")
        return self.precision if own else f"{self.precision} in OpenVINO"


FORMS = (
    Form("fp32", "cpu", "float32", None),
    Form(
        "fp16",
        "cpu",
        "float16",
        fp16_for_size,
        note="fp16 on the CPU halves the file and is not faster: x86 computes it in float32",
    ),
    Form("int8-cpu", "cpu", "int8", quantise_dynamic),
    Form("fp32", "cpu", "float32", None, runtime="openvino"),
    Form("bf16", "cpu", "float32", None, runtime="openvino"),
    Form("int8-openvino", "cpu", "int8", quantise_for_openvino, runtime="openvino"),
    Form("fp32", "gpu", "float32", None),
    Form("fp16", "gpu", "float16", partial(autocast, "fp16"), takes_converted=True),
    Form("bf16", "gpu", "bfloat16", partial(autocast, "bf16"), takes_converted=True),
    Form("int8-trt", "gpu", "int8", quantise_symmetric),
)
PRECISIONS = tuple(dict.fromkeys(form.precision for form in FORMS))

_REFUSED = {
    ("int8-trt", "cpu"): (
        "TensorRT's symmetric int8 form is slower than fp32 in ONNX Runtime; use int8-cpu, or add "
        "--fmt trt"
    ),
    ("int8-cpu", "gpu"): (
        "TensorRT refuses the operators of this form (DynamicQuantizeLinear, MatMulInteger); use "
        "int8-trt"
    ),
    ("int8-openvino", "gpu"): "OpenVINO runs on the CPU here; use int8-trt",
}
_UNMADE = {
    "int8": (
        "one int8 file cannot serve all: name int8-cpu (ONNX Runtime), int8-openvino or, with --fmt "
        "trt, int8-trt"
    ),
    "fp8": (
        "no CPU runs it and this version does not make it for TensorRT: use fp16, bf16 or int8-trt "
        "with --fmt trt"
    ),
}


def place_of(fmt: str | None, target: str | None) -> tuple[Literal["onnx", "trt"], Target]:
    """Return format and target: each follows from the other, `onnx` and `cpu` by default.

    Raises:
        UserError: If they contradict each other.
    """
    if target is not None and target not in get_args(Target):
        raise unknown("--target", target, get_args(Target))
    if fmt == "trt" and target == "cpu":
        raise UserError("--fmt trt runs on a GPU: use --target gpu, or --fmt onnx for the CPU.")
    if fmt == "onnx" and target == "gpu":
        raise UserError(
            "--target gpu is served by TensorRT: use --fmt trt (its model.onnx is plain ONNX too)."
        )
    return ("trt", "gpu") if fmt == "trt" or target == "gpu" else ("onnx", "cpu")


def form_of(precision: str, target: Target) -> Form:
    """Look a form up.

    Raises:
        UserError: With the reason, if the precision is not valid for the target.
    """
    if precision in _UNMADE:
        raise UserError(f"--precision {precision}: {_UNMADE[precision]}.")
    if precision not in PRECISIONS:
        raise unknown("--precision", precision, (*PRECISIONS, AUTO))
    if (precision, target) in _REFUSED:
        place = "--fmt trt" if target == "gpu" else "--target cpu"
        raise UserError(f"--precision {precision} {place}: {_REFUSED[precision, target]}.")
    return next(form for form in forms_for(target) if form.precision == precision)


def forms_for(target: Target) -> list[Form]:
    """Return what `--precision auto` tries, fp32 first (on the CPU in ONNX Runtime)."""
    return [form for form in FORMS if form.target == target]
