"""What the papers say a method needs, beside a forecast of the same setting."""

import re

from mdpd_deploy.config import Config

# GB of a ViT-B/16 on VTAB-1K at batch 32, at millions trained, and the source; by method, and by r
# (None: any) where that gives about the size of the paper's side network.
BATCH = 32
FIGURES: dict[tuple[str, int | None], str] = {
    ("full", None): "6.1 at 85.8 M (MDPD, Tab. 3)",
    ("bitfit", None): "3.8 (MDPD), 2.9 (DTL)",
    ("probe", None): "0.6 (MDPD)",
    ("side:dtlv1", None): "1.8 at 0.06 M (DTL, Tab. 4)",
    ("side:dtlv2", None): "1.8 at 0.07 M (DTL, Tab. 4)",
    ("side:dtlv2-ls", None): "1.8 at 0.04 M (DTL, Tab. 4)",
    ("side:lst", 8): "2.7 at 2.38 M (DTL, Tab. 4)",
    ("mdpd:unipt", 2): "2.1 at 5.50 M (MDPD, Tab. 3)",
    ("side:unipt", 2): "2.1 at 5.19 M (MDPD, Tab. 3)",
    ("side:sherl", 2): "2.0 at 5.08 M (MDPD, Tab. 3)",
}


def paper_figure(method: str, config: Config) -> str | None:
    """Return the papers' GB of a method in a run's setting; None where they have none of it.

    Args:
        method: Its word, e.g. `mdpd:unipt`.
        config: Of the run; the papers' backbone is a ViT-B/16, at batch 32.
    """
    backbone = re.fullmatch(r"timm:vit_base_patch16_224(\..*)?", config.backbone.name)
    if not backbone or config.backbone.img_size not in (None, 224) or config.train.batch != BATCH:
        return None
    own = 8 if method == "side:lst" else 2  # their defaults beside vision: `lst.LST.build`
    return FIGURES.get((method, None)) or FIGURES.get((method, config.side.reduction or own))
