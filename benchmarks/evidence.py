"""Does distillation give the deployed backbone more than tuning its norms and head directly?

    python benchmarks/structured.py DATA/structured
    python benchmarks/evidence.py --data DATA --hours 3       # resumable: the same command goes on
    python benchmarks/evidence.py --table                     # what docs/results/evidence.jsonl says

On a card, `--device cuda --jobs 15`: small backbones leave it idle unless many trainings share it.
DATA holds `structured/`, `vtab-1k/` and `glue/`; `--encoder FOLDER` is a BERT-family text encoder.

Every method gets the same care. On seed 0 its learning rate is swept by factors of about three until
the best on validation lies inside the sweep; weights are chosen on validation too. Then seeds are
added one by one, to every method of a task alike, until the interval of MDPD with a felt loss
minus norms is within half a point, or there are twenty. Each training is a line of
docs/results/evidence.jsonl with its score on groups of test examples (`pseudo_values`), so that
intervals hold the sampling of seeds and of test examples (`crossed_interval`); for m comparisons
with norms they are taken at 1 − 0.05/m (Bonferroni).
"""

import argparse
import io
import json
import os
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mdpd_deploy.report.intervals import crossed_interval

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "evidence.jsonl"
FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of a method's own rate
FIRST = (0.3, 1.0, 3.0)
MOST_SEEDS, NARROW = 20, 0.5  # points to either side
VIT = "builtin:vit-xs-tin32"
Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A task with a backbone and a length.

    Attributes:
        task: As `mdpd train --task` has it.
        data: Folder below `--data`.
        backbone: None is `--encoder`.
        steps: Of `batch` examples each; evaluated ten times.
        options: Further ones.
    """

    task: str
    data: str
    backbone: str | None = VIT
    steps: int = 1250  # 50 epochs of 800 pictures
    batch: int = 32
    options: tuple[str, ...] = ()


SHORT = ("data.max_length=64", "data.split_seed=0")
SETTINGS = {
    **{name: Setting(f"vtab/{name}", "structured")
       for name in ("position", "count", "orientation", "distance")},
    "cifar10": Setting("vtab/cifar10", "vtab-1k"),
    "stsb": Setting("glue/stsb", "glue", None, 3000, 16, SHORT),
    "mrpc": Setting("glue/mrpc", "glue", None, 3000, 16, SHORT),
    "rte": Setting("glue/rte", "glue", None, 3000, 16, SHORT),
}  # fmt: skip
FULL = ("train.norm_grad=full",)  # the same gradient as by recomputing, sooner
KL = (*FULL, "loss.logits_form=kl", "loss.logits=1", "loss.logits_where=all")
BETTER = (*KL[:-1], "loss.logits_where=better")
WEAK = ("loss.logits_form=mse", "loss.logits=1e-4", "loss.logits_where=all")
METHODS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "norms": ("norms", None, FULL),
    "UniPT kept": ("side", "unipt", ()),
    "MDPD, felt": ("mdpd", "unipt", KL),
    "MDPD, where better": ("mdpd", "unipt", BETTER),
    "MDPD, untouched teacher": ("mdpd", "unipt", (*KL, "distill.teacher=untouched")),
    "MDPD, weight 1e-4": ("mdpd", "unipt", (*FULL, *WEAK)),
    "MDPD, paper": ("mdpd", "unipt", ("recipe",)),
    "probe": ("probe", None, ()),
    "LoRA": ("lora", None, ()),
    "full": ("full", None, ()),
    "SHERL kept": ("side", "sherl", ()),
    "MDPD over SHERL, felt": ("mdpd", "sherl", KL),
    "LST kept": ("side", "lst", ()),
    "MDPD over LST, felt": ("mdpd", "lst", KL),
    "DTL kept": ("side", "dtlv1", ()),
}
OPEN = ("MDPD, felt", "norms")  # the question that decides how many seeds there are


def train(setting: str, method: str, factor: float, seed: int, places: Line) -> Line:
    """Run one training and return its line."""
    import torch

    from mdpd_deploy import fit
    from mdpd_deploy.artifacts.outputs import read_outputs
    from mdpd_deploy.tasks.metrics import pseudo_values
    from mdpd_deploy.train.methods import METHODS as KINDS

    torch.set_num_threads(places["threads"])
    decode_once()
    plan = SETTINGS[setting]
    steps = places["steps"] or plan.steps
    kind, side, options = METHODS[method]
    rate = factor * KINDS.get_or_raise(kind).default_lr
    words = {"recipe": "mdpd-paper"} if options == ("recipe",) else {}
    changed = options if not words else ()
    with tempfile.TemporaryDirectory() as folder:
        run = fit(
            task=plan.task, data=str(Path(places["data"]) / plan.data), method=kind,
            backbone=plan.backbone or places["encoder"], side=side, steps=steps,
            batch=plan.batch, seed=seed, lr=rate, out=Path(folder) / "run", quiet=True,
            device=places["device"], **words,
            set=[f"train.eval_every={max(1, steps // 10)}", *plan.options, *changed],
        )  # fmt: skip
        summary = run.summary
        split = "test" if "metrics_test" in summary else "validation"
        name = summary["primary_metric"]
        models = [m for m in ("deployed", "side") if m in summary["metrics"]]
        kept = {m: read_outputs(run.path, split, m) for m in models}
        found: Line = {
            "setting": setting, "method": method, "factor": factor, "seed": seed, "lr": rate,
            "steps": steps, "batch": plan.batch, "metric": name, "split": split,
            "validation": summary["metrics"]["deployed"][name],
            "train_s": summary["time"]["train_s"], "trained": summary["params"]["trained"],
            "best_step": summary["best_step"], "felt": summary.get("felt"),
            "device": torch.cuda.get_device_name() if places["device"] == "cuda" else "cpu",
        }  # fmt: skip
        for model, arrays in kept.items():
            if arrays is not None and (parts := pseudo_values(name, *arrays)) is not None:
                found[model] = [round(float(part), 5) for part in parts]
        if kind == "mdpd" and kept["deployed"] and kept["side"] and kept["side"][0].shape[1] > 1:
            answers = [kept[model][0].argmax(axis=1) for model in models]
            found["agreement"] = float((answers[0] == answers[1]).mean())
        found["moved"] = moved_norms(run)
    return found


@lru_cache(1)
def decode_once() -> None:
    """Keep the tensors of pictures in memory: no augmentation here, every epoch reads the same."""
    from mdpd_deploy.data.preprocess import ImagePreprocess

    decode = lru_cache(50_000)(ImagePreprocess.__call__)

    def remembered(self: Any, raws: Any) -> dict[str, Any]:
        rows = [decode(self, (raw,))["pixel_values"] for raw in raws]
        return {"pixel_values": np.concatenate(rows)}

    ImagePreprocess.__call__ = remembered


def moved_norms(run: Any) -> dict[str, float]:
    """Return how far the norms of each block have moved, relative to their size."""
    before, after = run.load_backbone(), run.load_deployed().backbone
    squares: dict[str, list[float]] = {}
    for name, weight in before.norms().items():
        change = after.norms()[name] - weight
        block = re.search(r"\.(\d+)\.", name)
        found = squares.setdefault(block.group(1) if block else "last", [0.0, 0.0])
        found[0] += float(change.square().sum())
        found[1] += float(weight.square().sum())
    return {block: round((a / b) ** 0.5, 4) for block, (a, b) in squares.items()}


def best_factor(lines: Iterable[Line]) -> float:
    """Return the factor of a sweep (lines of one cell and seed) that is best on validation."""
    return max(lines, key=lambda line: line["validation"] or -1.0)["factor"]


def next_trainings(lines: list[Line], settings: list[str], methods: list[str]) -> list[tuple]:
    """Return what to train next, in order: (setting, method, factor, seed).

    A setting gets its sweeps, then three seeds, before the next one; further seeds come last.
    """
    first, later = [], []
    for setting in settings:
        chosen = {}
        for method in methods:
            done = {s["factor"]: s for s in cell(lines, setting, method) if s["seed"] == 0}
            wanted = [factor for factor in FIRST if factor not in done] or beyond(done)
            first += [(setting, method, factor, 0) for factor in wanted]
            if not wanted:
                chosen[method] = best_factor(done.values())
        for seed in range(1, MOST_SEEDS):
            missing = [
                (setting, method, factor, seed)
                for method, factor in chosen.items()
                if not any(s["seed"] == seed and s["factor"] == factor
                           for s in cell(lines, setting, method))
            ]  # fmt: skip
            if seed < 3:
                first += missing
            elif missing and len(chosen) == len(methods):
                reach = half_width(lines, setting)
                if reach is None or reach > NARROW:
                    later += [(seed, training) for training in missing]
                break
    return [*first, *(training for _, training in sorted(later))]


def beyond(done: dict[float, Line]) -> list[float]:
    """Return the next factor where the best of a sweep lies at its edge."""
    best, tried = FACTORS.index(best_factor(done.values())), [FACTORS.index(f) for f in done]
    if best == min(tried) and best > 0:
        return [FACTORS[best - 1]]
    if best == max(tried) and best < len(FACTORS) - 1:
        return [FACTORS[best + 1]]
    return []


def cell(lines: list[Line], setting: str, method: str) -> list[Line]:
    """Return the trainings of one method in one setting."""
    return [s for s in lines if (s["setting"], s["method"]) == (setting, method)]


def parts(lines: list[Line], setting: str, method: str, model: str = "deployed") -> dict:
    """Return seed → scores on groups of examples, at the rate that seed 0 chose."""
    own = cell(lines, setting, method)
    first = [s for s in own if s["seed"] == 0]
    if not first:
        return {}
    factor = best_factor(first)
    return {s["seed"]: np.array(s[model]) for s in own if s["factor"] == factor and model in s}


def difference(one: dict, other: dict, level: float = 0.95) -> tuple[float, float, float] | None:
    """Return points between two methods with their interval; None below three common seeds."""
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 3:
        return None
    mean, low, high = crossed_interval(100 * np.stack([one[s] - other[s] for s in seeds]), level)
    return mean, low, high


def half_width(lines: list[Line], setting: str) -> float | None:
    """Return how wide the open question still is, in points to either side."""
    gap = difference(*(parts(lines, setting, method) for method in OPEN))
    return None if gap is None else (gap[2] - gap[1]) / 2


def table(lines: list[Line]) -> str:
    """Return every setting's methods as Markdown: points, and the differences asked for."""
    rows = []
    for setting in dict.fromkeys(s["setting"] for s in lines):
        methods = [m for m in METHODS if cell(lines, setting, m)]
        norms = parts(lines, setting, "norms")
        level = 1 - 0.05 / max(1, len(methods) - 1)
        one = cell(lines, setting, methods[0])[0]
        rows += [
            "",
            f"**{setting}**: {one['metric']} on {one['split']}, {one['steps']} steps of {one['batch']}; "
            + f"intervals at {100 * level:.1f} %",
            "",
            "| method | score | its side network | − norms | − its side network | agreement | lr | seeds |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for method in methods:
            own = parts(lines, setting, method)
            side = parts(lines, setting, method, "side")
            first = [s for s in cell(lines, setting, method) if s["seed"] == 0]
            factor = best_factor(first)
            at = [s for s in cell(lines, setting, method) if s["factor"] == factor]
            agree = [s["agreement"] for s in at if "agreement" in s]
            rows.append(
                f"| {method} | {spread(own)} | {spread(side)} "
                f"| {shown(difference(own, norms, level)) if method != 'norms' else ''} "
                f"| {shown(difference(own, side, level))} "
                f"| {f'{100 * statistics.mean(agree):.0f} %' if agree else ''} "
                f"| {at[0]['lr']:.2g} | {len(own)} |"
            )
        rows += ["", *sweeps(lines, setting, methods)]
    return "\n".join(rows)


def sweeps(lines: list[Line], setting: str, methods: list[str]) -> list[str]:
    """Return the rates of seed 0 as Markdown: points on the test set, the best on validation bold."""
    first = {m: [s for s in cell(lines, setting, m) if s["seed"] == 0] for m in methods}
    factors = sorted({s["factor"] for them in first.values() for s in them})
    rows = [
        "| seed 0, rate | " + " | ".join(f"×{factor:g}" for factor in factors) + " |",
        "|---" + "|--:" * len(factors) + "|",
    ]
    for method, them in first.items():
        at = {s["factor"]: f"{100 * float(np.mean(s['deployed'])):.1f}" for s in them}
        best = best_factor(them)
        at[best] = f"**{at[best]}**"
        rows.append(f"| {method} | " + " | ".join(at.get(f, "") for f in factors) + " |")
    return rows


def teachers(lines: list[Line]) -> list[tuple[str, str, float, float]]:
    """Return (setting, factor, teacher − norms, deployed − norms) in points wherever both were trained.

    At one factor the norms move at the same rate in both, seed by seed.
    """
    found = []
    norms = {(s["setting"], s["factor"], s["seed"]): s for s in lines if s["method"] == "norms"}
    for line in (s for s in lines if s["method"] in (OPEN[0], "MDPD, where better")):
        if other := norms.get((line["setting"], line["factor"], line["seed"])):
            side, own, base = (
                float(np.mean(s)) for s in (line["side"], line["deployed"], other["deployed"])
            )
            where = f"{line['setting']} ×{line['factor']:g}"
            found.append((line["method"], where, 100 * (side - base), 100 * (own - base)))
    return found


def picture(lines: list[Line]) -> str:
    """Return what the student gained against how far its teacher was ahead, as an SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure((6.4, 4.6))
    axes = figure.subplots()
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle="--")
    axes.axhline(0, color="grey", linewidth=0.8)
    for method, colour in ((OPEN[0], "#2563c9"), ("MDPD, where better", "#c2651a")):
        them = [found for found in teachers(lines) if found[0] == method]
        axes.scatter([t[2] for t in them], [t[3] for t in them], color=colour, label=method, s=24)
        for _, where, x, y in them:
            axes.annotate(where, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(
        xlabel="side network inside MDPD − norms, points",
        ylabel="deployed by MDPD − norms, points",
        title="At the same rate: the student follows a teacher that is ahead",
    )
    axes.legend(frameon=False)
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "evidence", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    return out.getvalue()


def spread(found: dict) -> str:
    """Write mean ± standard deviation over seeds in points."""
    means = [100 * float(part.mean()) for part in found.values()]
    if len(means) < 2:
        return f"{means[0]:.1f}" if means else ""
    return f"{statistics.mean(means):.1f} ± {statistics.stdev(means):.1f}"


def shown(gap: tuple[float, float, float] | None) -> str:
    """Write a difference with its interval."""
    return "" if gap is None else f"{gap[0]:+.1f} [{gap[1]:+.1f}, {gap[2]:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="DATA")
    parser.add_argument("--encoder")
    parser.add_argument("--settings", default="position,count")
    parser.add_argument(
        "--methods",
        default=";".join([*METHODS][:6]),
        help="with semicolons, of: " + "; ".join(METHODS),
    )
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, help="of every training, in place of its setting's")
    parser.add_argument("--hours", type=float, default=3.0, help="start no training after that")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is known")
    parser.add_argument("--picture", action="store_true", help="only print it as an SVG")
    options = parser.parse_args()
    lines = [json.loads(line) for line in read(options.out)]
    if options.table or options.picture:
        print(table(lines) if options.table else picture(lines))
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    settings = options.settings.split(",")
    methods = options.methods.split(";")
    end = time.monotonic() + 3600 * options.hours
    failed = set()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running: dict[Any, tuple] = {}
        while True:
            for training in next_trainings(lines, settings, methods):
                free = len(running) < options.jobs and time.monotonic() < end
                if free and training not in failed | {*running.values()}:
                    running[pool.submit(train, *training, vars(options))] = training
            if not running:
                break
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                training = running.pop(future)
                if future.exception():
                    failed.add(training)
                    traceback.print_exception(future.exception())
                    continue
                line = future.result()
                lines.append(line)
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{line['setting']:<12}{line['method']:<24}×{line['factor']:<6g}seed "
                    f"{line['seed']:<3}{line['validation']:.4f} on validation, "
                    f"{line['train_s']:.0f} s",
                    flush=True,
                )
    print(table(lines))


def read(path: Path) -> list[str]:
    """Return the lines of a file that may not be there."""
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
