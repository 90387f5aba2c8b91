"""What state the GPUs are in while something is timed. Read only: clocks are never changed."""

import shutil
import subprocess

_FIELDS = (
    "index",
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
    "clocks_event_reasons.active",
)


def gpu_state() -> list[dict[str, str]]:
    """Return clocks, power, temperature, throttle reasons and process count of every NVIDIA GPU.

    Values are as the driver's own tool prints them, units included. Empty without that tool.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    gpus = _query(tool, "--query-gpu", ",".join(_FIELDS))
    busy = _query(tool, "--query-compute-apps", "pid")
    rows = [dict(zip(_FIELDS, line.split(", "), strict=False)) for line in gpus]
    return [{**row, "compute_processes_on_machine": str(len(busy))} for row in rows]


def _query(tool: str, query: str, fields: str) -> list[str]:
    try:
        done = subprocess.run(
            [tool, f"{query}={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
