"""Does a killed export ever leave half a bundle, or stand in the way of the next one?

    python benchmarks/kill_export.py runs/RUN --kills 10 --out kill_export.json
    python benchmarks/kill_export.py runs/A runs/B --kills 10 --multi      # other words are export's

`mdpd export` is killed (SIGKILL, the whole process group) at moments drawn evenly over the time
that an undisturbed export takes; every second one was replacing a bundle (`--overwrite`). After each
kill the target must be a sound bundle or not exist, and a following export must succeed, pass
`mdpd verify` and leave nothing else in the folder. Exit code 1 when one of these fails.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mdpd_deploy import MdpdError, load_bundle
from mdpd_deploy.machine import describe


def start(verb: str, *words: str | Path) -> subprocess.Popen:
    """Start `mdpd VERB WORDS` in a process group of its own."""
    line = [sys.executable, "-m", "mdpd_deploy", verb, *map(str, words)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(line, stdout=quiet, stderr=quiet, start_new_session=True)


def state_of(bundle: Path) -> str:
    """Say whether a bundle is there whole."""
    if not bundle.exists():
        return "none"
    try:
        load_bundle(bundle)
    except MdpdError as err:
        return f"half: {err}"
    return "sound"


def stage_of(folder: Path) -> str:
    """Say how far an export came, from what lies beside its target."""
    if not list(folder.glob(".*.tmp")):
        return "before the first file, or after the rename"
    files = {path.name for path in folder.glob(".*.tmp/*")}
    for name in (
        "manifest.json",
        "parity.json",
        "golden.safetensors",
        "preprocessor",
        "model.onnx",
    ):
        if name in files:
            return f"after {name}"
    return "before model.onnx"


def kill_one(words: list[str], target: Path, after_s: float, *, overwrite: bool) -> dict | None:
    """Kill an export, look at what is left, and export again; None if it ended before."""
    words = [*words, "--out", target]
    child = start("export", *words, *(["--overwrite"] if overwrite else []))
    try:
        child.wait(timeout=after_s)
        return None
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    stage = stage_of(target.parent)
    left = state_of(target)
    again = start("export", *words, *(["--overwrite"] if left == "sound" else []))
    exported = again.wait() == 0
    verified = start("verify", target).wait() == 0
    others = sorted(path.name for path in target.parent.iterdir() if path != target)
    return {
        "after_s": round(after_s, 2),
        "overwrite": overwrite,
        "stage": stage,
        "left": left,
        "next_export": "succeeded" if exported and verified else "failed",
        "litter": others,
    }


def main() -> int:
    """Kill, look, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options, of_export = parser.parse_known_args()
    words = [*options.runs, *of_export]
    chance = random.Random(options.seed)
    kills = []
    with tempfile.TemporaryDirectory(prefix="mdpd-kill-") as place:
        target = Path(place, "bundle")
        begin = time.monotonic()
        if start("export", *words, "--out", target).wait():
            parser.error(f"`mdpd export {' '.join(words)}` fails")
        whole = time.monotonic() - begin
        while len(kills) < options.kills:
            overwrite = len(kills) % 2 == 1
            if not overwrite:
                shutil.rmtree(target)
            moment = chance.uniform(0, whole)
            kill = kill_one(words, target, moment, overwrite=overwrite)
            if kill is not None:
                kills.append(kill)
                print(json.dumps(kill), flush=True)
    bad = [
        k
        for k in kills
        if k["left"].startswith("half") or k["next_export"] == "failed" or k["litter"]
    ]
    found = {
        "kills": kills,
        "undisturbed_s": round(whole, 1),
        "left": dict(collections.Counter(kill["left"].split(":")[0] for kill in kills)),
        "bad": len(bad),
        "cpu": describe()["cpu"],
    }
    print(json.dumps({key: value for key, value in found.items() if key != "kills"}))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
