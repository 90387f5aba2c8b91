"""How a transformers vision model wants its pictures: preprocessor_config.json → our preprocessing.

Where a margin to crop is odd, the library rounds down and we round half to even: one pixel apart.
"""

import math
from typing import Any

from PIL import Image

from mdpd_deploy.backbones.build import explaining, quiet_libraries
from mdpd_deploy.data.preprocess import ImagePreprocess
from mdpd_deploy.errors import UserError

CONVNEXT_SQUASHES = 384  # pixels from which ConvNeXt's processor scales each edge and crops nothing
LEVIT_SCALE = 256 / 224
Size = tuple[int, int]


def read_preprocess(where: str, arguments: dict[str, Any], option: str) -> ImagePreprocess:
    """Read a model's own preprocessing, which the library's class completes.

    Args:
        where: A folder, or a name on the hub.
        arguments: For the library's loader.
        option: Names the model in messages.

    Raises:
        UserError: If there is none, or it does what `ImagePreprocess` does not.
    """
    from transformers import AutoImageProcessor

    mend = "Give the folder its preprocessor_config.json."
    with quiet_libraries(), explaining(f"{option}: no preprocessing can be read", mend):
        reader: Any = AutoImageProcessor  # untyped in transformers
        facts = reader.from_pretrained(where, **arguments)
    try:
        return _preprocess(facts)
    except (AttributeError, TypeError, ValueError) as err:
        raise UserError(
            f"{option}: its preprocessing ({type(facts).__name__}) is none that is known here "
            f"({err}); take a model whose pictures are resized, cropped and normalised."
        ) from err


def _preprocess(facts: Any) -> ImagePreprocess:
    if getattr(facts, "do_flip_channel_order", None):
        raise ValueError("it swaps red and blue")
    size, crop_pct, mode = _geometry(facts)
    scale = 255 * facts.rescale_factor if facts.do_rescale else 255.0  # of a pixel in [0, 1]
    shift = 1.0 if getattr(facts, "rescale_offset", None) else 0.0
    normal = bool(facts.do_normalize)
    mean = facts.image_mean if normal else (0.0, 0.0, 0.0)
    std = facts.image_std if normal else (1.0, 1.0, 1.0)
    red, green, blue = ((shift + value) / scale for value in mean)
    std_red, std_green, std_blue = (value / scale for value in std)
    return ImagePreprocess(
        size=size,
        mean=(red, green, blue),
        std=(std_red, std_green, std_blue),
        interpolation=Image.Resampling(facts.resample).name.lower(),
        crop_pct=crop_pct,
        crop_mode=mode,
    )


def _geometry(facts: Any) -> tuple[Size, float, str]:
    """Return size, crop_pct and crop_mode."""
    if not facts.do_resize:
        raise ValueError("it takes pictures of any size")
    size: Any = facts.size
    height, width, short = size.height, size.width, size.shortest_edge
    scaled: Size = (short, short) if height is None or width is None else (height, width)
    mode = "center" if height is None or width is None else "squash"
    kind = type(facts).__name__
    if kind.startswith("ConvNext"):
        if scaled[0] >= CONVNEXT_SQUASHES:
            return scaled, 1.0, "squash"
        return scaled, facts.crop_pct, "center"
    if kind.startswith("Levit"):
        edge = int(LEVIT_SCALE * scaled[0])
        scaled = (edge, edge)
    if not getattr(facts, "do_center_crop", None):
        return scaled, 1.0, mode
    crop: Size = (facts.crop_size.height, facts.crop_size.width)
    return crop, _share(crop, scaled), mode


def _share(crop: Size, scaled: Size) -> float:
    """Return crop_pct, such that a crop's edges divided by it are the scaled picture's."""
    share = crop[0] / scaled[0]
    if [math.floor(edge / share) for edge in crop] != list(scaled):
        share = crop[0] / (scaled[0] + 0.5)  # rounding went below the edge
    if share > 1 or [math.floor(edge / share) for edge in crop] != list(scaled):
        raise ValueError(f"it crops {crop} pixels of {scaled}")
    return share
