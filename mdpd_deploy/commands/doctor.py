"""`mdpd doctor`: what this machine offers, what is missing, and how to mend it."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import typer

from mdpd_deploy.commands.verb import Json, print_json

State = Literal["ok", "absent", "problem"]

NEEDED_BYTES = (
    2 * 10**9
)  # a run with checkpoints, its bundle and the temporary graphs of a benchmark
MARKS = {"ok": "OK", "absent": "-", "problem": "PROBLEM"}
PURPOSES = {
    "onnx": "run exported models on the CPU",
    "onnx-gpu": "run exported models on an NVIDIA GPU, instead of onnx",
    "openvino": "run exported models with OpenVINO, in bf16 where the processor has it",
    "trt": "build TensorRT engines",
    "serve": "serve bundles over HTTP",
    "sign": "sign bundles and check signatures",
    "xlsx": "read Excel workbooks",
    "track": "log runs to TensorBoard or trackio",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        area: `versions`, `devices`, `extras`, `folders` or `runs`.
        name: What was looked at.
        state: `ok`; `absent` (an option that is not there); `problem` (something will fail).
        found: What was seen.
        mend: The command or step that changes it; empty when there is nothing to do.
    """

    area: str
    name: str
    state: State
    found: str
    mend: str = ""


def command(
    json: Json = False,
) -> None:
    """Check versions, devices, extras, folders and runs; each with the mend if it needs one.

    Ends with exit code 1 if something will fail; an extra that is not installed is no problem.
    """
    checks = examine()
    healthy = all(check.state != "problem" for check in checks)
    if json:
        print_json({"ok": healthy, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks, healthy=healthy)
    raise typer.Exit(0 if healthy else 1)


def examine() -> list[Check]:
    """Look at everything; a part that cannot be looked at becomes a `problem`, never an error."""
    checks: list[Check] = []
    for part in (_versions, _devices, _extras, _folders, _runs):
        area = part.__name__.removeprefix("_")
        try:
            checks += part()
        except Exception as err:  # noqa: BLE001 - broken installations are what this is for
            reason = f"{type(err).__name__}: {_first_line(err)}"
            checks.append(Check(area, area, "problem", reason, _REINSTALL))
    return checks


_REINSTALL = "install again: pip install --force-reinstall mdpd-deploy"


def _versions() -> Iterator[Check]:
    from packaging.requirements import Requirement

    yield Check("versions", "python", "ok", sys.version.split()[0])
    yield Check("versions", "mdpd-deploy", "ok", metadata.version("mdpd-deploy"))
    for text in metadata.requires("mdpd-deploy") or []:
        requirement = Requirement(text)
        if requirement.marker is None:
            yield _package("versions", requirement)


def _package(area: str, requirement: Any) -> Check:
    """Compare one installed package with what the project asks for."""
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(area, requirement.name, "problem", "missing", f'pip install "{wanted}"')
    if requirement.specifier.contains(version, prereleases=True):
        return Check(area, requirement.name, "ok", version)
    found = f"{version}, not {requirement.specifier}"
    return Check(area, requirement.name, "problem", found, f'pip install "{wanted}"')


def _extras() -> Iterator[Check]:
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in metadata.requires("mdpd-deploy") or []]
    for extra, purpose in PURPOSES.items():
        members = [
            _package("extras", requirement)
            for requirement in requirements
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        ]
        missing = [f"{member.name} {member.found}" for member in members if member.state != "ok"]
        if missing:
            found = f"{', '.join(missing)}; needed to {purpose}"
            yield Check("extras", extra, "absent", found, f'pip install "mdpd-deploy[{extra}]"')
        else:
            found = ", ".join(f"{member.name} {member.found}" for member in members)
            yield Check("extras", extra, "ok", found)
    if {"onnxruntime", "onnxruntime-gpu"} <= _installed():
        yield Check(
            "extras",
            "onnx with onnx-gpu",
            "problem",
            "onnxruntime and onnxruntime-gpu overwrite each other's files",
            "pip uninstall onnxruntime onnxruntime-gpu, then install the one you need",
        )


def _installed() -> set[str]:
    names = (found.metadata["Name"] for found in metadata.distributions())
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names if name}


def _devices() -> Iterator[Check]:
    from mdpd_deploy.machine import describe

    machine = describe()
    memory = machine["memory_bytes"]
    size = f", {memory / 1e9:.1f} GB of memory" if memory else ""
    yield Check("devices", "cpu", "ok", f"{machine['cpu']}, {machine['cores']} cores{size}")
    for number, gpu in enumerate(machine["gpu"]):
        found = f"{gpu['name']}, {gpu['memory']}, driver {gpu['driver']}"
        yield Check("devices", f"gpu {number}", "ok", found)
    yield _torch_cuda(gpus=len(machine["gpu"]))
    yield _onnx_providers()


def _torch_cuda(*, gpus: int) -> Check:
    try:
        import torch
    except Exception as err:  # noqa: BLE001 - a half install raises anything, OSError too
        return Check("devices", "torch", "problem", _first_line(err), _REINSTALL)
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return Check("devices", "torch", "ok", f"cuda {torch.version.cuda}, {count} device(s)")
    if gpus:
        found = f"sees no CUDA device, though the driver lists {gpus} (built for CUDA "
        found += f"{torch.version.cuda})"
        mend = "update the NVIDIA driver to one that supports this CUDA version"
        return Check("devices", "torch", "problem", found, mend)
    return Check("devices", "torch", "ok", "cpu only: training and measuring run on the CPU")


def _onnx_providers() -> Check:
    try:
        import onnxruntime
    except Exception as err:  # noqa: BLE001 - as above
        mend = 'pip install "mdpd-deploy[onnx]"'
        return Check("devices", "onnxruntime", "absent", _first_line(err), mend)
    return Check("devices", "onnxruntime", "ok", ", ".join(onnxruntime.get_available_providers()))


def _folders() -> Iterator[Check]:
    hub = os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface")
    places = {
        "current folder (runs/)": (Path.cwd(), "change to a folder of your own, or use --out"),
        "temporary files": (Path(tempfile.gettempdir()), "set TMPDIR to a folder of your own"),
        "downloaded models": (Path(hub), "set HF_HOME to a folder of your own"),
    }
    for name, (folder, mend) in places.items():
        yield _writable(name, folder, mend)


def _writable(name: str, folder: Path, mend: str) -> Check:
    """Try to write below a folder, or below its nearest parent if it does not exist yet."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"mdpd")
        free = shutil.disk_usage(place).free
    except OSError as err:
        return Check("folders", name, "problem", f"{folder}: {err.strerror or err}", mend)
    found = f"{folder}: {free / 1e9:.1f} GB free"
    if free < NEEDED_BYTES:
        return Check("folders", name, "problem", found, f"free some space, or {mend}")
    return Check("folders", name, "ok", found)


def _runs() -> Iterator[Check]:
    from mdpd_deploy.artifacts.run import Run
    from mdpd_deploy.errors import UserError

    try:
        run = Run.open(None)
    except UserError as err:
        yield Check("runs", "newest run", "absent", str(err), "mdpd demo")
        return
    facts = f"{run.summary.get('task')}, {run.summary.get('method')}"
    yield Check("runs", "newest run", "ok", f"{run.path} ({facts})")


def _first_line(err: BaseException) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


def _print(checks: list[Check], *, healthy: bool) -> None:
    area = ""
    for check in checks:
        if check.area != area:
            area = check.area
            typer.echo(area)
        typer.echo(f"  {MARKS[check.state]:8} {check.name:23} {check.found}")
        if check.mend:
            typer.echo(f"  {'':8} {'':23} mend: {check.mend}")
    problems = sum(check.state == "problem" for check in checks)
    typer.echo("\nAll is well." if healthy else f"\n{problems} problem(s): see `mend` above.")
