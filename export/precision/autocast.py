"""fp16 and bf16 for TensorRT by NVIDIA ModelOpt's AutoCast, run in an environment of its own.

ModelOpt pins other versions of onnx and onnxruntime than ours, so it is called as a program:
`PYTHON -m modelopt.onnx.autocast …`. It decides by the ranges it sees on the golden inputs which
nodes stay FP32. A file that was converted elsewhere goes through the same checks.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mdpd_deploy.errors import ExportError, UserError
from mdpd_deploy.export.precision.material import Material

MODULE = "modelopt.onnx.autocast"
LONGEST_S = 3600


def autocast(precision: str, source: Path, target: Path, material: Material) -> str:
    """Write the graph in mixed precision with float32 inputs and outputs; see `Form.convert`.

    Args:
        precision: fp16 or bf16.
        source: The FP32 graph.
        target: The file to write.
        material: Golden inputs and the interpreter, or the converted file.

    Raises:
        UserError: If there is no interpreter, or none with ModelOpt.
        ExportError: If the conversion fails.
    """
    if material.converted is not None:
        if not material.converted.is_file():
            raise UserError(f"--converted {material.converted} is not a file.")
        shutil.copyfile(material.converted, target)
        return "converted elsewhere"
    if material.autocast_python is None:
        raise UserError(
            f"--precision {precision} for TensorRT is made by NVIDIA ModelOpt in an environment of "
            "its own: name its interpreter with --autocast-python or MDPD_AUTOCAST_PYTHON, or give "
            "a converted file with --converted."
        )
    with tempfile.TemporaryDirectory(prefix="mdpd-autocast-") as scratch:
        data = Path(scratch, "calibration.npz")
        batch: dict[str, Any] = dict(material.golden.batches[0])
        np.savez(data, **batch)
        _run(precision, source, target, data, material.autocast_python)
    return f"ModelOpt AutoCast, ranges from {material.golden.source}"


def _run(precision: str, source: Path, target: Path, data: Path, python: Path) -> None:
    words = [
        *(str(python), "-m", MODULE),
        *("--onnx_path", str(source.resolve()), "--output_path", str(target.resolve())),
        *("--low_precision_type", precision, "--calibration_data", str(data)),
        *("--keep_io_types", "--providers", "cpu"),
    ]
    mine = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            words,
            cwd=data.parent,  # -m puts the working directory first on the path
            env=mine,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LONGEST_S,
            check=False,
        )
    except OSError as err:
        raise UserError(f"--autocast-python {python} cannot be run ({err.strerror}).") from err
    except subprocess.TimeoutExpired as err:
        raise ExportError(f"AutoCast did not end within {LONGEST_S} s.") from err
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode and "No module named" in done.stderr:
        missing = next(line for line in said if "No module named" in line)
        raise UserError(
            f"--autocast-python {python}: ModelOpt cannot be imported there ({missing.strip()}); "
            'install it in that environment: pip install "nvidia-modelopt[onnx]"'
        )
    if done.returncode:
        raise ExportError(f"AutoCast failed: {said[-1].strip() if said else 'it said nothing'}")
    if not target.is_file():
        raise ExportError("AutoCast ended without an error and wrote no file.")
