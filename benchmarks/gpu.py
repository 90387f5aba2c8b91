"""What do training and inference need on this CUDA card? Memory and time of every method.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --device cpu --small --out /tmp/gpu.json     # try it without a card

ViT-B/16 (224 pixels) and BERT-base (128 tokens) at batch 32, with random weights. Training: our
forecast beside CUDA's own count of bytes, and the time of a step, for every method. Latency: the
faded model, the bare backbone, side networks kept, and LoRA, in eager mode, compiled and as CUDA
graphs. Rows go to a JSON file one by one; the same command goes on where it was ended. Prints the
tables in Markdown.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from apart import Failed, run_apart
from gpu_latency import Cell, latency_table, measure_cell
from gpu_models import RUNTIMES, WORDS
from gpu_results import Results, Row, read_results
from gpu_shapes import SHAPES, full_shapes, small_shapes
from gpu_training import measure_training, measured_bytes, training_table
from memory import PRECISIONS, Setting

from mdpd_deploy.errors import UserError
from mdpd_deploy.machine import describe
from mdpd_deploy.serve.latency.cells import FEWEST_OPENINGS, Plan
from mdpd_deploy.serve.latency.runtimes import choose_device
from mdpd_deploy.serve.latency.variants import rival_names
from mdpd_deploy.train import default_entries, entry_configs, parse_entry

LIMIT_S = 1800.0  # of a row; compiling nine models takes minutes

# By --small: what is asked for where an option does not say.
DEFAULTS: dict[bool, dict[str, Any]] = {
    False: {
        "methods": ",".join(entry.label for entry in default_entries()),
        "precisions": ",".join(PRECISIONS),
        "runtimes": "eager,graphs,compile",
        "batches": "1,8,32",
        "rivals": "bare,unipt,sherl,lst,dtlv1,lora,lora-unmerged",
        "steps": 20,
        "seconds": 10.0,
        "openings": 5,
    },
    True: {
        "methods": "full,lora,probe,mdpd:unipt,side:dtlv1",
        "precisions": "fp32",
        "runtimes": "eager,graphs,compile",
        "batches": "4",
        "rivals": "bare,unipt",
        "steps": 5,
        "seconds": 1.0,
        "openings": 3,
    },
}


def settings_of(args: argparse.Namespace) -> Row:
    """Return how rows are measured; what is measured may differ from call to call."""
    on_cuda = args.device == "cuda"
    return {
        "device": args.device,
        "card": torch.cuda.get_device_name() if on_cuda else None,
        "small": args.small,
        "steps": args.steps,
        "seconds": args.seconds,
        "openings": args.openings,
        "rivals": args.rivals,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def machine_of(device: str) -> Row:
    """Return what this machine is, the card as PyTorch sees it included."""
    machine = describe()
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        machine["cuda"] = {
            "name": card.name,
            "memory_bytes": card.total_memory,
            "compute_capability": f"{card.major}.{card.minor}",
            "runtime": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return machine


def train_rows(args: argparse.Namespace, shapes: dict[str, Setting], results: Results) -> None:
    """Measure the training rows that are asked for and not there."""
    for shape, precision, method in product(args.shapes, args.precisions, args.methods):
        key = {"shape": shape, "precision": precision, "method": method}
        if results.has("training", key):
            continue
        setting = shapes[shape]
        print(f"training: {' '.join(key.values())}", file=sys.stderr)
        results.add("training", key | train_row(setting, precision, method, args))


def train_row(setting: Setting, precision: str, method: str, args: argparse.Namespace) -> Row:
    """Forecast a method's step, take it, and put both beside each other."""
    (row,) = setting.rows([method], precision)
    if row.forecast is None:
        return {"reason": _plain(f"it does not fit: {row.reason}", setting)}
    known: Row = {
        "forecast_bytes": row.forecast.peak_bytes,
        "forecast_parts": row.forecast.parts,
        "trained": row.forecast.trained,
    }
    config = entry_configs(setting.config(precision), [method])[method]
    try:
        known |= run_apart(
            measure_training, config, setting.outputs, args.device, args.steps, limit_s=LIMIT_S
        )
    except Failed as err:
        return known | {"reason": _plain(str(err), setting)}
    return known | {"ratio": measured_bytes(known) / known["forecast_bytes"], "reason": None}


def _plain(reason: str, setting: Setting) -> str:
    """Return a reason without the temporary folder of a backbone."""
    return reason.replace(setting.backbone, setting.title.partition(",")[0])


def latency_rows(args: argparse.Namespace, shapes: dict[str, Setting], results: Results) -> None:
    """Measure the cells of the latency grid that are asked for and not there."""
    plan = Plan(seconds=args.seconds, openings=args.openings)
    if args.small:
        plan = replace(plan, warmup_calls=3, warmup_seconds=0.0, agreement=0.0)
    for shape, precision, runtime, batch in product(
        args.shapes, args.precisions, args.runtimes, args.batches
    ):
        key = {"shape": shape, "precision": precision, "runtime": runtime, "batch": batch}
        if results.has("latency", key):
            continue
        if runtime == "graphs" and args.device == "cpu":
            continue
        print(f"latency: {' '.join(map(str, key.values()))}", file=sys.stderr)
        setting = shapes[shape]
        config = setting.config("fp32", ["data.pad=max"])  # a graph has fixed shapes
        cell = Cell(
            config, setting.outputs, precision, runtime, batch, args.rivals, args.device, plan
        )
        try:
            row = run_apart(measure_cell, cell, limit_s=LIMIT_S) | {"reason": None}
            row["failed"] = {k: _plain(why, setting) for k, why in row["failed"].items()}
        except Failed as err:
            row = {"reason": _plain(str(err), setting)}
        results.add("latency", key | row)


def page(content: Row, titles: dict[str, str]) -> str:
    """Return the tables of a results file in Markdown.

    Args:
        content: Of the file.
        titles: Shape → backbone and input.
    """
    settings, machine = content["settings"], content["machine"]
    gpu = next(iter(machine["gpu"]), {})
    driver = f", driver {gpu['driver']}" if gpu else ""
    where = f"{settings['card']}{driver}" if settings["card"] else machine["cpu"]
    head = (
        f"Measured on {where}, PyTorch {settings['torch']}, float32 products in the precision "
        f"`{settings['float32_matmul_precision']}`."
    )
    return "\n\n".join([head, *_training_part(content, titles), *_latency_part(content, titles)])


def _training_part(content: Row, titles: dict[str, str]) -> Iterator[str]:
    rows, settings = content["training"], content["settings"]
    if not rows:
        return
    yield "## Memory and time of a training step"
    counts = (
        "*Allocated* and *reserved* are the peaks of CUDA's allocator, the context not included; "
        "the last ratio is allocated / forecast."
        if settings["device"] == "cuda"
        else "Without a card the ratio is live / forecast."
    )
    yield (
        "*Forecast* is what `train/memory/forecast.py` says beforehand, *live* the peak of live tensors "
        f"of a real step. {counts} Times are medians of {settings['steps']} steps of one process "
        "with a bootstrap interval, the batch on the device already."
    )
    for shape, precision in dict.fromkeys((row["shape"], row["precision"]) for row in rows):
        yield f"### {titles[shape]}, {precision}"
        found = [r for r in rows if (r["shape"], r["precision"]) == (shape, precision)]
        yield training_table(found)


def _latency_part(content: Row, titles: dict[str, str]) -> Iterator[str]:
    rows, settings = content["latency"], content["settings"]
    if not rows:
        return
    device = (
        " *wall* is the time of a whole call, *device* that between two events around it; inputs "
        "lie on the card, and a CUDA graph copies them to where it reads."
        if settings["device"] == "cuda"
        else ""
    )
    yield "## Latency"
    yield (
        "Medians of a call; ratios are medians of per-round ratios to `deployed`, geometric mean "
        f"over {settings['openings']} openings with Student's 95 % interval.{device} "
        "`deployed (A/A)` is the deployed model a second time: differences of its size cannot be "
        "seen here."
    )
    keys = ("shape", "precision", "runtime")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        shape, precision, runtime = key
        yield f"### {titles[shape].partition(', batch')[0]}, {precision}, {WORDS[runtime]}"
        yield latency_table(row for row in rows if tuple(row[name] for name in keys) == key)


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, check it, and fill in what --small decides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny backbones, to try it")
    parser.add_argument("--parts", default="training,latency")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--methods", help="as `mdpd compare` names them; default: all")
    parser.add_argument("--precisions", help="fp32,bf16")
    parser.add_argument("--runtimes", help=f"of {', '.join(RUNTIMES)}")
    parser.add_argument("--batches", help="of the latency grid")
    parser.add_argument("--rivals", help="as `mdpd bench-latency` names them")
    parser.add_argument("--steps", type=int, help="timed training steps")
    parser.add_argument("--seconds", type=float, help="of a latency cell, over all openings")
    parser.add_argument("--openings", type=int, help="of every model in a latency cell")
    parser.add_argument("--retry", action="store_true", help="measure failed rows again")
    parser.add_argument("--show", action="store_true", help="only print the tables of --out")
    args = parser.parse_args(words)
    for name, value in DEFAULTS[args.small].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    known = {"parts": PARTS, "shapes": SHAPES, "precisions": PRECISIONS, "runtimes": RUNTIMES}
    for name in (*known, "methods", "batches", "rivals"):
        setattr(args, name, getattr(args, name).split(","))
    for name, choices in known.items():
        if unknown := set(getattr(args, name)) - set(choices):
            parser.error(f"--{name}: {min(unknown)} is none of {', '.join(choices)}")
    args.methods = [parse_entry(word).label for word in args.methods]
    if args.openings < FEWEST_OPENINGS:
        parser.error(f"--openings {args.openings}: give at least {FEWEST_OPENINGS}")
    args.batches = [int(batch) for batch in args.batches]
    args.rivals = list(rival_names(args.rivals))
    return args


def main() -> None:
    try:
        args = parsed()
        if not args.show:
            choose_device(args.device, ["torch"])
    except UserError as err:
        raise SystemExit(str(err)) from None
    shown = read_results(args.out) if args.show else None
    small = args.small if shown is None else shown["settings"]["small"]
    with tempfile.TemporaryDirectory() as folder:
        shapes = (small_shapes if small else full_shapes)(Path(folder))
        content = measure(args, shapes) if shown is None else shown
    print(page(content, {name: setting.title for name, setting in shapes.items()}))


def measure(args: argparse.Namespace, shapes: dict[str, Setting]) -> Row:
    """Measure what is asked for and not there yet; return the content of the file."""
    results = Results(args.out, settings_of(args), machine_of(args.device), retry=args.retry)
    for part in args.parts:
        PARTS[part](args, shapes, results)
    return results.content


PARTS = {"training": train_rows, "latency": latency_rows}

if __name__ == "__main__":
    main()
