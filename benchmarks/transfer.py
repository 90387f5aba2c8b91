"""Does the deployed backbone keep its side network's accuracy? Methods × tasks × seeds, resumable.

    python benchmarks/transfer.py --data GLUE_ROOT --backbone ENCODER_FOLDER \
        --tasks glue/rte,glue/mrpc --variants all --seeds 0 --steps 250 --out results.jsonl
    python benchmarks/transfer.py --table results.jsonl

One JSON line per finished run; a line that is there is not run again, so the command can be
interrupted and repeated. Runs go through the product's own `fit`, in `--jobs` processes.
"""

import argparse
import json
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

PAPER = ["train.student_task_weight=0"]
TASK = ["train.student_task_weight=1"]

# name → (method, side, extra options)
VARIANTS: dict[str, tuple[str, str, list[str]]] = {
    "majority": ("", "", []),
    "probe": ("probe", "unipt", []),
    "unipt": ("side", "unipt", []),
    "sherl": ("side", "sherl", []),
    "norms": ("norms", "unipt", []),
}
for _side in ("unipt", "sherl"):
    for _mode in ("recompute", "late:2", "local", "none"):
        for _name, _extra in (("paper", PAPER), ("task", TASK)):
            VARIANTS[f"mdpd:{_side}:{_mode}:{_name}"] = (
                "mdpd",
                _side,
                [f"train.norm_grad={_mode}", *_extra],
            )


def run_one(job: dict) -> dict:
    """Train one variant and return its line."""
    import torch

    from mdpd_deploy import fit

    if job["variant"] == "majority":
        return majority(job)

    torch.set_num_threads(job["threads"])
    method, side, extra = job["custom"]
    with tempfile.TemporaryDirectory() as folder:
        run = fit(
            task=job["task"], data=job["data"], backbone=job["backbone"], method=method, side=side,
            steps=job["steps"], batch=job["batch"], seed=job["seed"], out=Path(folder) / "run",
            set=[*job["set"], *extra], quiet=True, device=job["device"],
        )  # fmt: skip
        s = run.summary
    metric = s["primary_metric"]
    scores = {where: values[metric] for where, values in s["metrics"].items()}
    test = {where: values[metric] for where, values in s.get("metrics_test", {}).items()}
    return {
        "key": job["key"],
        "task": job["task"],
        "variant": job["variant"],
        "seed": job["seed"],
        "steps": job["steps"],
        "batch": job["batch"],
        "set": job["set"],
        "metric": metric,
        **scores,
        "test": test,
        "trained": s["params"]["trained"],
        "deployed_delta": s["params"]["deployed_delta"],
        "peak_live_bytes": s["memory"].get("peak_live_bytes"),
        "train_s": s["time"]["train_s"],
    }


def majority(job: dict) -> dict:
    """Measure what the most frequent training class scores, the floor of any method."""
    from mdpd_deploy.config import load_config
    from mdpd_deploy.data.load import load_task
    from mdpd_deploy.tasks import metrics

    config = load_config(None, {"data.path": job["data"]}, job["set"])
    data = load_task(job["task"], config.data, seed=job["seed"])

    def score(name: str) -> float:
        labels = data.evaluation[name].labels
        return metrics.majority(data.metrics, data.train.labels, labels, data.outputs)[
            data.metrics[0]
        ]

    return {
        **{name: job[name] for name in ("key", "task", "variant", "seed", "steps", "batch", "set")},
        "metric": data.metrics[0],
        "deployed": score("validation"),
        "test": {"deployed": score("test")} if "test" in data.evaluation else {},
        "trained": 0,
        "deployed_delta": 0,
        "peak_live_bytes": 0,
        "train_s": 0.0,
    }


def jobs_of(args: argparse.Namespace) -> list[dict]:
    """Return the planned runs that `--out` does not hold yet."""
    done = {line["key"] for line in read(args.out)}
    names = list(VARIANTS) if args.variants == "all" else args.variants.split(",")
    jobs = []
    for task in args.tasks.split(","):
        for seed in range(args.seeds):
            for name in names:
                label, _, options = name.partition("+")
                extra = [*args.set, *(option for option in options.split("+") if option)]
                key = f"{task} {name} seed={seed} steps={args.steps} batch={args.batch} {args.set}"
                if key in done:
                    continue
                jobs.append(
                    dict(
                        key=key,
                        task=task,
                        variant=name,
                        custom=_custom(label, extra),
                        seed=seed,
                        steps=args.steps,
                        batch=args.batch,
                        set=args.set,
                        data=args.data,
                        backbone=args.backbone,
                        threads=args.threads,
                        device=args.device,
                    )
                )
    return jobs


def _custom(label: str, extra: list[str]) -> tuple[str, str, list[str]]:
    method, side, options = VARIANTS[label]
    return method, side, [*options, *extra]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(lines: list[dict]) -> str:
    """Return a Markdown table: mean ± standard deviation over seeds, in points."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        key = (line["task"], line["variant"], line["steps"], line["batch"], tuple(line["set"]))
        groups.setdefault(key, []).append(line)
    rows = [
        "| task | variant | deployed | side | test: deployed | side | trained | peak MB | train s | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, variant, *_), members in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1])):
        tests = [member["test"] for member in members]
        rows.append(
            f"| {task} | {variant} | {_spread(members, 'deployed')} | {_spread(members, 'side')} "
            f"| {_spread(tests, 'deployed')} | {_spread(tests, 'side')} "
            f"| {members[0]['trained']:,} | {members[0]['peak_live_bytes'] / 1e6:.0f} "
            f"| {statistics.mean(m['train_s'] for m in members):.0f} | {len(members)} |"
        )
    return "\n".join(rows)


def _spread(members: list[dict], name: str) -> str:
    values = [100 * m[name] for m in members if name in m]
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="root of the glue or vtab folders")
    parser.add_argument("--backbone", default="builtin:vit-xs-tin32")
    parser.add_argument("--tasks", default="glue/rte,glue/mrpc")
    parser.add_argument("--variants", default="all", help="names, each with +option=value …")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], help="an option for every run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="per job")
    parser.add_argument("--out", type=Path, default=Path("transfer.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the table of this file")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.table)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    jobs = jobs_of(args)
    with ProcessPoolExecutor(args.jobs) as pool, args.out.open("a") as out:
        for future in as_completed([pool.submit(run_one, job) for job in jobs]):
            line = future.result()
            out.write(json.dumps(line) + "\n")
            out.flush()
            side = f" side {line['side']:.4f}" if "side" in line else ""
            print(f"{line['key']}: deployed {line['deployed']:.4f}{side} ({line['train_s']:.0f} s)")
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
