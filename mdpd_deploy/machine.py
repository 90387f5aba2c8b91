"""What this machine is and how much of it we may use. No torch here."""

import contextlib
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "mdpd-deploy",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "peft",
    "tokenizers",
    "numpy",
    "pillow",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tensorrt",
)
CGROUPS = Path("/sys/fs/cgroup")


def cpu_count() -> int:
    """Return the processors this process may keep busy: the affinity, cut by a container's quota.

    `os.cpu_count()` counts the host's processors; a pool of that size in a container with a quota
    of two spends its time being throttled.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = allowed or 1
    quota = _cpu_quota()
    return count if quota is None else max(1, min(count, round(quota)))


def describe() -> dict[str, Any]:
    """Return processor, cores, memory [bytes], GPUs, system and package versions, fit for JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpu": _gpus(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide results."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def output_of(tool: str, *words: str) -> str:
    """Return what a program prints; "" where there is none or it fails."""
    if (found := shutil.which(tool)) is None:
        return ""
    try:
        return subprocess.run(
            [found, *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def gpu_driver() -> str:
    """Return the version of the NVIDIA driver, "" where its own tool does not report one."""
    gpus = _gpus()
    return gpus[0]["driver"] if gpus else ""


def _cpu_quota() -> float | None:
    """Smallest CPU quota of this process's control groups, in processors; None without one."""
    quotas = [_quota_v2(folder / "cpu.max") for folder in _cgroup_folders("")]
    quotas += [_quota_v1(folder) for folder in _cgroup_folders("cpu")]
    found = [quota for quota in quotas if quota is not None]
    return min(found) if found else None


def _cgroup_folders(controller: str) -> list[Path]:
    """Folders of our control group and its parents; `controller` "" means version 2."""
    root = CGROUPS / controller if controller else CGROUPS
    folders = [root]
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inner = Path(path.lstrip("/"))
            folders += [root / inner, *(root / parent for parent in inner.parents)]
    return folders


def _quota_v2(file: Path) -> float | None:
    limit, _, period = _read(file).partition(" ")
    return int(limit) / int(period) if limit.isdigit() and period.strip().isdigit() else None


def _quota_v1(folder: Path) -> float | None:
    limit = _read(folder / "cpu.cfs_quota_us").strip()
    period = _read(folder / "cpu.cfs_period_us").strip()
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() else None


def _memory_bytes() -> int | None:
    """Memory of the machine or of the container, whichever is smaller."""
    sizes = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) * 1024)
    for folder in _cgroup_folders(""):
        limit = _read(folder / "memory.max").strip()
        if limit.isdigit():
            sizes.append(int(limit))
    return min(sizes) if sizes else None


def free_memory_bytes() -> int:
    """Memory that is free now, of the machine or of the container, whichever is less."""
    import psutil

    free = [psutil.virtual_memory().available]
    for folder in _cgroup_folders(""):
        limit, used = (_read(folder / f"memory.{name}").strip() for name in ("max", "current"))
        if limit.isdigit() and used.isdigit():
            free.append(max(0, int(limit) - int(used)))
    return min(free)


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, str]]:
    """Name, memory and driver of every NVIDIA GPU that the driver's own tool reports."""
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    lines = output_of("nvidia-smi", *query).splitlines()
    fields = ("name", "memory", "driver")
    rows = [line.split(",") for line in lines if line.count(",") == 2]
    return [dict(zip(fields, map(str.strip, row), strict=True)) for row in rows]


def _read(file: Path | str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
