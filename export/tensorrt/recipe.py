"""The recipe for a TensorRT engine, carried by every bundle of `--fmt trt`.

`build_engine.json` says what to build, for `mdpd build-engine`; `build_engine.sh` asks the same of
NVIDIA's `trtexec`. The script writes its engine beside the bundle, since a bundle refuses files it
does not list.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from mdpd_deploy.artifacts.manifest import MODEL_FILE
from mdpd_deploy.errors import ExportError, UserError
from mdpd_deploy.export.tensorrt.build import builder_flags
from mdpd_deploy.export.tensorrt.options import OPTIMIZATION_LEVEL, EngineOptions
from mdpd_deploy.export.tensorrt.profiles import BOUNDS, Profiles
from mdpd_deploy.files import read_json, write_json
from mdpd_deploy.runtimes.tensorrt.cache import AMPERE_PLUS, SAME_CAPABILITY, EngineKey
from mdpd_deploy.runtimes.tensorrt.library import NEXT_MAJOR, OLDEST

RECIPE_FILE = "build_engine.json"
SCRIPT_FILE = "build_engine.sh"
TENSORRT = f">={OLDEST},<{NEXT_MAJOR}"

_SCRIPT = """#!/bin/sh
# Builds the TensorRT engine of this bundle on the machine that will run it (GPU, driver and
# TensorRT {tensorrt} must be those of the deployment).   sh build_engine.sh [ENGINE]
# `mdpd build-engine` builds the same, verifies it and keeps it in the bundle.
set -eu
bundle=$(cd "$(dirname "$0")" && pwd)
engine=${{1:-"$bundle.plan"}}
typed=  # TensorRT 10 must be told to keep the graph's own types, 11 knows nothing else
if trtexec --help 2>/dev/null | grep -q -e --stronglyTyped; then typed=--stronglyTyped; fi
exec trtexec --onnx="$bundle/{model}" --saveEngine="$engine" --skipInference $typed \\
{flags}
"""
_LEVELS = {AMPERE_PLUS: "ampere+", SAME_CAPABILITY: "sameComputeCapability"}


def engine_required(reason: str) -> ExportError:
    """Build the error for `--require-engine`: no engine can come out of this export."""
    return ExportError(
        f"--require-engine: no TensorRT engine can be built here: {reason}. Leave the option out "
        f"to get the verified ONNX bundle with {RECIPE_FILE} and {SCRIPT_FILE}, and run "
        "`mdpd build-engine` where TensorRT and the GPU are."
    )


def write_recipe(
    folder: Path, precision: str, profiles: Profiles, options: EngineOptions, refit: Sequence[str]
) -> None:
    """Write `build_engine.json` and `build_engine.sh` into a bundle."""
    recipe = {
        "command": "mdpd build-engine BUNDLE",
        "onnx": MODEL_FILE,
        "precision": precision,
        "tensorrt": TENSORRT,
        "strongly_typed": True,
        "options": options.model_dump(),
        "flags": builder_flags(options),
        "optimization_level": OPTIMIZATION_LEVEL,
        "profiles": [profiles],
        "refit": list(refit),
        "engine_key": list(EngineKey.model_fields),
    }
    write_json(folder / RECIPE_FILE, recipe)
    script = folder / SCRIPT_FILE
    flags = " \\\n".join(f"    {flag}" for flag in trtexec_flags(profiles, options))
    script.write_text(_SCRIPT.format(model=MODEL_FILE, tensorrt=TENSORRT, flags=flags))
    script.chmod(0o755)


def read_recipe(folder: Path) -> EngineOptions:
    """Return the options that a bundle was exported with; the defaults where it has no recipe.

    Raises:
        UserError: If the recipe is damaged.
    """
    if not (folder / RECIPE_FILE).is_file():
        return EngineOptions()
    plain = read_json(folder / RECIPE_FILE, "recipe")
    try:
        return EngineOptions.model_validate(plain.get("options", {}))
    except (ValidationError, AttributeError):
        raise UserError(f"{folder / RECIPE_FILE} is damaged: export the run again.") from None


def trtexec_flags(profiles: Profiles, options: EngineOptions) -> list[str]:
    """Return the words that ask `trtexec` for the same engine.

    It cannot mark single weights: `--refit` makes all of them refittable, so such an engine differs
    from that of `mdpd build-engine`.
    """
    flags = [
        f"--{bound}Shapes="
        + ",".join(f"{name}:{'x'.join(map(str, p[bound]))}" for name, p in profiles.items())
        for bound in BOUNDS
    ]
    flags.append(f"--builderOptimizationLevel={OPTIMIZATION_LEVEL}")
    if not options.tf32:
        flags.append("--noTF32")
    if options.version_compatible:
        flags.append("--versionCompatible")
    if options.hardware_compatible is not None:
        flags.append(f"--hardwareCompatibilityLevel={_LEVELS[options.hardware_compatible]}")
    if options.refit:
        flags.append("--refit")
    if options.workspace_mib is not None:
        flags.append(f"--memPoolSize=workspace:{options.workspace_mib}M")
    return flags
