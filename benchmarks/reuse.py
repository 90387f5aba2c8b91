"""What do k tasks on one input save when they share the plain blocks?

    python benchmarks/reuse.py --side dtlv1 --tasks 1,2,4,8,19 --out reuse.jsonl

Side networks have random weights (speed does not depend on them). One call of the shared model
against k separate models, interleaved in random order; ratios are medians with a 95 % bootstrap
interval. PyTorch eager, so that both pay the same overhead.
"""

import argparse
import json
from pathlib import Path

import torch

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig, SideConfig
from mdpd_deploy.machine import describe
from mdpd_deploy.model import WithSide
from mdpd_deploy.serve.latency.cells import Plan, measure
from mdpd_deploy.serve.latency.estimate import paired_ratio
from mdpd_deploy.serve.shared import SharedTasks
from mdpd_deploy.sides import build_side
from mdpd_deploy.tasks.head import Head


def compare(name: str, side: str, tasks: int, batch: int, seconds: float) -> dict:
    """Time `tasks` separate models against one that shares the backbone's plain blocks."""
    backbone = load_backbone(BackboneConfig(name=name))
    config = SideConfig(name=side)
    models = [
        WithSide(backbone, build_side(backbone, config), Head(backbone.width, 10))
        for _ in range(tasks)
    ]
    shared = SharedTasks(models).eval()
    inputs = list(backbone.example_inputs(batch).values())

    @torch.no_grad()
    def separate(index: int) -> None:
        for model in models:
            model(*inputs)

    @torch.no_grad()
    def together(index: int) -> None:
        shared(*inputs)

    calls = {"separate": separate, "shared": together}
    times = measure(calls, inputs=1, plan=Plan(seconds=seconds), seed=0).times
    ratio = paired_ratio(times["shared"], times["separate"], seed=0)
    return {
        "backbone": name,
        "side": side,
        "tasks": tasks,
        "batch": batch,
        "rounds": len(times["shared"]),
        "saved": round(1 - ratio.median, 4),
        "ci95": [round(1 - ratio.high, 4), round(1 - ratio.low, 4)],
        "floor": round((tasks - 1) / tasks * models[0].side.last_tap / backbone.depth, 4),
        "threads": torch.get_num_threads(),
        "cpu": describe()["cpu"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="builtin:vit-xs-tin32")
    parser.add_argument("--side", default="dtlv1")
    parser.add_argument("--tasks", default="1,2,4,8,19")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("reuse.jsonl"))
    args = parser.parse_args()
    print("| tasks | time saved | share of blocks that run once for all |\n|---|---|---|")
    with args.out.open("a") as out:
        for tasks in map(int, args.tasks.split(",")):
            line = compare(args.backbone, args.side, tasks, args.batch, args.seconds)
            out.write(json.dumps(line) + "\n")
            low, high = line["ci95"]
            print(
                f"| {tasks} | {line['saved']:.0%} [{low:.0%}, {high:.0%}] | {line['floor']:.0%} |"
            )


if __name__ == "__main__":
    main()
