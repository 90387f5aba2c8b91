"""int8 for OpenVINO: static, by NNCF, with ranges from the task's own training inputs.

The file stays plain ONNX in Q/DQ form. NNCF's smoothing and its correction of biases are left out:
they change the weights, which then are no longer those that were trained (`check_converted`), and
the gates hold without them.
"""

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

import onnx

from mdpd_deploy.errors import missing_extra
from mdpd_deploy.export.precision.material import Material
from mdpd_deploy.runtimes.openvino import import_openvino


def quantise_for_openvino(source: Path, target: Path, material: Material) -> str:
    """Write the statically quantised graph; see `Form.convert`."""
    nncf, calibration = _nncf(), material.calibration()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # progress bars
        made = nncf.quantize(
            onnx.load(source),
            nncf.Dataset(calibration.batches),
            subset_size=len(calibration.batches),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=True,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1),
            ),
        )
    onnx.save(made, target)
    return f"NNCF static quantisation, ranges from {calibration.source}"


def _nncf() -> Any:
    import_openvino()  # first: NNCF sends events too, and not without the package that it bars
    try:
        return importlib.import_module("nncf")
    except ImportError as err:
        raise missing_extra("nncf", "openvino", "quantising for OpenVINO") from err
