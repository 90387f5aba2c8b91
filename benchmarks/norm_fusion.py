"""Does ONNX Runtime's fusion of Add and LayerNorm pay on this CPU?

    python benchmarks/norm_fusion.py BUNDLE … --seconds 2 --openings 4 --out norm-fusion.json

`mdpd_deploy/runtimes/onnx.py` opens graphs on a CPU without that fusion; this measures why. Two openings of
one and the same graph can differ by some per cent throughout a measurement, which no number of rounds
averages out. So every cell is measured with several fresh openings, in random order, and each of them
is shown: with the fusion again (the A/A control) and without it, as ratios to the first.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.bundle import load_bundle
from mdpd_deploy.artifacts.manifest import MODEL_FILE
from mdpd_deploy.machine import describe
from mdpd_deploy.runtimes.onnx import SLOW_FUSIONS
from mdpd_deploy.serve.latency.cells import Plan, measure
from mdpd_deploy.serve.latency.estimate import paired_ratio
from mdpd_deploy.serve.latency.runtimes import ONNX_ENTRIES

BASE, CONTROL, WITHOUT = "fused", "fused again", "not fused"
INPUTS = 3  # that rounds rotate through


def open_graph(path: Path, threads: int, name: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in ONNX_ENTRIES.items():
        options.add_session_config_entry(key, value)
    left_out = SLOW_FUSIONS["cpu"] if name == WITHOUT else None
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(path, options, providers, disabled_optimizers=left_out)


def random_batch(
    session: Any, batch: int, tokens: int, rng: np.random.Generator
) -> dict[str, NDArray]:
    """Return whole texts of `tokens` tokens, or pictures of noise."""
    arrays = {}
    for port in session.get_inputs():
        if port.name == "input_ids":
            arrays[port.name] = rng.integers(1000, 2000, (batch, tokens))
        elif "int64" in port.type:
            arrays[port.name] = np.full((batch, tokens), int(port.name == "attention_mask"))
        else:
            shape = (batch, *port.shape[1:])
            arrays[port.name] = rng.standard_normal(shape, dtype=np.float32)
    return arrays


def cell(path: Path, *, threads: int, batch: int, tokens: int, seconds: float, openings: int):
    """Return the ratios of every opening by name."""
    rng = np.random.default_rng(0)
    first = open_graph(path, threads, BASE)
    batches = [random_batch(first, batch, tokens, rng) for _ in range(INPUTS)]
    found: dict[str, list[float]] = {CONTROL: [], WITHOUT: []}
    for opening in range(openings):
        names = [BASE, CONTROL, WITHOUT]
        random.Random(opening).shuffle(names)
        sessions = {name: open_graph(path, threads, name) for name in names}
        calls = {
            name: lambda index, session=session: session.run(None, batches[index])
            for name, session in sessions.items()
        }
        plan = Plan(seconds=seconds, warmup_seconds=0.3)
        times = measure(calls, inputs=INPUTS, plan=plan, seed=opening).times
        for name, ratios in found.items():
            ratios.append(round(paired_ratio(times[name], times[BASE], seed=0).median, 3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", default="16,64,128")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each opening")
    parser.add_argument("--openings", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("norm-fusion.json"))
    args = parser.parse_args()
    rows = []
    print(
        f"| bundle | threads | batch | tokens | {CONTROL} | {WITHOUT} |\n|---|---|---|---|---|---|"
    )
    for folder in args.bundles:
        bundle = load_bundle(folder)
        text = "input_ids" in {port["name"] for port in bundle.graph()["inputs"]}
        for threads in map(int, args.threads.split(",")):
            for batch in map(int, args.batches.split(",")):
                for tokens in map(int, args.tokens.split(",") if text else ["0"]):
                    shape = dict(threads=threads, batch=batch, tokens=tokens)
                    words = dict(seconds=args.seconds, openings=args.openings)
                    found = cell(bundle.path / MODEL_FILE, **shape, **words)
                    rows.append({"task": bundle.manifest["task"], **shape, "ratios": found})
                    spans = " | ".join(f"{min(v):.2f} to {max(v):.2f}" for v in found.values())
                    name, length = bundle.manifest["task"], tokens or "–"
                    print(f"| {name} | {threads} | {batch} | {length} | {spans} |", flush=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("bundles", "out")}
    report = {"machine": describe(), "settings": settings}
    args.out.write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
