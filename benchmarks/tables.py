"""The command behind each table of docs/accuracy.md: one name makes a table again.

    python benchmarks/tables.py --list
    python benchmarks/tables.py mrpc --data DATA --encoder ENCODER --out runs/tables
    python benchmarks/tables.py mrpc --print
    python benchmarks/tables.py answer             # MDPD against norms and head, from docs/results
    python benchmarks/tables.py kept               # MDPD against the side network kept at inference
    python benchmarks/tables.py overview           # every method on every task, from docs/results
    python benchmarks/tables.py rates              # every method at the best of three rates
    python benchmarks/tables.py picture > stsb.svg # the same against training memory

DATA holds `glue/` and `vtab-1k/` in their official layouts; ENCODER is a folder with a BERT-family
encoder (the tables are of MiniLM, 6 layers, 384 wide). Interrupted, the same command goes on: every
training that ended is kept. `--results FOLDER` copies the table's JSON there. The machine of the
tables had two cores: `--jobs 2 --threads 1` is part of the command, so that other machines can tell.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
BF16 = "--set train.precision=bf16"
# MDPD as it was by default when the tables were made
WEAK = "--set loss.logits=1e-4 --set loss.logits_form=mse --set loss.logits_where=all"
STUDY = f"compare --jobs 2 --threads 1 {BF16} {WEAK}"
BEST = f"{STUDY} --latency-seconds 0"  # keeps the best weights
COMPARE = f"{BEST} --set train.keep=last"
GLUE = f"{COMPARE} --data {{data}}/glue --backbone {{encoder}} --batch 16"
SHORT = f"{GLUE} --lr-factors 1 --set data.max_length=64"
CIFAR = "--data {data}/vtab-1k --task vtab/cifar10"
VTAB = f"{COMPARE} {CIFAR}"
SWEEP = (f"{GLUE} --lr-factors 0.3,1,3 --set data.max_length=64 --steps 200 "
         "--set train.eval_every=200 --task glue/stsb")  # fmt: skip
EPOCHS20 = "--batch 32 --steps 500 --set data.augment=flip"
LONG = f"{VTAB} {EPOCHS20} --set train.eval_every=500"
KL = "mdpd:unipt+loss.logits_form=kl+loss.logits=1"
DKD = "mdpd:unipt+loss.logits_form=dkd+loss.logits=1"
BETTER = f"{KL}+loss.logits_where=better"


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        file: In docs/results.
        commands: Run in order, into one folder or file; the first word says of what.
    """

    file: str
    commands: tuple[str, ...]


TABLES = {
    "glue-200": Table("glue-200.json", (
        f"{SHORT} --steps 200 --set train.eval_every=200 --task glue/sst2,glue/stsb --methods all",
        (f"{SHORT} --steps 200 --set train.eval_every=200 --task glue/sst2,glue/stsb "
        "--methods norms,lora,unipt,mdpd:unipt --seeds 3"),
        (f"{SHORT} --steps 200 --set train.eval_every=200 --task glue/stsb "
        "--methods norms,mdpd:unipt,mdpd:unipt+loss.logits=0 --seeds 6"),
        f"{SHORT} --steps 200 --set train.eval_every=200 --task glue/sst2 --methods {KL},{BETTER}",
    )),
    "cola": Table("cola-200.json", (
        f"{SHORT} --steps 200 --set train.eval_every=200 --task glue/cola --methods all",
    )),
    "mrpc": Table("mrpc-250.json", (
        f"{SHORT} --steps 250 --set train.eval_every=250 --task glue/mrpc --methods all",
    )),
    "rte": Table("rte-250.json", (
        f"{SHORT} --steps 250 --set train.eval_every=250 --task glue/rte --methods all",
    )),
    "cifar10": Table("cifar10-250.json", (
        f"{VTAB} --batch 16 --steps 250 --set train.eval_every=250 --lr-factors 1 --methods all",
    )),
    "cifar10-rates": Table("cifar10-sweep.json", (
        (f"{STUDY} --latency-seconds 20 --set train.keep=last {CIFAR} --batch 16 --steps 250 "
        "--set train.eval_every=250 --lr-factors 0.3,1,3 --methods all"),
    )),
    "stsb-rates": Table("stsb-sweep.json", (
        f"{SWEEP} --methods all",
        f"{SWEEP} --seeds 3 --methods norms,mdpd:unipt,lora,full,mdpd:lst,bitfit",
    )),
    "cifar10-20-epochs": Table("cifar10-20-epochs.json", (
        (f"{LONG} --lr-factors 1 --seeds 3 "
        f"--methods norms,mdpd:unipt,{KL},norms+loss.label_smoothing=0.1"),
        f"{LONG} --lr-factors 1 --methods {KL}+loss.logits_after=0.5",
        f"{LONG} --lr-factors 1 --seeds 3 --methods {DKD},norms+optim.norms_after=0.2",
    )),
    "cifar10-20-epochs-stopped": Table("cifar10-20-epochs-stopped.json", (
        (f"{BEST} {CIFAR} {EPOCHS20} --set train.eval_every=50 --seeds 3 --lr-factors 0.1,0.3,1 "
        f"--methods norms,mdpd:unipt,{KL}"),
    )),
    "logits-cifar10-better": Table("logits-cifar10-better.json", (
        (f"compare --jobs 2 --threads 1 {WEAK} --latency-seconds 0 --data {{data}}/vtab-1k --task vtab/cifar10 "
        f"--batch 16 --steps 250 {BF16} --set train.eval_every=125 --lr-factors 1 --seeds 3 "
        f"--methods {BETTER},{BETTER}+loss.temperature=4"),
    )),
    "logits-digits": Table("logits-digits.json", (
        (f"compare --jobs 2 --threads 1 {WEAK} --latency-seconds 0 --task digits --epochs 5 "
        "--set train.keep=last --lr-factors 1 --methods "
        f"mdpd:unipt,unipt,norms,{KL}+loss.temperature=4,{BETTER},{BETTER}+loss.temperature=4"),
    )),
}  # fmt: skip


OVERVIEW = {
    "SST-2": ("glue-200.json", "glue/sst2"),
    "STS-B": ("glue-200.json", "glue/stsb"),
    "MRPC": ("mrpc-250.json", "glue/mrpc"),
    "RTE": ("rte-250.json", "glue/rte"),
    "CoLA": ("cola-200.json", "glue/cola"),
    "CIFAR-10": ("cifar10-250.json", "vtab/cifar10"),
}


def overview(results: Path) -> str:
    """Return every method on every task as Markdown: points, and what it costs on SST-2."""
    rows: dict[str, dict[str, dict]] = {}
    for column, (file, task) in OVERVIEW.items():
        for row in json.loads((results / file).read_text())["rows"]:
            if row["task"] == task and "+" not in row["method"]:
                rows.setdefault(row["method"], {})[column] = row
    lines = [
        f"| method | {' | '.join(OVERVIEW)} | trained | deployed extra | peak MB | s |",
        "|---" * (len(OVERVIEW) + 5) + "|",
    ]

    def cost(row: dict | None, name: str, unit: float) -> str:
        return "–" if row is None else f"{row[name] / unit:,.0f}"

    def order(item: tuple[str, dict[str, dict]]) -> float:
        scores = [row["score"]["mean"] for row in item[1].values() if row["score"]]
        return -sum(scores) / len(OVERVIEW)

    for method, found in sorted(rows.items(), key=order):
        scores = [_points(found.get(column)) for column in OVERVIEW]
        first = found.get("SST-2")
        costs = [
            cost(first, "trained", 1),
            cost(first, "deployed_delta", 1),
            cost(first, "peak_live_bytes", 1e6),
            cost(first, "train_s", 1),
        ]
        lines.append(f"| {' | '.join([method, *scores, *costs])} |")
    return "\n".join(lines)


ANSWER = {  # row → file, task, the method
    "SST-2": ("glue-200.json", "glue/sst2", "mdpd:unipt"),
    "STS-B": ("glue-200.json", "glue/stsb", "mdpd:unipt"),
    "CIFAR-10, 20 epochs": ("cifar10-20-epochs.json", "vtab/cifar10", "mdpd:unipt"),
    "the same, KL": ("cifar10-20-epochs.json", "vtab/cifar10", KL),
    "the same, stopped": ("cifar10-20-epochs-stopped.json", "vtab/cifar10", "mdpd:unipt"),
    "the same, stopped, KL": ("cifar10-20-epochs-stopped.json", "vtab/cifar10", KL),
    **{
        f"STS-B at the best rate, {method}": ("stsb-sweep.json", "glue/stsb", method)
        for method in ("mdpd:unipt", "mdpd:lst", "lora", "full")
    },
}


def answer(results: Path) -> str:
    """Return a method − norms and head, seed by seed, as Markdown: points with Student's interval."""
    lines = ["| MDPD over UniPT, or the method named | seeds | − norms and head |", "|---|---|---|"]
    for name, (file, task, method) in ANSWER.items():
        count, gap = _difference(results / file, task, method, "norms")
        lines.append(f"| {name} | {count} | {gap} |")
    return "\n".join(lines)


KEPT = {  # row → file, task: MDPD against what the paper compares it with
    "SST-2": ("glue-200.json", "glue/sst2"),
    "STS-B": ("glue-200.json", "glue/stsb"),
}


def kept(results: Path) -> str:
    """Return MDPD over UniPT − UniPT alone, kept at inference, seed by seed, as Markdown."""
    lines = ["| MDPD over UniPT, deployed | seeds | − UniPT, kept |", "|---|---|---|"]
    for name, (file, task) in KEPT.items():
        count, gap = _difference(results / file, task, "mdpd:unipt", "side:unipt")
        lines.append(f"| {name} | {count} | {gap} |")
    return "\n".join(lines)


def _difference(file: Path, task: str, method: str, other: str) -> tuple[int, str]:
    """Return the seeds that two methods share and their difference in points with its interval."""
    from mdpd_deploy.report.intervals import student_interval

    rows = {
        r["method"]: r["scores"] for r in json.loads(file.read_text())["rows"] if r["task"] == task
    }
    found, base = rows[method], rows[other]
    gaps = [100 * (found[seed] - base[seed]) for seed in found if seed in base]
    mean, low, high = student_interval(gaps)
    return len(gaps), f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


RATES = {
    "STS-B": ("stsb-sweep.json", "glue/stsb"),
    "CIFAR-10": ("cifar10-sweep.json", "vtab/cifar10"),
}


def rates(results: Path) -> str:
    """Return the sweep of every method as Markdown: points, the factor that was best, and costs."""
    rows: dict[str, dict[str, dict]] = {}
    latency: dict[str, dict] = {}
    for column, (file, task) in RATES.items():
        content = json.loads((results / file).read_text())
        latency = content["latency"] or latency
        for row in content["rows"]:
            if row["task"] == task:
                rows.setdefault(row["method"], {})[column] = row
    heads = [f"{name} | ×" for name in RATES] + [f"MB, {name}" for name in RATES]
    lines = [f"| method | {' | '.join(heads)} | inference |", "|---" * (3 * len(RATES) + 2) + "|"]
    for method, found in sorted(rows.items(), key=_from_best):
        cells = [method]
        for column in RATES:
            row = found.get(column)
            cells += [_points(row), "–" if row is None else f"{row['factor']:g}"]
        for column in RATES:
            row = found.get(column)
            cells.append("–" if row is None else f"{row['peak_live_bytes'] / 1e6:.0f}")
        cells.append(_times(latency.get(method)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(latency: dict | None) -> str:
    if latency is None:
        return "–"
    if latency["ci95"] is None:
        return "1"
    low, high = latency["ci95"]
    return f"{latency['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def _from_best(item: tuple[str, dict[str, dict]]) -> tuple[int, float]:
    """Sort by the mean score, the best first, and what lacks a task last."""
    scores = [row["score"]["mean"] for row in item[1].values() if row["score"]]
    return -len(scores), -sum(scores)


def _points(row: dict | None) -> str:
    if row is None or row["score"] is None:
        return "–"
    mean, sd = row["score"]["mean"], row["score"]["sd"]
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def picture(results: Path) -> str:
    """Return STS-B at the best rate against training memory, as an SVG of its own."""
    from mdpd_deploy.report.charts import Dot, trade_off_chart
    from mdpd_deploy.report.page import CSS
    from mdpd_deploy.study.study_page import kind_of

    file, task = RATES["STS-B"]
    rows = [row for row in json.loads((results / file).read_text())["rows"] if row["task"] == task]
    dots = [
        Dot(
            row["method"],
            row["peak_live_bytes"] / 1e6,
            100 * row["score"]["mean"],
            100 * (row["score"]["sd"] or 0),
            kind_of(row["method"]),
        )
        for row in rows
        if row["score"]
    ]
    chart = trade_off_chart(
        dots,
        x_label="peak training memory (MB)",
        y_label="mean of Pearson and Spearman on STS-B (×100)",
        log=True,
    )
    own = "svg { background: var(--panel); } text { font-family: var(--font); }"
    style = f"<style>{CSS.partition('* {')[0]}{own}</style>"
    start, end, rest = chart.partition(">")
    return f'{start} xmlns="http://www.w3.org/2000/svg"{end}{style}{rest}'


VIEWS = {"answer": answer, "kept": kept, "overview": overview, "rates": rates, "picture": picture}


def words_of(table: Table, command: str, places: dict[str, str]) -> list[str]:
    """Return one command with its places filled in, ready to run."""
    filled = [word.format(**places) for word in shlex.split(command)]
    return [sys.executable, "-m", "mdpd_deploy", *filled]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=[*TABLES, *VIEWS], help="a table, or a view")
    parser.add_argument("--data", default="DATA")
    parser.add_argument("--encoder", default="ENCODER")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"))
    parser.add_argument("--results", type=Path, help="folder that a table's JSON is copied to")
    parser.add_argument("--print", action="store_true", help="only show the commands")
    parser.add_argument("--list", action="store_true", help="only show the tables")
    args = parser.parse_args()
    if args.name in VIEWS:
        print(VIEWS[args.name](args.results or HERE.parent / "docs" / "results"))
        return
    if args.list or args.name is None:
        for name, table in TABLES.items():
            print(f"{name:24}docs/results/{table.file}")
        return
    table = TABLES[args.name]
    out = args.out / args.name
    places = {"data": args.data, "encoder": args.encoder}
    for command in table.commands:
        words = [*words_of(table, command, places), "--out", str(out)]
        print(shlex.join(words), flush=True)
        if not args.print:
            subprocess.run(words, check=True)
    if args.results and not args.print:
        args.results.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "compare.json", args.results / table.file)


if __name__ == "__main__":
    main()
