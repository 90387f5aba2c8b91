"""Preprocessing that travels with the model: raw inputs → numpy arrays. No torch here.

`Preprocess` has two forms, `ImagePreprocess` and `TextPreprocess`; both are callables from a list
of raw inputs to named arrays (the names are the graph's inputs), and both save to and load from a
folder: `preprocess.json`, and for text `tokenizer.json`.

Images follow timm's evaluation transform (`timm.data.transforms_factory.transforms_imagenet_eval`)
step by step with PIL and numpy, and give the same numbers; text follows what transformers' fast
tokenizers do with `truncation="longest_first"`, cut at the side that the tokenizer names.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Encoding, Tokenizer

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.examples import Field, Raw, Text
from mdpd_deploy.data.images import MAX_PIXELS, open_image
from mdpd_deploy.data.tokenizer_limits import check_tokenizer
from mdpd_deploy.data.truncation import Side, cut_text, keep_tokens
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import Read, read_json, write_json, write_text
from mdpd_deploy.text import require_unicode

FILE = "preprocess.json"
TOKENIZER_FILE = "tokenizer.json"
SCHEMA = 1

INTERPOLATIONS = {
    name: Image.Resampling[name.upper()]
    for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
}
CROP_MODES = ("center", "squash", "border")
NORMALS = {  # by name: mean and deviation of each channel
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
Resize = Literal["squash", "crop", "pad"]
MAX_TOKENS = 1_000_000  # of one text; far above what an encoder takes


@dataclass(frozen=True)
class ImagePreprocess:
    """Pictures → `pixel_values` float32 [B, 3, H, W].

    Attributes:
        size: (height, width) of the model's input, in pixels.
        mean: Mean of each RGB channel, in [0, 1].
        std: Standard deviation of each RGB channel.
        interpolation: One of `INTERPOLATIONS`.
        crop_pct: The picture is scaled to size / crop_pct, then the middle is cropped.
        crop_mode: `center` keeps the aspect ratio and crops, `squash` scales each edge, `border`
            keeps the whole picture and fills the rest with the mean colour.
    """

    takes: ClassVar[Field] = "image"
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    input_names: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS or self.crop_mode not in CROP_MODES:
            raise UserError(
                f"image preprocessing: interpolation {self.interpolation!r:.60} must be one of "
                f"{', '.join(INTERPOLATIONS)} and crop mode {self.crop_mode!r:.60} one of "
                f"{', '.join(CROP_MODES)}."
            )
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if min(self.size) < 1 or not 0 < self.crop_pct <= 1 or min(self.std) <= 0 or not finite:
            raise UserError(
                f"image preprocessing: size {self.size} and std {self.std} must be positive, "
                f"mean {self.mean} finite and crop_pct {self.crop_pct} in (0, 1]."
            )
        if self.size[0] * self.size[1] > MAX_PIXELS * self.crop_pct**2:
            raise UserError(
                f"image preprocessing: size {self.size} at crop_pct {self.crop_pct} asks for more "
                f"than {MAX_PIXELS // 1_000_000} million pixels."
            )

    def __call__(self, raws: Sequence[Raw]) -> dict[str, NDArray[Any]]:
        """Open, resize, crop and normalise pictures.

        Raises:
            UserError: For a text, or a picture that cannot be read.
        """
        arrays = [self.to_array(self.geometry(open_image(_picture(raw)))) for raw in raws]
        return {"pixel_values": np.stack(arrays)}

    def geometry(self, image: Image.Image) -> Image.Image:
        """Resize and crop to `size`; nothing else, so that training can augment in its place."""
        scale = tuple(math.floor(edge / self.crop_pct) for edge in self.size)
        height, width = image.height, image.width
        if self.crop_mode == "squash":
            target = scale
        elif self.crop_mode == "center" and scale[0] == scale[1]:
            short = scale[0]  # torchvision truncates the long edge, timm's own resize rounds it
            if width <= height:
                target = (int(short * height / width), short)
            else:
                target = (short, int(short * width / height))
        else:
            ratios = (height / scale[0], width / scale[1])
            ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
            target = (max(round(height / ratio), 1), max(round(width / ratio), 1))
        if target[0] * target[1] > MAX_PIXELS:
            raise UserError(
                f"a picture of {width} x {height} pixels is too long for its width: scaled for the "
                f"model it would have more than {MAX_PIXELS // 1_000_000} million; crop it."
            )
        resized = image.resize((target[1], target[0]), INTERPOLATIONS[self.interpolation])
        return self._crop(resized)

    def to_array(self, image: Image.Image) -> NDArray[np.float32]:
        """Scale to [0, 1] and normalise an RGB picture of `size` → float32 [3, H, W]."""
        pixels = np.asarray(image, dtype=np.uint8).astype(np.float32) / np.float32(255)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        normal = (pixels - mean) / std
        return np.ascontiguousarray(normal.transpose(2, 0, 1))

    def asked(self, data: DataConfig) -> "ImagePreprocess":
        """Return this preprocessing as a run's options have it."""
        changed = self if data.resize is None else self.resized(data.resize)
        if data.crop_pct is not None:
            changed = replace(changed, crop_pct=data.crop_pct)
        if data.normalize in NORMALS:
            mean, std = NORMALS[data.normalize]
            changed = replace(changed, mean=mean, std=std)
        return changed

    def resized(self, mode: Resize) -> "ImagePreprocess":
        """Return this preprocessing with another way to `size`, as `data.resize` names it.

        `crop` is the backbone's own. Both others keep the whole picture: `squash` scales each edge
        (bicubic, as VTAB's papers do), `pad` keeps the shape and adds a border.
        """
        if mode == "crop":
            return self
        if mode == "squash":
            return replace(self, crop_mode="squash", crop_pct=1.0, interpolation="bicubic")
        return replace(self, crop_mode="border", crop_pct=1.0)

    def save(self, folder: Path) -> None:
        """Write `preprocess.json` into a folder."""
        head = {"schema": SCHEMA, "kind": "image", "input_names": self.input_names}
        write_json(folder / FILE, {**head, **asdict(self)})

    def _crop(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        lack = (max(height - image.height, 0), max(width - image.width, 0))
        if any(lack):
            border = self.mean if self.crop_mode == "border" else (0, 0, 0)
            fill = tuple(round(255 * channel) for channel in border)
            padded = Image.new("RGB", (image.width + lack[1], image.height + lack[0]), fill)
            padded.paste(image, (lack[1] // 2, lack[0] // 2))
            image = padded
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True, eq=False)
class TextPreprocess:
    """Sentences or pairs → int64 `input_ids`, `attention_mask` and, if named, `token_type_ids` [B, N].

    Attributes:
        tokenizer: Kept as a copy of our own, so that nobody else's settings reach it.
        input_names: The arrays wanted, in the graph's order (RoBERTa has no `token_type_ids`).
        max_length: Most tokens kept, special ones included; of a pair the longer text gives first.
            Texts are cut at their end, or at their beginning where the tokenizer says so.
        side: Where texts are cut, `right` or `left`: the tokenizer's own setting.
        pad_id: The padding token.
        pad: N is that of the batch's longest text, or always `max_length`.
    """

    takes: ClassVar[Field] = "text"
    tokenizer: Tokenizer
    input_names: tuple[str, ...]
    max_length: int
    pad_id: int
    pad: Literal["longest", "max"] = "longest"
    side: Side = field(default="right", init=False)

    def __post_init__(self) -> None:
        unknown = set(self.input_names) - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown or "input_ids" not in self.input_names:
            raise UserError(
                f"text preprocessing: inputs {', '.join(self.input_names)[:60]!r} must be input_ids with "
                "attention_mask and token_type_ids as options."
            )
        if not 1 <= self.max_length <= MAX_TOKENS or abs(self.pad_id) >= 2**63:
            raise UserError(
                f"text preprocessing: max_length {self.max_length} must be 1 to {MAX_TOKENS:,} and "
                f"pad_id {self.pad_id} a token's number."
            )
        with _panics_in_words():
            own = Tokenizer.from_str(self.tokenizer.to_str())
            side = (own.truncation or {}).get("direction", "right")
            own.no_padding()
            own.no_truncation()  # see `truncation`
        object.__setattr__(self, "side", side)
        object.__setattr__(self, "tokenizer", own)

    def __call__(self, raws: Sequence[Raw]) -> dict[str, NDArray[Any]]:
        """Tokenise, truncate and pad texts.

        Raises:
            UserError: For a picture, or if the tokenizer is broken.
        """
        with _panics_in_words():
            texts = [
                cut_text(self.tokenizer, _text(raw), self.max_length, self.side) for raw in raws
            ]
            encodings = self.tokenizer.encode_batch(texts)
        kept = [keep_tokens(encoding, self.max_length, self.side) for encoding in encodings]
        length = self.max_length
        if self.pad == "longest":
            length = max(min(len(encoding), length) for encoding in encodings)
        arrays: dict[str, NDArray[Any]] = {}
        for name in self.input_names:
            filler = self.pad_id if name == "input_ids" else 0
            array = np.full((len(raws), length), filler, dtype=np.int64)
            for row, encoding, positions in zip(array, encodings, kept, strict=True):
                values = _values(encoding, name)
                if positions is not None:
                    values = [values[position] for position in positions]
                row[: len(values)] = values
            arrays[name] = array
        return arrays

    def count_tokens(self, raws: Sequence[Raw]) -> NDArray[np.int64]:
        """Count the tokens of texts before they are cut, special ones included [len(raws)].

        Raises:
            UserError: As a call.
        """
        texts = [_text(raw) for raw in raws]
        with _panics_in_words():
            found = self.tokenizer.encode_batch_fast(texts)
        return np.array([len(encoding.ids) for encoding in found], np.int64)

    def save(self, folder: Path) -> None:
        """Write `preprocess.json` and `tokenizer.json` into a folder."""
        plain = {
            "schema": SCHEMA,
            "kind": "text",
            "input_names": list(self.input_names),
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "pad": self.pad,
        }
        written = Tokenizer.from_str(self.tokenizer.to_str())
        written.enable_truncation(  # for others
            self.max_length, strategy="longest_first", direction=self.side
        )
        write_text(folder / TOKENIZER_FILE, written.to_str())
        write_json(folder / FILE, plain)


Preprocess = ImagePreprocess | TextPreprocess


def load_preprocess(
    folder: Path, tokenizer_file: Path | None = None, *, read: Read = Path.read_bytes
) -> Preprocess:
    """Read what `save` wrote.

    Args:
        folder: Holds `preprocess.json`.
        tokenizer_file: The tokenizer of a text model; None = the one in the folder.
        read: How files are read.

    Raises:
        UserError: If a file is missing, damaged or of another schema.
    """
    path = folder / FILE
    plain = read_json(path, "preprocessing", read)
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
        found = plain.get("schema") if isinstance(plain, dict) else type(plain).__name__
        raise UserError(
            f"{path} has schema {found!r:.60}, this version reads {SCHEMA}: "
            "make the file again with this version."
        )
    try:
        if plain["kind"] == "image":
            return _load_image(plain)
        if plain["kind"] == "text":
            return _load_text(plain, tokenizer_file or folder / TOKENIZER_FILE, read)
    except (KeyError, TypeError, ValueError, OverflowError) as err:
        raise UserError(f"{path} is damaged ({err!r:.200}): take it from a sound copy.") from err
    raise UserError(f"{path} has the unknown kind {plain['kind']!r:.60}: expected image or text.")


def _load_image(plain: dict[str, Any]) -> ImagePreprocess:
    height, width = (int(edge) for edge in plain["size"])
    red, green, blue = (float(value) for value in plain["mean"])
    std_red, std_green, std_blue = (float(value) for value in plain["std"])
    return ImagePreprocess(
        size=(height, width),
        mean=(red, green, blue),
        std=(std_red, std_green, std_blue),
        interpolation=str(plain["interpolation"]),
        crop_pct=float(plain["crop_pct"]),
        crop_mode=str(plain["crop_mode"]),
    )


def _load_text(plain: dict[str, Any], tokenizer_file: Path, read: Read) -> TextPreprocess:
    try:
        with _panics_in_words():
            raw = read(tokenizer_file)
            check_tokenizer(raw)
            tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
    except UserError:
        raise
    except Exception as err:  # the Rust side raises bare Exception
        raise UserError(
            f"the tokenizer {tokenizer_file} cannot be read ({err}): take it from a sound copy."
        ) from err
    if plain["pad"] not in ("longest", "max"):
        raise ValueError(f"pad={plain['pad']!r}")
    return TextPreprocess(
        tokenizer=tokenizer,
        input_names=tuple(str(name) for name in plain["input_names"]),
        max_length=int(plain["max_length"]),
        pad_id=int(plain["pad_id"]),
        pad=plain["pad"],
    )


@contextlib.contextmanager
def _panics_in_words() -> Iterator[None]:
    """Turn a panic of the tokenizer's Rust side, which is no `Exception`, into a `UserError`."""
    try:
        yield
    except BaseException as err:
        if type(err).__name__ != "PanicException":  # it cannot be imported
            raise
        raise UserError(
            f"the tokenizer does not work ({err!s:.100}): take tokenizer.json from a sound copy."
        ) from err


def _values(encoding: Encoding, name: str) -> list[int]:
    if name == "input_ids":
        return encoding.ids
    return encoding.attention_mask if name == "attention_mask" else encoding.type_ids


def _picture(raw: Raw) -> Path | Image.Image:
    if isinstance(raw, Path | Image.Image):
        return raw
    raise UserError(f"this model takes pictures, not text: given {_short(raw)}.")


def _text(raw: Raw) -> Text:
    if isinstance(raw, str):
        require_unicode(raw, "the text")
        return raw
    if isinstance(raw, tuple) and len(raw) == 2 and all(isinstance(part, str) for part in raw):
        for part in raw:
            require_unicode(part, "the text")
        return raw
    raise UserError(f"this model takes texts, or pairs of texts: given {_short(raw)}.")


def _short(raw: object) -> str:
    shown = repr(raw)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
