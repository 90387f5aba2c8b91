"""Servers to be put under load, and requests whose right answers are known."""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
from open_loop import Request

from mdpd_deploy.artifacts.bundle import Bundle
from mdpd_deploy.artifacts.golden import load_golden
from mdpd_deploy.artifacts.tasks import BundleTask
from mdpd_deploy.data.examples import Raw
from mdpd_deploy.runtimes.base import TASK_ID, only

TOLERANCE = 1e-3  # of the outputs' spread: padding and batching move float32 by far less
DATATYPES = {"float32": "FP32", "int64": "INT64"}


@contextlib.contextmanager
def started(
    bundles: Mapping[str, Path], engine: str, *options: str, log: Path
) -> Iterator[tuple[str, psutil.Process]]:
    """Run `mdpd serve` in a process of its own; yield its URL, once ready, and the process.

    Args:
        bundles: Folders by name.
        engine: local or ray.
        options: Further words.
        log: Where its output goes.
    """
    words = [f"{name}={path}" for name, path in bundles.items()]
    command = [sys.executable, "-m", "mdpd_deploy", "serve", *words, "--engine", engine, *options]
    with _running(command, log) as process:
        yield _wait_for(process, log), psutil.Process(process.pid)


def _wait_for(process: subprocess.Popen, log: Path, seconds: float = 300) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = re.search(r"^serving .* at (http\S+)$", log.read_text(), re.MULTILINE)
        if found:
            with urllib.request.urlopen(f"{found[1]}/v2/health/ready", timeout=30):
                return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit(f"the server did not start; the end of {log}:\n{log.read_text()[-2000:]}")


RIVALS = {"litserve": "/predict", "mosec": "/inference"}  # where each is asked


@contextlib.contextmanager
def rival(
    name: str, python: Path, bundle: Path, request: Request, *, port: int, words: Sequence[str],
    log: Path,
) -> Iterator[tuple[str, psutil.Process]]:  # fmt: skip
    """Run one of `RIVALS` in a process of its own; yield its URL, once it answers, and the process.

    Args:
        name: Which.
        python: The interpreter that has it, see `rival_model.py`.
        bundle: Of texts.
        request: What it must answer.
        port: Where it listens.
        words: Further options.
        log: Where its output goes.
    """
    script = Path(__file__).with_name(f"rival_{name}.py")
    command = [str(python), str(script), str(bundle), "--port", str(port), *words]
    url = f"http://127.0.0.1:{port}"
    asked = urllib.request.Request(url + RIVALS[name], request.body, request.headers)
    with _running(command, log) as process:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            try:
                with urllib.request.urlopen(asked, timeout=30):
                    break
            except OSError:
                time.sleep(0.5)
        else:
            raise SystemExit(f"{name} did not start: see {log}")
        yield url, psutil.Process(process.pid)


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a command in the block, and leave none of its processes."""
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        tree = family(process.pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for each in tree:  # LitServe leaves its own behind
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def family(pid: int) -> list[psutil.Process]:
    """Return a process with all below it; empty when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def processor_ns(processes: Sequence[psutil.Process]) -> int:
    """Return the processor time of all threads so far (Linux)."""
    files = (
        file for each in processes for file in Path(f"/proc/{each.pid}/task").glob("*/schedstat")
    )
    return sum(int(file.read_text().split()[0]) for file in files)


def memory_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process and its children."""
    total = 0
    for each in family(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total


def protocol_requests(name: str, bundle: Bundle, rows: int = 1) -> list[Request]:
    """Return golden inputs as requests of the protocol with binary tensors, all tasks in turn.

    Args:
        name: The model's name.
        bundle: The bundle served.
        rows: Inputs per request.
    """
    found = []
    for task in bundle.tasks:
        raws, outputs = _golden(task)
        allowed = TOLERANCE * float(outputs.std())
        for start in range(0, len(raws) - rows + 1, rows):
            part = raws[start : start + rows]
            expected = outputs[start : start + rows]
            arrays = graph_arrays(bundle, task, part)
            found.append(_protocol_request(name, arrays, expected, allowed))
    return found


def graph_arrays(bundle: Bundle, task: BundleTask, raws: Sequence[Raw]) -> dict[str, np.ndarray]:
    """Return raw inputs of one task as the graph takes them."""
    arrays = dict(task.preprocess(raws))
    if bundle.mixed:
        arrays[TASK_ID] = np.full(len(raws), task.index, dtype=np.int64)
    return arrays


def _protocol_request(
    name: str, arrays: dict[str, np.ndarray], expected: np.ndarray, allowed: float
) -> Request:
    inputs = [
        {
            "name": key,
            "datatype": DATATYPES[str(array.dtype)],
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for key, array in arrays.items()
    ]
    plain = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    header = json.dumps(plain).encode()

    def problem(body: bytes, headers: Mapping[str, str]) -> str | None:
        length = int(headers["Inference-Header-Content-Length"])
        shape = json.loads(body[:length])["outputs"][0]["shape"]
        given = np.frombuffer(body[length:], "<f4").reshape(shape)[:, : expected.shape[1]]
        right = given.shape == expected.shape and np.abs(given - expected).max() <= allowed
        return None if right else "wrong answer"

    return Request(
        f"/v2/models/{name}/infer",
        b"".join([header, *(array.tobytes() for array in arrays.values())]),
        {
            "Inference-Header-Content-Length": str(len(header)),
            "Content-Type": "application/octet-stream",
        },
        problem,
    )


def plain_requests(name: str, bundle: Bundle) -> list[Request]:
    """Return golden inputs as raw pictures and texts, all tasks in turn."""
    found = []
    for task in bundle.tasks:
        for raw, output in zip(*_golden(task), strict=True):
            wanted = task.decode({task.task.output: output[None]})[0].to_json()
            key = "score" if "score" in wanted else "label"

            def problem(
                body: bytes, headers: Mapping[str, str], wanted: dict = wanted, key: str = key
            ) -> str | None:
                given = json.loads(body)["predictions"][0][key]
                same = given == wanted[key] or (
                    key == "score" and abs(given - wanted[key]) <= 1e-3 * max(1, abs(wanted[key]))
                )
                return None if same else "wrong answer"

            where = f"/v1/models/{name}"
            if isinstance(raw, str | tuple):
                body = json.dumps({"inputs": [raw], "task": task.name}).encode()
                headers = {"Content-Type": "application/json"}
                found.append(Request(f"{where}/predict", body, headers, problem))
            else:
                stream = io.BytesIO()
                raw.save(stream, format="PNG")
                headers = {"Content-Type": "image/png"}
                path = f"{where}/classify?task={task.name}"
                found.append(Request(path, stream.getvalue(), headers, problem))
    return found


def _golden(task: BundleTask) -> tuple[Sequence[Raw], np.ndarray]:
    assert task.golden is not None
    golden = load_golden(task.golden)
    return golden.raws, only(golden.outputs)
