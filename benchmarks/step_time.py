"""How long does a training step take, beside the libraries' own loops on the same data?

    python benchmarks/step_time.py --backbone timm:vit_base_patch16_224 --out step-time.json
    python benchmarks/step_time.py --backbone bert --device cuda --out step-time-bert.json

Ours: gradients, clipping and AdamW of one step of a method, as `train/loop.py` takes it. Theirs: a
step of Hugging Face's Trainer, every weight tuned, and of plain PyTorch around peft's LoRA model, as
peft's own examples write it. All have the same architecture with random weights, the same batches on
the device, float32, rank and clipping; the Trainer's loop is its own, stopped between its steps. One
process, rounds that take one step of each in random order; ratios are medians with a 95 % interval.
"""

import argparse
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from memory import write_bert
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from mdpd_deploy.adapters.library import from_peft
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import Config, check_config
from mdpd_deploy.machine import describe
from mdpd_deploy.serve.latency.cells import Plan, measure
from mdpd_deploy.serve.latency.estimate import milliseconds, paired_ratio
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.memory.forecast import example_batches
from mdpd_deploy.train.methods import build_method
from mdpd_deploy.train.optim import build_optimizer, clip_gradients

CLASSES, CLIP = 10, 1.0
THEIRS = ("full, Trainer", "lora, peft")
OURS = {  # name → method, train.norm_grad: blocks run again (the default), or all kept
    "norms": ("norms", "recompute"),
    "norms, all kept": ("norms", "full"),
    "mdpd": ("mdpd", "recompute"),
    "mdpd, all kept": ("mdpd", "full"),
    "full": ("full", None),
    "lora": ("lora", None),
}
Step = Callable[[int], object]
Inputs = dict[str, Tensor]


def config_of(method: str, norm_grad: str | None, backbone: str, batch: int) -> Config:
    """Return a run of ours; all else is the default of its method."""
    own = {"name": backbone, "pretrained": False}
    train = {"batch": batch} | ({"norm_grad": norm_grad} if norm_grad else {})
    return check_config({"method": method, "backbone": own, "train": train})


def our_step(config: Config, device: str) -> tuple[Step, Inputs]:
    """Return one optimiser step of a method, and its inputs with their labels."""
    backbone = load_backbone(config.backbone)
    method = build_method(backbone, Classify.numbered(CLASSES).example(config), config)
    backbone.to(device)
    method.modules.to(device)
    method.train_mode()
    optimizer = build_optimizer(method)
    parts = example_batches(backbone, method, config, config.data.max_length)

    def step(index: int) -> None:
        for part in parts:
            method.step(part)
        clip_gradients(method, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, {**parts[0].inputs, "labels": parts[0].labels}


class Pictures(nn.Module):
    """A timm classifier as the Trainer wants it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = timm.create_model(name.removeprefix("timm:"), num_classes=CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def their_model(backbone: str) -> nn.Module:
    """Return the library's own classifier with random weights."""
    if backbone.startswith("timm:"):
        return Pictures(backbone)
    facts = AutoConfig.from_pretrained(backbone, num_labels=CLASSES)
    return AutoModelForSequenceClassification.from_config(facts, attn_implementation="sdpa")


def lora_step(backbone: str, inputs: Inputs) -> Step:
    """Return one step of plain PyTorch around a LoRA model of peft."""
    pictures = backbone.startswith("timm:")
    targets, head = (["qkv"], "head") if pictures else (["query", "value"], "classifier")
    facts, adapted = from_peft("LoraConfig", "get_peft_model")
    options = facts(r=8, lora_alpha=16, target_modules=targets, modules_to_save=[head])
    model = adapted(their_model(backbone), options).to(inputs["labels"].device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)

    def step(index: int) -> None:
        model(**inputs)["loss"].backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Stepped(TrainerCallback):
    """Stops the Trainer, which runs in a thread of its own, between its steps."""

    def __init__(self) -> None:
        self.start, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.last = False

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.start.acquire()

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        control.should_training_stop = self.last
        self.done.release()

    def step(self, index: int) -> None:
        self.start.release()
        self.done.acquire()


def trainer_steps(backbone: str, inputs: Inputs, folder: str) -> tuple[Step, Callable[[], None]]:
    """Return one step of a Trainer that tunes every weight, and what ends its loop."""
    batch = len(inputs["labels"])
    rows = [{k: v[i].cpu() for k, v in inputs.items()} for i in range(batch)] * 4
    stepped, threads = Stepped(), torch.get_num_threads()
    arguments = Arguments(
        output_dir=folder, per_device_train_batch_size=batch, max_steps=10**9, learning_rate=5e-5,
        max_grad_norm=CLIP, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=inputs["labels"].device.type == "cpu",
    )  # fmt: skip
    model = their_model(backbone)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[stepped])

    def loop() -> None:
        torch.set_num_threads(threads)
        try:
            trainer.train()
        finally:
            stepped.done.release()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()

    def end() -> None:
        stepped.last = True
        stepped.step(0)
        thread.join()

    def step(index: int) -> None:
        stepped.step(index)
        if not thread.is_alive():
            raise SystemExit("the Trainer's loop ended: its error stands above.")

    return step, end


def compare(backbone: str, batch: int, device: str, plan: Plan) -> dict[str, object]:
    """Time a step of every contender; returns milliseconds, and ratios to each of theirs."""
    torch.manual_seed(0)
    calls: dict[str, Step] = {}
    for name, (method, norm_grad) in OURS.items():
        calls[name], inputs = our_step(config_of(method, norm_grad, backbone, batch), device)
    calls["lora, peft"] = lora_step(backbone, inputs)
    with tempfile.TemporaryDirectory() as folder:
        calls["full, Trainer"], end = trainer_steps(backbone, inputs, folder)
        times = measure(
            {name: waited(call, device) for name, call in calls.items()},
            inputs=1, plan=plan, seed=0,
        ).times  # fmt: skip
        end()
    one = times["full"] * 0 + 1_000_000
    found = {name: {"ms": paired_ratio(taken, one, seed=0).median} for name, taken in times.items()}
    for name, taken in times.items():
        for other in ("full", *THEIRS):
            ratio = paired_ratio(taken, times[other], seed=0)
            found[name][f"over {other}"] = [ratio.median, ratio.low, ratio.high]
    return {
        "backbone": backbone, "batch": batch, "device": device, "rounds": len(one),
        "threads": torch.get_num_threads(), "machine": describe(), "steps": found,
    }  # fmt: skip


def waited(call: Step, device: str) -> Step:
    """Return a call that waits for the device."""

    def whole(index: int) -> None:
        call(index)
        if device == "cuda":
            torch.cuda.synchronize()

    return whole


def table(found: dict[str, object]) -> str:
    """Return the Markdown table of a result."""
    others = ("full", *THEIRS)
    lines = [f"| step | ms | {' | '.join(f'over {o}' for o in others)} |", "|---|--:|--:|--:|--:|"]
    for name, row in found["steps"].items():
        cells = [f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in
                 (row[f"over {other}"] for other in others)]  # fmt: skip
        lines.append(f"| {name} | {milliseconds(row['ms'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backbone", default="timm:vit_base_patch16_224", help="timm:NAME, or bert"
    )
    parser.add_argument("--width", type=int, default=768, help="of bert")
    parser.add_argument("--layers", type=int, default=12, help="of bert")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=Path("step-time.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = args.backbone
        if name == "bert":
            sizes = {"hidden_size": args.width, "num_hidden_layers": args.layers,
                     "num_attention_heads": args.width // 64, "intermediate_size": 4 * args.width}  # fmt: skip
            name = str(write_bert(Path(folder) / "bert", **sizes))
        found = compare(name, args.batch, args.device, Plan(seconds=args.seconds))
    found["backbone"] = args.backbone
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
