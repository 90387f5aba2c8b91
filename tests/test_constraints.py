"""The versions that are installed together: floors, pins, and what every extra resolves to."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Their packages belong to a machine with a GPU: the driver there says which version fits.
UNPINNED = {"onnxruntime-gpu", "tensorrt"}
KNOWN_BAD = [("pillow", "12.1.0"), ("pyarrow", "23.0.0"), ("h11", "0.15.0")]


def requirements():
    """Every requirement of the project and its extras, but for the project itself."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    found = [Requirement(line) for line in lines]
    return [one for one in found if canonicalize_name(one.name) != PROJECT["name"]]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in found}


def test_every_pin_is_one_that_the_project_accepts():
    pinned = pins()
    asked = {canonicalize_name(one.name): one for one in requirements()}
    assert set(asked) - set(pinned) == UNPINNED
    wrong = [
        str(one)
        for name, one in asked.items()
        if name in pinned and pinned[name] not in one.specifier
    ]
    assert wrong == []


@pytest.mark.parametrize(("name", "version"), KNOWN_BAD)
def test_releases_with_known_holes_are_not_accepted(name, version):
    floors = [one for one in requirements() if canonicalize_name(one.name) == name]
    assert floors and all(version not in one.specifier for one in floors)


@pytest.mark.network
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_resolves_under_the_constraints(extra):
    words = ["install", "--dry-run", "--quiet", "--ignore-installed", "--no-input"]
    words += ["--constraint", "constraints.txt", f".[{extra}]"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode and "https://pypi.nvidia.com/ is not reachable" in done.stderr:
        pytest.skip("NVIDIA's own package index cannot be reached from here")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.network
def test_the_bill_of_materials_names_what_is_installed(tmp_path):
    """`-o`: the environment that runs this is looked at as it is, and never made anew."""
    words = ["sbom", f"TOOLS={tmp_path / 'tools'}", f"SBOM={tmp_path / 'sbom.json'}"]
    made = subprocess.run(
        ["make", "-o", ".venv/.made", "-o", ".venv/.ready-demo", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    text = (tmp_path / "sbom.json").read_text()
    plain = json.loads(text)
    assert plain["bomFormat"] == "CycloneDX" and str(ROOT) not in text
    assert plain["metadata"]["component"]["name"] == PROJECT["name"]
    names = {canonicalize_name(one["name"]) for one in plain["components"]}
    assert {canonicalize_name(one) for one in ("numpy", "onnxruntime", "pillow")} <= names
