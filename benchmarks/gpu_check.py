"""Everything that wants a card, in one command of at most eight minutes: `make gpu-check`.

    OUT=results make gpu-check                       # on the machine with the card
    CHECK_DEVICE=cpu OUT=/tmp/check make gpu-check   # the same code, small, without one
    python benchmarks/gpu_check.py --collect results # docs/results/gpu-CARD.json and docs/gpu.md

Needs no network and no file outside this repository: it runs from the checkout, not installed. What
the machine lacks can be brought as wheels: `make gpu-wheels` puts them into build/gpu-wheels. The most
valuable part comes first, and each
leaves its result when it ends, so that a time that runs out loses only what had not begun. What
docs/results has of this very card, PyTorch and way to measure is not measured again
(`CHECK_AGAIN=1`: it is), so that every short loan adds rows:

    tests      those marked `gpu`
    run        a short real training, killed by SIGKILL and resumed, with its accuracy
    training   bytes that CUDA's allocator counts beside our forecast, and the time of a step
    latency    eager, as CUDA graphs and compiled; deployed, bare, and side networks kept
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINKED = ROOT / "build" / "types"  # the packages as they are when installed
WHEELS, SITE = ROOT / "build" / "gpu-wheels", ROOT / "build" / "gpu-site"
LIMIT_S = 460.0  # of all parts together
TESTS, ROWS, RUN = "tests.txt", "gpu.json", "run.json"
METHODS = "norms,mdpd:unipt,full,mdpd:sherl,side:unipt,side:sherl,side:lst,side:dtlv1,lora,probe"
GRID = ["--precisions", "fp32", "--methods", METHODS, "--steps", "10", "--seconds", "4",
        "--openings", "3", "--rivals", "bare,unipt,sherl,lst,dtlv1"]  # fmt: skip
SMALL = ["--small", "--shapes", "vit", "--methods", "norms,mdpd:unipt", "--batches", "2",
         "--seconds", "0.2", "--steps", "3", "--rivals", "bare,unipt"]  # fmt: skip


def parts(out: Path, device: str) -> list[tuple[str, float, Callable[[float], str]]]:
    """Return (name, most seconds, what to do with the seconds left) of every part, in order."""
    grid = [sys.executable, "benchmarks/gpu.py", "--device", device, "--out", str(out / ROWS)]
    train, time_it = ([*grid, "--parts", part] for part in ("training", "latency"))
    if device == "cpu":
        training, latency = [[*train, *SMALL]], [[*time_it, *SMALL, "--runtimes", "eager"]]
    else:
        train, time_it = [*train, *GRID], [*time_it, *GRID]
        training = [[*train, "--shapes", "vit"], [*train, "--shapes", "bert"]]
        latency = [
            [*time_it, "--shapes", "vit", "--runtimes", "eager,graphs", "--batches", "1"],
            [*time_it, "--shapes", "bert", "--runtimes", "eager,graphs", "--batches", "1"],
            [*time_it, "--shapes", "vit", "--runtimes", "eager,graphs", "--batches", "8,32"],
            [*time_it, "--shapes", "vit", "--runtimes", "compile", "--batches", "1,8,32"],
        ]
    return [
        ("tests", 80, partial(run_tests, out / TESTS, device)),
        ("run", 80, partial(killed_and_resumed, out, device)),
        ("training", 140, partial(in_turn, training)),
        ("latency", 240, partial(in_turn, latency)),
    ]


def run_tests(log: Path, device: str, limit_s: float) -> str:
    """Run the tests marked `gpu`; what pytest prints goes to a file."""
    words = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
             "tests/test_gpu.py"]  # fmt: skip
    with log.open("w") as file:
        code = ended(words, limit_s, CHECK_DEVICE=device, stdout=file)
    last = (log.read_text().strip().splitlines() or ["nothing was printed"])[-1]
    return last if code is not None else f"cut off: {last}"


def in_turn(commands: list[list[str]], limit_s: float) -> str:
    """Run commands one after another in the time that all of them have together."""
    end = time.monotonic() + limit_s
    codes = []
    for words in commands:
        left = end - time.monotonic()
        codes.append(ended(words, left) if left > 5 else None)
    if set(codes) == {0}:
        return "done"
    return ", ".join("cut off" if code is None else f"exit code {code}" for code in codes)


def killed_and_resumed(out: Path, device: str, limit_s: float) -> str:
    """Train on the digits, kill the process once a checkpoint is there, resume, and compare."""
    with tempfile.TemporaryDirectory() as folder:  # `out` takes few files
        return _killed_and_resumed(out, Path(folder), device, time.monotonic() + limit_s)


def _killed_and_resumed(out: Path, folder: Path, device: str, end: float) -> str:
    steps = 120 if device == "cuda" else 12
    train = [sys.executable, "-P", "-m", "mdpd_deploy", "train"]
    words = [*train, "--task", "digits", "--steps", str(steps), "--device", device,
             "--set", f"train.eval_every={steps // 3}"]  # fmt: skip
    whole, cut = folder / "whole", folder / "cut"
    start = time.monotonic()
    code = ended([*words, "--out", str(whole)], end - time.monotonic())
    if code != 0:
        return "cut off" if code is None else f"the training ended with exit code {code}"
    seconds = time.monotonic() - start
    child = subprocess.Popen(
        [*words, "--out", str(cut)], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    while child.poll() is None and not list(cut.glob("checkpoints/*/*.safetensors")):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    killed = not (cut / "summary.json").exists()
    code = ended([*train, "--resume", str(cut)], end - time.monotonic())
    if code != 0:
        return "cut off" if code is None else f"the resume ended with exit code {code}"
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, cut)]
    scores = [summary["metrics"]["deployed"]["accuracy"] for summary in summaries]
    files = [summary["files"] for summary in summaries]
    found = {
        "device": device, "steps": steps, "seconds": round(seconds, 1), "killed": killed,
        "accuracy": scores[0], "accuracy_resumed": scores[1], "same_files": files[0] == files[1],
        "peak_cuda_bytes": summaries[0]["memory"]["peak_cuda_bytes"],
        "forecast_bytes": summaries[0]["memory"]["forecast_bytes"],
    }  # fmt: skip
    (out / RUN).write_text(json.dumps(found, indent=1) + "\n")
    return f"accuracy {scores[0]:.4f}, resumed after SIGKILL {scores[1]:.4f}"


def environment() -> dict[str, str]:
    """Return this process's variables, with the packages of the checkout to be found."""
    paths = [str(LINKED), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def ended(words: list[str], limit_s: float, stdout: Any = None, **more: str) -> int | None:
    """Run a command in the repository; return its exit code, None where its time ran out."""
    child = subprocess.Popen(
        words, cwd=ROOT, env=environment() | more, stdout=stdout, stderr=subprocess.STDOUT if stdout else None,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return child.wait(max(limit_s, 1))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return None


def known_rows(rows: Path) -> None:
    """Begin with what docs/results has of this card, where it was measured by this PyTorch."""
    import torch

    known = result_file(torch.cuda.get_device_name())
    if rows.exists() or not known.exists():
        return
    if json.loads(known.read_text())["settings"]["torch"] == torch.__version__:
        shutil.copy(known, rows)


def result_file(card: str) -> Path:
    """Return the file of a card's results."""
    return DOCS / "results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


def collect(folder: Path, note: str | None) -> None:
    """Put what a check left into the documents: a file by the card's name, and one page."""
    from gpu import page
    from gpu_results import read_results
    from gpu_shapes import full_shapes

    content = read_results(folder / ROWS)
    content["run"] = json.loads((folder / RUN).read_text()) if (folder / RUN).exists() else None
    tests = folder / TESTS
    content["tests"] = tests.read_text().strip().splitlines()[-1] if tests.exists() else None
    content["note"] = note or content.get("note")
    card = content["settings"]["card"] or "cpu"
    path = result_file(card)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    titles = {key: setting.title for key, setting in full_shapes(folder).items()}
    run = content["run"]
    said = [f"Tests that need a card: {content['tests'].rstrip('.')}."] if content["tests"] else []
    said += [content["note"]] if content["note"] else []
    if run:
        said.append(
            f"A training of {run['steps']} steps on the digits took {run['seconds']} s and reached "
            f"{100 * run['accuracy']:.1f} % ({100 * run['accuracy_resumed']:.1f} % after SIGKILL and "
            "a resume)."
        )
    head = f"# On a card: {card}\n\nWritten by `make gpu-check` and `gpu_check.py --collect`."
    (DOCS / "gpu.md").write_text("\n\n".join([head, *said, page(content, titles)]) + "\n")
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", type=Path, help="folder that a check wrote")
    parser.add_argument("--note", help="a sentence for the page")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect, options.note)
        return
    device = os.environ.get("CHECK_DEVICE", "cuda")
    out = Path(os.environ.get("OUT") or "build/gpu-check").absolute()
    out.mkdir(parents=True, exist_ok=True)
    if device == "cuda" and not os.environ.get("CHECK_AGAIN"):
        known_rows(out / ROWS)
    end = time.monotonic() + (LIMIT_S if device == "cuda" else 10 * LIMIT_S)
    failed = False
    subprocess.run([sys.executable, "tests/typing/link_tree.py"], cwd=ROOT, check=True)
    if WHEELS.is_dir() and not SITE.is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        wheels = map(str, WHEELS.glob("*.whl"))
        subprocess.run([*install, "--target", str(SITE), *wheels], check=True)
    for name, most, work in parts(out, device):
        start = time.monotonic()
        said = work(min(most if device == "cuda" else 10 * most, end - start))
        failed = failed or "exit code" in said or "failed" in said or "error" in said
        print(f"{name:<10}{time.monotonic() - start:6.0f} s   {said}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
