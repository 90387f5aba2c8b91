"""What state the GPUs are in while something is timed. Read only: clocks are never changed."""

from mdpd_deploy.machine import output_of

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
    gpus = _query("--query-gpu", ",".join(_FIELDS))
    busy = _query("--query-compute-apps", "pid")
    rows = [dict(zip(_FIELDS, line.split(", "), strict=False)) for line in gpus]
    return [{**row, "compute_processes_on_machine": str(len(busy))} for row in rows]


def _query(query: str, fields: str) -> list[str]:
    printed = output_of("nvidia-smi", f"{query}={fields}", "--format=csv,noheader")
    return [line.strip() for line in printed.splitlines() if line.strip()]
