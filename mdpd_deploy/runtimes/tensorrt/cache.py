"""The TensorRT engine of a bundle: a cache beside `model.onnx`, used only where its key fits.

BUNDLE/model.plan       the engine, as TensorRT wrote it
BUNDLE/model.plan.json  its key (what it was built from, for and with), layers and parity
BUNDLE/timing.cache     kernel timings, which make the next build faster

An engine is bound to the graph, the TensorRT, the GPU and the driver that it was built with, unless it
was built to run on later releases or other GPUs. All of them are compared before a byte of it is used, because a plan is native code.
"""

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mdpd_deploy.artifacts.manifest import EXTERNAL_FILE, MODEL_FILE, graph_notes
from mdpd_deploy.artifacts.sealed import reader
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import read_json
from mdpd_deploy.runtimes.tensorrt.cuda import Gpu, current_gpu
from mdpd_deploy.runtimes.tensorrt.library import import_trt
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner

PLAN_FILE = "model.plan"
KEY_FILE = "model.plan.json"
TIMING_FILE = "timing.cache"
CACHE_FILES = (PLAN_FILE, KEY_FILE, TIMING_FILE)

AMPERE_PLUS = "ampere+"
SAME_CAPABILITY = "same-compute-capability"
VERSION_COMPATIBLE = "VERSION_COMPATIBLE"
_MEND = "build it again on this machine with `mdpd build-engine`"


class EngineKey(BaseModel):
    """What an engine was built from, for and with; another one is another engine.

    Attributes:
        onnx: SHA-256 of the graph and of its external weights, by file name.
        precision: Of the graph.
        tensorrt: Full version.
        gpu: Name of the device.
        compute_capability: Of the device, e.g. "9.0".
        driver: Version of the NVIDIA driver.
        cuda: Version of CUDA that the driver supports.
        flags: Builder flags that were set, sorted.
        hardware: "none", "ampere+" or "same-compute-capability".
        optimization_level: Of the builder.
        workspace_bytes: Limit that was set; None = the whole GPU.
        profiles: `min`, `opt` and `max` shape of every input.
        refit: Weights that can be exchanged.
        timing_cache_sha256: Of the timing cache that the build left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    onnx: dict[str, str]
    precision: str
    tensorrt: str
    gpu: str
    compute_capability: str
    driver: str
    cuda: str
    flags: list[str]
    hardware: str
    optimization_level: int
    workspace_bytes: int | None
    profiles: dict[str, dict[str, list[int]]]
    refit: list[str]
    timing_cache_sha256: str

    def differences(self, other: "EngineKey") -> list[str]:
        """Return the fields that differ, but for the timing cache, which every build rewrites."""
        mine, its = self.model_dump(), other.model_dump()
        return [name for name in mine if name != "timing_cache_sha256" and mine[name] != its[name]]


def graph_hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return SHA-256 of the graph's files, from a manifest that has been checked."""
    files = manifest["files"]
    return {name: files[name]["sha256"] for name in (MODEL_FILE, EXTERNAL_FILE) if name in files}


def read_key(folder: Path, manifest: Mapping[str, Any]) -> EngineKey | None:
    """Return the key of a bundle's engine, or None when it holds no whole engine.

    Args:
        folder: A bundle that `read_checked` has accepted: every file is what the manifest says.
        manifest: Its manifest.

    Raises:
        UserError: If the key is damaged or belongs to another engine.
    """
    present = [name for name in CACHE_FILES if (folder / name).is_file()]
    if PLAN_FILE not in present or KEY_FILE not in present:
        return None
    plain = read_json(folder / KEY_FILE, "engine", reader(folder, manifest))
    try:
        key = EngineKey.model_validate(plain["key"])
        plan_sha256 = plain["plan_sha256"]
    except (ValidationError, KeyError, TypeError):
        raise UserError(f"the engine's {KEY_FILE} in {folder} is damaged: {_MEND}.") from None
    caches = manifest["caches"]
    timing = caches.get(TIMING_FILE, {}).get("sha256", "")
    if plan_sha256 != caches[PLAN_FILE]["sha256"] or key.timing_cache_sha256 != timing:
        raise UserError(f"{KEY_FILE} in {folder} describes another engine: {_MEND}.")
    return key


def misfit(key: EngineKey, onnx: Mapping[str, str], tensorrt: str, gpu: Gpu) -> str | None:
    """Return why an engine must not be used here, in half a sentence; None when it may.

    Args:
        key: The engine's.
        onnx: `graph_hashes` of the bundle.
        tensorrt: The version that would run it.
        gpu: The device that would run it.
    """
    if dict(key.onnx) != dict(onnx):
        return f"it was built from another {MODEL_FILE}"
    if not _version_fits(key, tensorrt):
        return f"it was built by TensorRT {key.tensorrt}, this machine has {tensorrt}"
    if not _hardware_fits(key, gpu):
        return (
            f"it was built for {key.gpu} (compute capability {key.compute_capability}), this "
            f"machine has {gpu.name} ({gpu.compute_capability})"
        )
    portable = (
        VERSION_COMPATIBLE in key.flags or key.hardware != "none"
    )  # has other machines in mind
    for name, built, here in (("driver", key.driver, gpu.driver), ("CUDA", key.cuda, gpu.cuda)):
        if built != here and not portable:
            return f"it was built with {name} {built or 'unknown'}, this machine has {here}"
    return None


def open_bundle_engine(folder: Path, manifest: Mapping[str, Any]) -> TrtRunner:
    """Open the engine of a checked bundle, if it was built for this machine.

    Raises:
        UserError: If there is no engine, no TensorRT or no GPU, or the engine is not for them.
        WorkFailed: If TensorRT refuses the engine.
    """
    key = read_key(folder, manifest)
    if key is None:
        raise UserError(
            f"{folder} holds no TensorRT engine: build one on the GPU machine with "
            f"`mdpd build-engine {quote(str(folder))}`."
        )
    trt = import_trt("running a TensorRT engine")
    problem = misfit(key, graph_hashes(manifest), trt.__version__, current_gpu())
    if problem is not None:
        raise UserError(f"the engine of {folder} is not for this machine: {problem}; {_MEND}.")
    return TrtRunner(
        folder / PLAN_FILE,
        metadata=graph_notes(manifest),
        host_code=VERSION_COMPATIBLE in key.flags,
        sha256=manifest["caches"][PLAN_FILE]["sha256"],
    )


def _version_fits(key: EngineKey, tensorrt: str) -> bool:
    from packaging.version import Version

    if VERSION_COMPATIBLE in key.flags:
        return Version(key.tensorrt) <= Version(tensorrt)
    return key.tensorrt == tensorrt


def _hardware_fits(key: EngineKey, gpu: Gpu) -> bool:
    if key.hardware == AMPERE_PLUS:
        return int(gpu.compute_capability.partition(".")[0]) >= 8
    if key.hardware == SAME_CAPABILITY:
        return key.compute_capability == gpu.compute_capability
    return (key.gpu, key.compute_capability) == (gpu.name, gpu.compute_capability)
