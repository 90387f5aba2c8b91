"""The two backbones that are measured on a card, with random weights, and their small stand-ins.

Memory and speed do not depend on the weights' values, so nothing is downloaded. The full ones are
those of docs/memory.md.
"""

import json
from dataclasses import replace
from pathlib import Path

from memory import Setting, settings, write_bert

SHAPES = ("vit", "bert")


def full_shapes(folder: Path) -> dict[str, Setting]:
    """Return ViT-B/16 (r = 2) and BERT-base (r = 8), batch 32; what is written goes to a folder."""
    vit, _, bert, _ = settings(folder)
    return {"vit": vit, "bert": bert}


def small_shapes(folder: Path) -> dict[str, Setting]:
    """Return a ViT and a BERT of two narrow blocks, with the same options as the full ones."""
    vit, bert = folder / "vit", folder / "bert"
    vit.mkdir()
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    config = {"timm_model": "vit_tiny_patch16_224", "timm_kwargs": {**sizes, "num_classes": 0}}
    (vit / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    write_bert(bert, **sizes, intermediate_size=256, vocab_size=1000)
    full = full_shapes(folder)
    return {
        "vit": replace(
            full["vit"], title="small ViT, 32 × 32 pixels, batch 32, 100 classes", backbone=str(vit)
        ),
        "bert": replace(
            full["bert"], title="small BERT, 128 tokens, batch 32, 2 classes", backbone=str(bert)
        ),
    }
