"""The recipe for a TensorRT engine, written where TensorRT is not at hand (D17).

`build_engine.json` says what to build, `build_engine.sh` builds it with NVIDIA's `trtexec`. The
engine is written beside the bundle, since a bundle refuses files it does not list.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mdpd_deploy.errors import ExportError
from mdpd_deploy.files import write_json
from mdpd_deploy.manifest import MODEL_FILE

RECIPE_FILE = "build_engine.json"
SCRIPT_FILE = "build_engine.sh"
TENSORRT = ">=10.13,<12"

_SCRIPT = """#!/bin/sh
# Builds the TensorRT engine of this bundle on the machine that will run it (GPU, driver and
# TensorRT {tensorrt} must be those of the deployment).   sh build_engine.sh [ENGINE]
set -eu
bundle=$(cd "$(dirname "$0")" && pwd)
engine=${{1:-"$bundle.plan"}}
exec trtexec --onnx="$bundle/{model}" --saveEngine="$engine" \\
    --minShapes={min} \\
    --optShapes={opt} \\
    --maxShapes={max}
"""


def engine_state() -> dict[str, str]:
    """Return `manifest.engine` for `--fmt trt`: why the engine is still to be built."""
    if find_spec("tensorrt") is None:
        reason = "TensorRT is not installed here"
    else:
        reason = "this version of mdpd-deploy writes the recipe and leaves the build to it"
    return {"status": "to-build", "reason": reason}


def engine_unavailable() -> ExportError:
    """Build the error for `--require-engine`: no engine can come out of this export."""
    return ExportError(
        f"--require-engine: no TensorRT engine can be built ({engine_state()['reason']}). Leave "
        f"the option out to get the verified ONNX bundle with {SCRIPT_FILE}, and run that where "
        "TensorRT is."
    )


def profile_shapes(
    inputs: list[dict[str, Any]], shapes: dict[str, dict[str, int]]
) -> dict[str, dict[str, list[int]]]:
    """Return min, opt and max shape of each input, from the bundle's one shape spec.

    Args:
        inputs: `manifest.inputs`.
        shapes: `manifest.shapes`, per axis name.
    """
    return {
        port["name"]: {
            bound: [shapes[axis][bound] if axis in shapes else int(axis) for axis in port["shape"]]
            for bound in ("min", "opt", "max")
        }
        for port in inputs
    }


def write_recipe(
    folder: Path, precision: str, inputs: list[dict[str, Any]], shapes: dict[str, dict[str, int]]
) -> None:
    """Write `build_engine.json` and `build_engine.sh` into a bundle."""
    profiles = profile_shapes(inputs, shapes)
    recipe = {
        "onnx": MODEL_FILE,
        "precision": precision,
        "tf32": True,  # TensorRT's default; FP32 matrix products may use TF32 on the GPU
        "tensorrt": TENSORRT,
        "workspace_bytes": None,  # no limit of ours: too small a limit makes the build fail
        "profiles": [profiles],
        "engine_key": ["onnx sha256", "tensorrt", "gpu", "compute capability", "driver", "cuda"],
    }
    write_json(folder / RECIPE_FILE, recipe)
    bounds = {
        bound: ",".join(
            f"{name}:{'x'.join(map(str, profile[bound]))}" for name, profile in profiles.items()
        )
        for bound in ("min", "opt", "max")
    }
    script = folder / SCRIPT_FILE
    script.write_text(_SCRIPT.format(model=MODEL_FILE, tensorrt=TENSORRT, **bounds))
    script.chmod(0o755)
