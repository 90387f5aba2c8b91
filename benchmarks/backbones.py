"""Which encoders can be tuned, exported and timed? The smallest of every family, one after another.

    python benchmarks/backbones.py                 # resumable
    python benchmarks/backbones.py swin_transformer modernbert     # these families only
    python benchmarks/backbones.py --again         # those that failed

Families are timm's modules, and transformers' text encoders, vision encoders and the towers of its
image-text models, by model type.

For each: which norms were found, whether their gradients by recomputing equal plain
back-propagation, whether the memory forecast is what a step takes, whether the graph exports, is
the bare backbone's, and answers as PyTorch does. Weights are random, transformers' configs tiny; no
network is needed. Writes docs/results/backbones.json and docs/backbones.md.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import resource
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdpd_deploy.backbones import Backbone, load_backbone
from mdpd_deploy.checks.reference import shape_batches
from mdpd_deploy.config import BackboneConfig, Config, load_config
from mdpd_deploy.errors import MdpdError, UserError
from mdpd_deploy.graphs.signature import same_structure
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.model import Deployed
from mdpd_deploy.tasks import Classify
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.memory.forecast import example_batches, forecast, measured_step
from mdpd_deploy.train.methods import build_method
from mdpd_deploy.train.optim import build_optimizer

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "results" / "backbones.json", DOCS / "backbones.md"
SECONDS = 900  # of CPU time that one model may take
BATCH, TOKENS = 2, 12
TINY = {
    "hidden_size": 32, "dim": 32, "d_model": 32, "n_layers": 2, "num_hidden_layers": 2,
    "num_attention_heads": 4, "n_heads": 4, "intermediate_size": 64, "hidden_dim": 64,
    "embedding_size": 32, "emb_dim": 32, "vocab_size": 64, "max_position_embeddings": 64,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
SMALL = 64  # pixels of pictures, for models that take any number
TINY_PICTURES = {
    "image_size": SMALL, "patch_size": 8, "embed_dim": 16, "window_size": 2, "vocab_size": 64,
    **{n: v for n, v in TINY.items() if n not in ("head_dim", "hidden_dim", "vocab_size")},
}  # fmt: skip
IDS = {
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3,
}  # fmt: skip
CHOSEN: dict[str, dict[str, Any]] = {  # what a model's user chooses, or what tiny sizes ask for
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False},
    "funnel": {"architectures": ["FunnelModel"]},
}
TEXT, PICTURES, TOWERS = "text", "pictures", ("vision tower", "text tower")
PASSED = "works"


def vision_families(wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Yield (family, its smallest model) of the wanted: a family is a module of timm."""
    import timm

    for family in filter(wanted, timm.list_modules()):
        names = timm.list_models(module=family)
        sizes = {}
        for name in names:
            with contextlib.suppress(Exception), torch.device("meta"):  # some need what is absent
                model = timm.create_model(name, num_classes=0)
                sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            yield family, "timm:" + min(sizes, key=sizes.__getitem__)


def text_families() -> Iterator[tuple[str, str]]:
    """Yield (family, model) of every encoder that transformers classifies texts with."""
    from transformers.models.auto import modeling_auto as auto

    found = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES} & {
        *auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    }
    yield from ((kind, f"{TEXT}:{kind}") for kind in sorted(found))


def picture_families() -> Iterator[tuple[str, str]]:
    """Yield (family, model) of transformers' vision encoders, and of towers beside a text tower."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    encoders = {*auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}
    encoders |= {*auto.MODEL_FOR_IMAGE_MAPPING_NAMES}
    encoders -= {"timm_backbone", "timm_wrapper"}  # timm's models, which are tried as such
    pairs = {*auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES} | {
        "blip", "clip", "flava", "groupvit", "vision-text-dual-encoder", "xclip",
    }  # fmt: skip
    for kind in sorted(encoders - pairs):
        model: Any = getattr(transformers, str(auto.MODEL_MAPPING_NAMES.get(kind)), None)
        if getattr(model, "main_input_name", None) == "pixel_values":
            yield f"{kind} ({PICTURES})", f"{PICTURES}:{kind}"
    for kind in sorted(pairs & auto.MODEL_MAPPING_NAMES.keys()):
        for tower in TOWERS:
            yield f"{kind} ({tower})", f"{tower}:{kind}"


def write_model(name: str, folder: Path) -> dict[str, Any]:
    """Save a tiny random model of transformers with what it reads its inputs by.

    Args:
        name: What is wanted of it and its model type, e.g. `pictures:vit`.
        folder: To write to.

    Returns:
        The options of `BackboneConfig` that load it.
    """
    from transformers import AutoModel

    wanted, _, kind = name.partition(":")
    config = tiny_config(kind, TINY if wanted == TEXT else TINY_PICTURES)
    AutoModel.from_config(config).save_pretrained(folder)
    paired = len(towers_of(config)) > 1
    if wanted in (TEXT, TOWERS[1]):
        write_tokenizer(folder)
        return {"name": str(folder), "tower": "text" if paired else None}
    part = next(iter(towers_of(config).values())) if paired else config
    size = getattr(part, "image_size", SMALL)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    plain = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": height, "width": width},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(plain))
    return {"name": str(folder), "tower": "vision" if paired else None}


def tiny_config(kind: str, tiny: dict[str, Any]) -> Any:
    """Return a config of one model type, its two towers included, with few and thin layers."""
    from transformers import AutoConfig

    plain = AutoConfig.for_model(kind)
    towers = towers_of(plain)
    if len(towers) > 1:
        parts = {name: small(part, tiny) for name, part in towers.items()}
        return AutoConfig.for_model(kind, **parts)
    return AutoConfig.for_model(kind, **small(plain, tiny), **CHOSEN.get(kind, {}))


def towers_of(config: Any) -> dict[str, Any]:
    """Return the configs of an image-text model's towers, by name, that of pictures first."""
    names = ("vision_config", "image_config", "text_config")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def small(plain: Any, tiny: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config that make it small; lists keep their length."""
    sizes = {name: v for name, v in tiny.items() if takes(plain, name)}
    if "patch_size" in sizes:
        sizes["patch_size"] = min(sizes["patch_size"], plain.patch_size)
    if hasattr(plain, "vocab_size"):
        sizes |= {"vocab_size": tiny["vocab_size"]}
        sizes |= {name: v for name, v in IDS.items() if hasattr(plain, name)}
    if isinstance(getattr(plain, "depths", None), (list, tuple)):
        sizes["depths"] = [1 for _ in plain.depths]
        for name in (
            "hidden_size",
            "embed_dim",
            "patch_size",
            "num_attention_heads",
            "num_hidden_layers",
        ):
            sizes.pop(name, None)  # a plan of stages has its own
    return sizes


def takes(plain: Any, name: str) -> bool:
    """Tell whether a config has a number of this name that may be set."""
    value = getattr(plain, name, None)
    with contextlib.suppress(NotImplementedError):
        setattr(copy.copy(plain), name, value)
        return isinstance(value, int)
    return False


def write_tokenizer(folder: Path) -> None:
    """Save a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "attention_mask"], padding_side="right",
    ).save_pretrained(folder)  # fmt: skip


def load(name: str, folder: Path) -> tuple[BackboneConfig, Backbone, int]:
    """Return how a model is named, the backbone, and the tokens of its texts."""
    if not name.startswith("timm:"):
        config = BackboneConfig(**write_model(name, folder))
        tokens = TINY["max_position_embeddings"] if "siglip" in name else TOKENS
        return config, load_backbone(config, max_length=tokens), tokens
    for size in (SMALL, None):
        config = BackboneConfig(name=name, pretrained=False, img_size=size)
        with contextlib.suppress(UserError, IndexError):  # some fit small pictures in no tidy way
            return config, load_backbone(config), TOKENS
    return config, load_backbone(config), TOKENS  # says why not


def check(name: str) -> dict[str, Any]:
    """Try one model; return what was seen, as far as it came."""
    seen: dict[str, Any] = {"model": name, "step": "load"}
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        try:
            config, backbone, tokens = load(name, Path(folder))
            shake(backbone)
            seen |= {
                "taps": backbone.has_taps, "blocks": backbone.depth, "width": backbone.width,
                "norms": len({n.rpartition(".")[0] for n in backbone.norms()}),
                "parameters": sum(p.numel() for p in backbone.parameters()),
                "step": "gradients",
            }  # fmt: skip
            if backbone.takes == "image":
                seen["pixels"] = backbone.example_inputs(1)["pixel_values"].shape[2]
            seen["gradient_difference"], seen["without_gradient"] = gradients(backbone, tokens)
            seen["step"] = "forecast"
            seen["forecast_ratio"] = forecast_ratio(config, tokens)
            seen["step"] = "export"
            seen |= exported(backbone, Path(folder))
            seen["step"] = PASSED
        except MdpdError as err:
            seen["reason"] = str(err).replace(str(folder), "FOLDER")[:300]
        except Exception as err:  # noqa: BLE001  # what a model of a library may raise is part of the result
            lines = str(err).strip().splitlines() or [""]
            seen["reason"] = f"{type(err).__name__}: {lines[0][:200]}"
    return seen


def shake(backbone: Backbone) -> None:
    """Add a little noise, so that nothing is zero by symmetry."""
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


def gradients(backbone: Backbone, tokens: int) -> tuple[float, list[str]]:
    """Return the largest difference to plain back-propagation, and norms that get no gradient."""
    found = []
    for mode in ("full", "recompute"):
        config = load_config(None, {"method": "norms"}, [f"train.norm_grad={mode}"])
        torch.manual_seed(0)  # of the head
        method = build_method(copy.deepcopy(backbone), Classify.numbered(3), config)
        method.train_mode()
        torch.manual_seed(0)  # of dropout
        method.step(example_batches(backbone, method, sized(config), tokens)[0])
        found.append({name: p.grad for name, p in method.backbone_weights.items()})
    plain, exact = found
    dead = [name for name, gradient in plain.items() if gradient is None]
    pairs = [(g, exact[name]) for name, g in plain.items() if g is not None]
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs)
    return worst, dead


def sized(config: Config) -> Config:
    """Return a config with the batch of this script."""
    return config.model_copy(update={"train": config.train.model_copy(update={"batch": BATCH})})


def forecast_ratio(backbone_config: BackboneConfig, tokens: int) -> float:
    """Return the forecast peak of a step divided by that of a real one."""
    config = sized(load_config(None, {"method": "norms"}, [f"data.max_length={tokens}"]))
    config = config.model_copy(update={"backbone": backbone_config})
    foreseen = forecast(config, Classify.numbered(3)).peak_bytes
    backbone = load_backbone(backbone_config, max_length=tokens)
    method = build_method(backbone, Classify.numbered(3), config)
    method.train_mode()
    optimizer = build_optimizer(method)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parts = example_batches(backbone, method, config, tokens)
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
        for kind in (GROUPS[seen["model"].partition(":")[0]],)
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
            for kind in dict.fromkeys(GROUPS.values())
        ),
        "",
        "| family | tried | pixels | blocks | norms | gradients | forecast | nodes | parity | verdict |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for family, seen in sorted(
        found.items(),
        key=lambda item: ([*GROUPS].index(item[1]["model"].partition(":")[0]), item[0]),
    ):
        cells = [
            family,
            f"`{seen['model']}`",
            *(form(seen[key]) if key in seen else "" for key, form in COLUMNS.items()),
            verdict(seen).replace("|", "/"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


GROUPS = {
    "timm": "timm",
    TEXT: "transformers, texts",
    PICTURES: "transformers, pictures",
    **dict.fromkeys(TOWERS, "transformers, towers of image-text models"),
}
COLUMNS = {
    "pixels": str,
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
    parser.add_argument("--again", action="store_true", help="also those that failed before")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def wanted(family: str) -> bool:
        done = family in found and (not options.again or verdict(found[family]).startswith(PASSED))
        return not done and family in (options.families or [family])

    for family, model in chain(text_families(), picture_families(), vision_families(wanted)):
        if not wanted(family):
            continue
        found[family] = tried(model)
        print(f"{family:<28}{model:<44}{verdict(found[family])}", flush=True)
        RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(found))


def tried(model: str) -> dict[str, Any]:
    """Check a model in a process of its own, which may crash or take too long."""
    fork = multiprocessing.get_context("fork")  # what is imported here need not be again
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=send_check, args=(model, sender))
    process.start()
    sender.close()
    try:
        seen: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            reason = f"not done within {SECONDS} s of CPU time, or its memory"
        else:
            reason = f"the process ended with exit code {process.exitcode}"
        return {"model": model, "reason": reason}
    process.join()
    return seen


def send_check(model: str, sender: Connection) -> None:
    """Check a model within `SECONDS` of CPU time and send what was seen."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sender.send(check(model))


if __name__ == "__main__":
    main()
