"""Which encoders can be tuned, exported and timed? The smallest of every family, one after another.

    python benchmarks/backbones.py                 # resumable
    python benchmarks/backbones.py swin_transformer modernbert     # these families only

For each: which norms were found, whether their gradients by recomputing equal plain
back-propagation, whether the memory forecast is what a step takes, whether the graph exports, is
the bare backbone's, and answers as PyTorch does. Weights are random, transformers' configs tiny; no
network is needed. Writes docs/results/backbones.json and docs/backbones.md.
"""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdpd_deploy.backbones import Backbone, load_backbone
from mdpd_deploy.checks.reference import shape_batches
from mdpd_deploy.config import BackboneConfig, Config, load_config
from mdpd_deploy.errors import MdpdError
from mdpd_deploy.graphs.signature import same_structure
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.model import Deployed
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.forecast import example_batches, forecast, measured_step
from mdpd_deploy.train.methods import TaskSpec, build_method
from mdpd_deploy.train.optim import build_optimizer

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "results" / "backbones.json", DOCS / "backbones.md"
SECONDS = 240  # one model may take this long
BATCH, TOKENS = 2, 12
TINY = {
    "hidden_size": 32, "dim": 32, "d_model": 32, "n_layers": 2, "num_hidden_layers": 2,
    "num_attention_heads": 4, "n_heads": 4, "intermediate_size": 64, "hidden_dim": 64,
    "embedding_size": 32, "emb_dim": 32, "vocab_size": 64, "max_position_embeddings": 64,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
PASSED = "works"


def vision_families() -> Iterator[tuple[str, str]]:
    """Yield (family, its smallest model): a family is a module of timm."""
    import timm

    for family in timm.list_modules():
        names = timm.list_models(module=family)
        sizes = {}
        for name in names:
            with contextlib.suppress(Exception), torch.device("meta"):  # some need what is absent
                model = timm.create_model(name, num_classes=0)
                sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            yield family, "timm:" + min(sizes, key=sizes.__getitem__)


def text_families() -> Iterator[tuple[str, str]]:
    """Yield (model type, model type) of every encoder that transformers classifies texts with."""
    from transformers.models.auto import modeling_auto as auto

    found = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES} & {
        *auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    }
    yield from ((kind, kind) for kind in sorted(found))


def write_text_model(kind: str, folder: Path) -> str:
    """Save a tiny random encoder of one model type, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    plain = AutoConfig.for_model(kind)
    sizes = {name: value for name, value in TINY.items() if hasattr(plain, name)}
    config = AutoConfig.for_model(kind, **sizes, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    AutoModel.from_config(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def check(name: str) -> dict[str, Any]:
    """Try one model; return what was seen, as far as it came."""
    seen: dict[str, Any] = {"model": name}
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        named = name if name.startswith("timm:") else write_text_model(name, Path(folder))
        pretrained = not name.startswith("timm:")
        try:
            seen["step"] = "load"
            config = BackboneConfig(name=named, pretrained=pretrained)
            backbone = load_backbone(config, max_length=TOKENS)
            shake(backbone)
            seen |= {
                "taps": backbone.has_taps, "blocks": backbone.depth, "width": backbone.width,
                "norms": len({n.rpartition(".")[0] for n in backbone.norms()}),
                "parameters": sum(p.numel() for p in backbone.parameters()),
                "step": "gradients",
            }  # fmt: skip
            seen["gradient_difference"], seen["without_gradient"] = gradients(backbone)
            seen["step"] = "forecast"
            seen["forecast_ratio"] = forecast_ratio(config)
            seen["step"] = "export"
            seen |= exported(backbone, Path(folder))
            seen["step"] = PASSED
        except MdpdError as err:
            seen["reason"] = str(err).replace(str(folder), "FOLDER")[:300]
        except Exception as err:  # noqa: BLE001  # what a model of a library may raise is part of the result
            seen["reason"] = f"{type(err).__name__}: {str(err).strip().splitlines()[0][:200]}"
    return seen


def shake(backbone: Backbone) -> None:
    """Add a little noise, so that nothing is zero by symmetry."""
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


def gradients(backbone: Backbone) -> tuple[float, list[str]]:
    """Return the largest difference to plain back-propagation, and norms that get no gradient."""
    found = []
    for mode in ("full", "recompute"):
        config = load_config(None, {"method": "norms"}, [f"train.norm_grad={mode}"])
        torch.manual_seed(0)  # of the head
        method = build_method(copy.deepcopy(backbone), TaskSpec("classify", 3), config)
        method.train_mode()
        torch.manual_seed(0)  # of dropout
        method.step(example_batches(backbone, method, sized(config), TOKENS)[0])
        found.append({name: p.grad for name, p in method.backbone_weights.items()})
    plain, exact = found
    dead = [name for name, gradient in plain.items() if gradient is None]
    pairs = [(g, exact[name]) for name, g in plain.items() if g is not None]
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs)
    return worst, dead


def sized(config: Config) -> Config:
    """Return a config with the batch of this script."""
    return config.model_copy(update={"train": config.train.model_copy(update={"batch": BATCH})})


def forecast_ratio(backbone_config: BackboneConfig) -> float:
    """Return the forecast peak of a step divided by that of a real one."""
    config = sized(load_config(None, {"method": "norms"}, [f"data.max_length={TOKENS}"]))
    config = config.model_copy(update={"backbone": backbone_config})
    foreseen = forecast(config, outputs=3, kind="classify").peak_bytes
    backbone = load_backbone(backbone_config, max_length=TOKENS)
    method = build_method(backbone, TaskSpec("classify", 3), config)
    method.train_mode()
    optimizer = build_optimizer(method)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parts = example_batches(backbone, method, config, TOKENS)
    with measured_step(method, optimizer, parts) as peak:
        for part in parts:
            method.step(part)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return foreseen / peak.peak_bytes


def exported(backbone: Backbone, folder: Path) -> dict[str, Any]:
    """Export bare and with other norms; return nodes, identity and the difference to PyTorch."""
    import onnxruntime

    torch.manual_seed(0)
    model = Deployed(backbone, Head(backbone.width, 3)).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    bare = export_onnx(model, folder / "bare.onnx")
    for parameter in backbone.norms().values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    graph = export_onnx(model, folder / "tuned.onnx")
    same = not same_structure(bare.path, graph.path)
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for _, arrays in shape_batches(model, max_batch=3):
        inputs = (torch.from_numpy(arrays[name]) for name in graph.input_names)
        with torch.no_grad():
            expected = model(*inputs).numpy()
        fed = {value.name: arrays[value.name] for value in session.get_inputs()}
        (found,) = session.run(None, fed)
        worst = max(worst, float(np.abs(expected - found).max() / expected.std()))
    return {"nodes": graph.nodes, "identical_to_bare": same, "parity": worst}


def verdict(seen: dict[str, Any]) -> str:
    """Return works, works as a whole, or why not."""
    if "reason" in seen:
        return f"no ({seen.get('step', 'start')}): {seen['reason']}"
    faults = [
        text
        for fault, text in (
            (seen["gradient_difference"] > 1e-5, "gradients differ"),
            (abs(seen["forecast_ratio"] - 1) > 0.02, f"forecast {seen['forecast_ratio']:.2f}"),
            (seen["parity"] > 1e-4, f"parity {seen['parity']:.0e}"),
            (not seen["identical_to_bare"], "graph differs from bare"),
        )
        if fault
    ]
    if faults:
        return "in part: " + ", ".join(faults)
    return PASSED if seen["taps"] else f"{PASSED}, without side networks"


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return docs/backbones.md."""
    counts = Counter(
        (kind, verdict(seen).startswith(PASSED))
        for family, seen in found.items()
        for kind in ("timm" if seen["model"].startswith("timm:") else "transformers",)
    )
    lines = [
        "# Backbones that were tried",
        "",
        "Written by `python benchmarks/backbones.py` with "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
        + ". Random weights (transformers: tiny configs), a batch of 2, on a CPU.",
        "",
        "Checked for each: norms are found; their gradients by recomputing equal plain",
        "back-propagation; the memory forecast is within 2 % of a real step; the graph exports, has the",
        "structure of the bare backbone's, and answers as PyTorch within 1e-4 of the outputs' spread.",
        "",
        *(
            f"- {kind}: {counts[kind, True]} of {counts[kind, True] + counts[kind, False]} families"
            for kind in ("timm", "transformers")
        ),
        "",
        "| family | tried | blocks | norms | gradients | forecast | nodes | parity | verdict |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for family, seen in sorted(
        found.items(), key=lambda item: (item[1]["model"][:5] != "timm:", item)
    ):
        cells = [
            family,
            f"`{seen['model']}`",
            *(form(seen[key]) if key in seen else "" for key, form in COLUMNS.items()),
            verdict(seen).replace("|", "/"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


COLUMNS = {
    "blocks": str,
    "norms": str,
    "gradient_difference": "{:.0e}".format,
    "forecast_ratio": "{:.3f}".format,
    "nodes": str,
    "parity": "{:.0e}".format,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="timm modules or transformers model types")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a model, in a process of its own
    options = parser.parse_args()
    if options.one:
        print(json.dumps(check(options.one)))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    families = [*vision_families(), *text_families()]
    for family, model in families:
        if family in found or (options.families and family not in options.families):
            continue
        found[family] = tried(model)
        print(f"{family:<28}{model:<44}{verdict(found[family])}", flush=True)
        RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(found))


def tried(model: str) -> dict[str, Any]:
    """Check a model in a process that may crash or take too long."""
    command = [sys.executable, __file__, "--one", model]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"model": model, "reason": f"not done within {SECONDS} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"model": model, "reason": f"the process ended: {last[:200]}"}
    seen: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return seen


if __name__ == "__main__":
    main()
