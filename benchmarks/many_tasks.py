"""Many tasks on one backbone: mixed batches against a session per task and against swapping.

    python benchmarks/many_tasks.py BUNDLE... --tasks 1,8,64,512 --batch 1,8 --out FOLDER

BUNDLE comes from `mdpd export --multi`. Tasks beyond its own are perturbed copies of them: speed
and memory do not depend on the values. Each round runs every way once, in random order, on a batch
whose rows ask random tasks; ratios are medians over `bare` (one task's graph on the whole batch)
with a 95 % interval over several openings of every way. `--clock cpu` counts the processor time of this process, which other
programs on the machine inflate far less than the wall clock. Memory is what a fresh process holds
after one run of every task.

bare      one task's graph, its weights constants; `bare again` is the A/A control
mixed     one run, rows of any task: one Gather, explicit norms (`mdpd export --multi`)
fused     the same with LayerNormalization taking each sample's scale and shift
tensorrt  the same in the form of `--fmt trt`
each      mixed, but with a Gather per weight instead of one for all
swap      the base graph, one run per distinct task of the batch, weights fed with the run
sessions  a session per task, one run per distinct task of the batch

With `--openvino bf16` (or fp32) `bare` and `mixed` are run by OpenVINO too, in the same rounds.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mdpd_deploy import load_bundle
from mdpd_deploy.graphs.deltas import HEAD_WEIGHT, Delta, load_delta
from mdpd_deploy.graphs.mixed import TABLE, mixed_graph
from mdpd_deploy.machine import describe
from mdpd_deploy.runtimes.mixed import Swap
from mdpd_deploy.runtimes.onnx import open_session
from mdpd_deploy.runtimes.openvino import OpenVinoRunner
from mdpd_deploy.serve.latency.cells import FEWEST_OPENINGS, CellTimes, Plan, join, measure
from mdpd_deploy.serve.latency.estimate import paired_ratio, percentiles_ms

SPIN = {"session.force_spinning_stop": "1"}  # else idle sessions take the others' processor
CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
TOKENS = 32
MIXED = ("mixed", "fused", "tensorrt", "each")
ROTATE = 4  # prepared batches
NOISE = 0.01


# --- tasks and graphs ----------------------------------------------------------------------------


def some_deltas(bundle, count: int) -> dict[str, Delta]:
    """Return the bundle's own tasks, then perturbed copies of them."""
    base = bundle.manifest["mixed"]["base_sha256"]
    own = [load_delta(t.golden.parent / "delta.safetensors", base) for t in bundle.tasks]
    rng = np.random.default_rng(0)
    found = dict(zip((t.name for t in bundle.tasks), own, strict=True))
    for index in range(len(own), count):
        tensors = {
            name: (value * (1 + NOISE * rng.standard_normal(value.shape))).astype(np.float32)
            for name, value in own[index % len(own)].tensors.items()
        }
        found[f"perturbed-{index}"] = Delta(base, tensors)
    return dict(list(found.items())[:count])


def write_graphs(bundle, deltas: dict[str, Delta], folder: Path) -> dict[str, int]:
    """Write the mixed graphs beside base and weights; return their numbers of nodes."""
    for name in ("base.onnx", "model.onnx.data"):
        if not (folder / name).exists():
            shutil.copy(bundle.path / name, folder)
    base = onnx.load(folder / "base.onnx", load_external_data=False)
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
              for v in base.graph.input if v.name in next(iter(deltas.values())).tensors}  # fmt: skip
    rows = [delta.fit(shapes) for delta in deltas.values()]
    graphs = {
        "mixed": mixed_graph(base, rows),
        "fused": mixed_graph(base, rows, form="fused"),
        "tensorrt": mixed_graph(base, rows, form="tensorrt"),
    }
    graphs["each"] = gather_each(graphs["mixed"])
    for name, proto in graphs.items():
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    return {"base": len(base.graph.node)} | {n: len(g.graph.node) for n, g in graphs.items()}


def gather_each(mixed: onnx.ModelProto) -> onnx.ModelProto:
    """Cut the one table into one per weight, each with a Gather of its own."""
    made = onnx.ModelProto()
    made.CopyFrom(mixed)
    tensors = {t.name: t for t in made.graph.initializer}
    split = next(node for node in made.graph.node if node.name == "tasks.split")
    sizes = numpy_helper.to_array(tensors[split.input[1]])
    parts = np.split(numpy_helper.to_array(tensors[TABLE]), np.cumsum(sizes)[:-1], axis=2)
    gathers = []
    for name, part in zip(split.output, parts, strict=True):
        table = numpy_helper.from_array(np.ascontiguousarray(part), f"{name}.table")
        made.graph.initializer.append(table)
        gathers.append(helper.make_node("Gather", [table.name, "task_id"], [name], name=name))
    made.graph.initializer.remove(tensors[TABLE])
    others = [n for n in made.graph.node if n.name not in ("tasks.split", "tasks.gather")]
    del made.graph.node[:]
    made.graph.node.extend([*gathers, *others])
    return made


def bake(folder: Path, name: str, delta: Delta) -> Path:
    """Write the graph of one task alone, its weights as constants."""
    proto = onnx.load(folder / "base.onnx", load_external_data=False)
    kept = [value for value in proto.graph.input if value.name not in delta.tensors]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    shapes = {t.name: tuple(t.dims) for t in proto.graph.initializer if t.name in delta.tensors}
    fitted = delta.fit(shapes)
    for tensor in proto.graph.initializer:
        if tensor.name in fitted:
            tensor.CopyFrom(numpy_helper.from_array(fitted[tensor.name], tensor.name))
    path = folder / f"alone-{name}.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def inputs_of(bundle, batch: int, tasks: int, seed: int) -> dict[str, np.ndarray]:
    """Return random inputs of one batch; every row asks a random task."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for port in bundle.graph()["inputs"]:
        shape = [{"batch": batch, "sequence": TOKENS}.get(axis, axis) for axis in port["shape"]]
        if port["name"] == "task_id":
            arrays["task_id"] = rng.integers(0, tasks, batch)
        elif port["dtype"] == "float32":
            arrays[port["name"]] = rng.standard_normal(shape, dtype=np.float32)
        elif port["name"] == "input_ids":
            arrays[port["name"]] = rng.integers(1000, 20000, shape)
        else:
            arrays[port["name"]] = np.full(
                shape, int(port["name"] == "attention_mask"), dtype=np.int64
            )
    return arrays


# --- time ----------------------------------------------------------------------------------------


def by_task(arrays: dict[str, np.ndarray]) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Return the rows of each distinct task of a batch, without `task_id`."""
    ids = arrays["task_id"]
    rest = {name: array for name, array in arrays.items() if name != "task_id"}
    return [(int(t), {n: a[ids == t] for n, a in rest.items()}) for t in np.unique(ids)]


def open_ways(deltas: dict[str, Delta], folder: Path, args):
    """Open every way anew; return what makes its calls on prepared batches."""
    names = list(deltas)
    ready = {name: open_graph(folder / f"{name}.onnx", args) for name in MIXED}
    sessions = [
        open_graph(bake(folder, str(place), deltas[name]), args)
        for place, name in enumerate(names[: args.sessions])
    ]
    again = open_graph(folder / "alone-0.onnx", args)
    swap = Swap(folder / "base.onnx", deltas, threads=args.threads)
    words = dict(threads=args.threads, precision=args.openvino)
    files = {"bare": "alone-0.onnx", "mixed": "mixed.onnx"} if args.openvino else {}
    others = {way: OpenVinoRunner(folder / file, **words) for way, file in files.items()}

    def calls_on(batches: list[dict]) -> dict:
        plain = [{n: a for n, a in arrays.items() if n != "task_id"} for arrays in batches]
        parts = [by_task(arrays) for arrays in batches]

        def swapped(index: int) -> None:
            for task, arrays in parts[index]:
                swap[names[task]](arrays)

        def separate(index: int) -> None:
            for task, arrays in parts[index]:
                sessions[task % len(sessions)].run(None, arrays)

        mixed = {
            name: lambda index, session=session: session.run(None, batches[index])
            for name, session in ready.items()
        }
        fed = {"bare": plain, "mixed": batches}
        by_openvino = {
            f"{way} in OpenVINO": lambda index, way=way, runner=runner: runner(fed[way][index])
            for way, runner in others.items()
        }
        return {
            "bare": lambda index: sessions[0].run(None, plain[index]),
            "bare again": lambda index: again.run(None, plain[index]),
            **mixed,
            "swap": swapped,
            "sessions": separate,
            **by_openvino,
        }

    return calls_on


def time_ways(bundle, deltas: dict[str, Delta], folder: Path, args) -> list[dict]:
    """Measure every way at every batch size; the sessions are as many as --sessions allows."""
    sizes = [int(size) for size in args.batch.split(",")]
    batches = {
        size: [inputs_of(bundle, size, len(deltas), seed) for seed in range(ROTATE)]
        for size in sizes
    }
    plan = Plan(openings=args.openings, seconds=args.seconds, warmup_calls=5, warmup_seconds=0.3)
    shares: dict[int, list] = {size: [] for size in sizes}
    for opening in range(plan.openings):
        calls_on = open_ways(deltas, folder, args)
        words = dict(plan=plan.share(opening), seed=opening, clock=CLOCKS[args.clock])
        for size, sets in batches.items():
            shares[size].append(measure(calls_on(sets), inputs=ROTATE, **words))
        del calls_on
    cells = []
    for size, sets in batches.items():
        measured = join(shares[size])
        distinct = float(np.mean([len(np.unique(arrays["task_id"])) for arrays in sets]))
        rows = {way: row_of(way, measured, size) for way in measured.times}
        rows["sessions"]["held"] = min(len(deltas), args.sessions)
        cells.append(
            {"batch": size, "distinct_tasks": distinct, "rounds": measured.rounds, "ways": rows}
        )
    return cells


def open_graph(path: Path, args):
    """Open a session that leaves the processor to the others between its runs."""
    return open_session(path, "cpu", args.threads, entries=SPIN)


def row_of(way: str, measured: CellTimes, batch: int) -> dict:
    """Return latency, throughput and the ratio over bare of one way."""
    times, bare = measured.times[way], measured.times["bare"]
    percentiles = percentiles_ms(times)
    items_per_s = batch / percentiles["p50_ms"] * 1e3
    ratio = paired_ratio(times, bare, openings=measured.openings, seed=0)
    return {**percentiles, "items_per_s": items_per_s, "over_bare": asdict(ratio)}


# --- memory --------------------------------------------------------------------------------------


def hold(folder: Path, way: str, tasks: int, threads: int) -> None:
    """In a process of its own: open, run every task once, print the resident bytes gained."""
    arrays = dict(np.load(folder / "input.npz"))
    ids = arrays.pop("task_id")
    before = resident_bytes()
    keep: list = []
    if way == "mixed":
        keep.append(open_session(folder / "mixed.onnx", "cpu", threads, entries=SPIN))
        for task in range(tasks):
            keep[0].run(None, {**arrays, "task_id": np.full_like(ids, task)})
    elif way == "swap":
        sha = json.loads((folder / "sha.json").read_text())
        deltas = {str(t): load_delta(folder / f"delta-{t}.safetensors", sha) for t in range(tasks)}
        keep.append(Swap(folder / "base.onnx", deltas, threads=threads))
        for name in deltas:
            keep[0][name](arrays)
    else:
        for task in range(tasks):
            graph = folder / f"alone-{task}.onnx"
            keep.append(open_session(graph, "cpu", threads, entries=SPIN))
            keep[-1].run(None, arrays)
    print(resident_bytes() - before)


def resident_bytes() -> int:
    """Return the resident set of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def memory_of(bundle, deltas: dict[str, Delta], folder: Path, args) -> dict:
    """Return resident bytes per way; sessions beyond --sessions are extrapolated and marked."""
    np.savez(folder / "input.npz", **inputs_of(bundle, 1, 1, 0))
    (folder / "sha.json").write_text(json.dumps(bundle.manifest["mixed"]["base_sha256"]))
    for place, delta in enumerate(deltas.values()):
        delta.save(folder / f"delta-{place}.safetensors")
    counts = {"mixed": len(deltas), "swap": len(deltas)}
    found: dict = {way: {"bytes": _child(folder, way, n, args)} for way, n in counts.items()}
    held = min(len(deltas), args.sessions)
    of_held = _child(folder, "sessions", held, args)
    if held < len(deltas):
        one = _child(folder, "sessions", 1, args)
        whole = one + (of_held - one) * (len(deltas) - 1) // (held - 1)
        found["sessions"] = {"bytes": whole, "extrapolated_from": held, "bytes_of_held": of_held}
    else:
        found["sessions"] = {"bytes": of_held}
    return found


def _child(folder: Path, way: str, tasks: int, args) -> int:
    words = [sys.executable, __file__, "--hold", str(folder), way, str(tasks), str(args.threads)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


# --- the floor -----------------------------------------------------------------------------------


def floor_of(deltas: dict[str, Delta], path: Path) -> dict:
    """Return the extra bytes and FLOPs per sample of a mixed batch over a batch of one task.

    The Gather reads and writes a row, the Split once more. The norms' multiply-adds and the head's
    product are those of one task, but for the columns that only widen a head. FLOPs of the
    backbone: two per weight of a matrix and token.
    """
    base = onnx.load(path, load_external_data=False).graph
    positions = [t.dims[1] for t in base.initializer if t.name.endswith("pos_embed")]
    tokens = positions[0] if positions else TOKENS
    first = next(iter(deltas.values())).tensors
    width, features = next(tuple(t.dims) for t in base.initializer if t.name == HEAD_WEIGHT)
    narrowest = min(delta.width for delta in deltas.values())
    norms = sum(value.size for name, value in first.items() if not name.startswith("head."))
    row = 4 * (norms + width * (features + 1))
    matrices = sum(int(np.prod(t.dims)) for t in base.initializer
                   if len(t.dims) == 2 and t.name.startswith("val_"))  # fmt: skip
    return {
        "row_bytes": row,
        "table_bytes": row * len(deltas),
        "extra_bytes": 4 * row,
        "extra_flops": 2 * features * (width - narrowest),
        "tokens": tokens,
        "backbone_flops": 2 * matrices * tokens,
        "backbone_matrix_bytes": 4 * matrices,
    }


# --- report --------------------------------------------------------------------------------------


def chart(cells: list[dict], path: Path, title: str) -> None:
    """Draw time over bare, and memory, against the number of tasks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    colours = {"mixed": "#0b6e4f", "swap": "#3066be", "sessions": "#d1495b"}
    batches = sorted({time["batch"] for cell in cells for time in cell["time"]})
    figure = Figure(figsize=(4.3 * (len(batches) + 1), 3.7), layout="constrained")
    axes = figure.subplots(1, len(batches) + 1)
    tasks = [cell["tasks"] for cell in cells]
    for axis, batch in zip(axes, batches, strict=False):
        for way, colour in colours.items():
            found = [next(t for t in c["time"] if t["batch"] == batch)["ways"][way] for c in cells]
            ratios = [row["over_bare"] for row in found]
            middle = [r["median"] for r in ratios]
            error = [
                [r["median"] - r["low"] for r in ratios],
                [r["high"] - r["median"] for r in ratios],
            ]
            axis.errorbar(tasks, middle, yerr=error, color=colour, marker="o", ms=4, capsize=2)
            _name(axis, tasks, middle, way, colour)
        axis.axhline(1, color="#8a8a8a", lw=1)
        axis.set(title=f"time of a batch of {batch}, bare = 1")
        axis.yaxis.set_major_formatter("{x:.2f}×")
    for way, colour in colours.items():
        values = [cell["memory"][way]["bytes"] / 1e6 for cell in cells]
        real = [c["memory"][way].get("extrapolated_from") is None for c in cells]
        axes[-1].plot(tasks, values, color=colour, lw=1, ls="--" if not all(real) else "-")
        for x, y, sure in zip(tasks, values, real, strict=True):
            axes[-1].plot(x, y, "o", ms=5, color=colour, mfc=colour if sure else "white")
        _name(axes[-1], tasks, values, way, colour)
    axes[-1].set(title="resident memory, MB (hollow: extrapolated)", yscale="log")
    axes[-1].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[-1].yaxis.set_major_formatter("{x:,.0f}")
    for axis in axes:
        axis.set(xscale="log", xlabel="tasks")
        axis.set_xticks(tasks, [str(t) for t in tasks])
        axis.minorticks_off()
        axis.margins(x=0.18)
        axis.grid(color="#dddddd", lw=0.6)
        axis.title.set_fontsize(10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path, metadata={"Date": None})


def _name(axis, x, y, text: str, colour: str) -> None:
    rise = {"mixed": -6, "swap": 6}.get(text, 0)
    axis.annotate(text, (x[-1], y[-1]), xytext=(8, rise), textcoords="offset points", va="center",
                  color=colour, fontsize=9)  # fmt: skip


def table(cells: list[dict]) -> str:
    """Return the figures as a Markdown table."""
    ways = list(cells[0]["time"][0]["ways"])[1:]
    lines = ["| tasks | batch | asked | bare, ms | " + " | ".join(ways) + " |",
             "|---" * (4 + len(ways)) + "|"]  # fmt: skip
    for cell in cells:
        for timed in cell["time"]:
            ratios = [timed["ways"][way]["over_bare"] for way in ways]
            words = [f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in ratios]
            bare = timed["ways"]["bare"]["p50_ms"]
            line = [cell["tasks"], timed["batch"], f"{timed['distinct_tasks']:.1f}", f"{bare:.1f}"]
            lines.append(f"| {' | '.join(map(str, [*line, *words]))} |")
    lines += ["", "| tasks | mixed, MB | swap, MB | sessions, MB |", "|---|---|---|---|"]
    for cell in cells:
        sizes = [cell["memory"][way] for way in ("mixed", "swap", "sessions")]
        words = [f"{s['bytes'] / 1e6:,.0f}{'*' * ('extrapolated_from' in s)}" for s in sizes]
        lines.append(f"| {cell['tasks']} | {' | '.join(words)} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--hold"]:
        folder, way, tasks, threads = sys.argv[2:]
        hold(Path(folder), way, int(tasks), int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--tasks", default="1,8,64,512")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--sessions", type=int, default=16, help="most sessions held at once")
    parser.add_argument("--seconds", type=float, default=8.0, help="measured per cell")
    parser.add_argument("--openings", type=int, default=5, help="times every way is opened anew")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--openvino", choices=("fp32", "bf16"), help="run bare and mixed by it too")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: this process's own time, for a machine that others use too")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("many-tasks"))
    args = parser.parse_args()
    if args.openings < FEWEST_OPENINGS:
        parser.error(f"--openings {args.openings}: give at least {FEWEST_OPENINGS}")
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.bundles:
        bundle = load_bundle(path)
        name = path.name
        cells = []
        for count in map(int, args.tasks.split(",")):
            deltas = some_deltas(bundle, count)
            with tempfile.TemporaryDirectory(prefix="mdpd-many-") as scratch:
                folder = Path(scratch)
                nodes = write_graphs(bundle, deltas, folder)
                cells.append({
                    "tasks": count,
                    "trained": min(count, len(bundle.tasks)),
                    "perturbed": max(0, count - len(bundle.tasks)),
                    "nodes": nodes,
                    "time": time_ways(bundle, deltas, folder, args),
                    "memory": memory_of(bundle, deltas, folder, args),
                    "floor": floor_of(deltas, folder / "base.onnx"),
                })  # fmt: skip
            print(f"{name}: {count} tasks measured", file=sys.stderr)
        report = {"backbone": name, "threads": args.threads,
                  "seconds": args.seconds, "openings": args.openings, "clock": args.clock,
                  "batch": args.batch, "sessions": args.sessions, "machine": describe(), "cells": cells}  # fmt: skip
        stem = args.out / f"many-tasks-{name}"
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        chart(cells, stem.with_suffix(".svg"), f"Many tasks on one backbone: {name}")
        print(f"\n**{name}**\n\n{table(cells)}\n")


if __name__ == "__main__":
    main()
