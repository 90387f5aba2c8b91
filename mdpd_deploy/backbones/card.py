"""What a user should know of a backbone before training it: what it sees, and under which licence."""

import re
from dataclasses import dataclass
from pathlib import Path

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.backbones.family import folder_config, local_folder
from mdpd_deploy.backbones.vit_load import ASSETS
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.data.preprocess import ImagePreprocess
from mdpd_deploy.errors import printable

BUILTIN = "builtin:"
UNKNOWN = "not stated in the files: see where the weights come from"
RANDOM = "random, no pretraining"
LONGEST = 160  # characters of a licence
HEAD = 4096  # bytes of a README whose front matter is looked at


@dataclass(frozen=True)
class Card:
    """What training says of its backbone at the start, in the plan and in the report.

    Attributes:
        name: As the user named it; of a folder, its last part.
        sees: What every input becomes, e.g. `pictures of 32 × 32 pixels`.
        licence: Of the weights, as far as their files or timm say it.
        advice: A sentence for whoever trains on own data with a backbone made for trying out.
    """

    name: str
    sees: str
    licence: str
    advice: str | None

    @property
    def words(self) -> str:
        """All of it but the advice, on one line."""
        return f"backbone {self.name} · sees {self.sees} · weights: {self.licence}"


def card_of(backbone: Backbone, config: BackboneConfig) -> Card:
    """Return the card of a loaded backbone."""
    folder = _folder(config)
    name = folder.name if folder is not None and ":" not in config.name else config.name
    sees = _sees(backbone)
    advice = None
    if config.name.startswith(BUILTIN):
        advice = (
            f"{name} is built in, for trying out: it sees {sees}, and its weights were trained on "
            "pictures for non-commercial use; for real work name another, e.g. "
            "--backbone timm:vit_base_patch16_224."
        )
    return Card(name, sees, _licence(backbone, config, folder), advice)


def _sees(backbone: Backbone) -> str:
    preprocess = backbone.preprocess
    if isinstance(preprocess, ImagePreprocess):
        height, width = preprocess.size
        return f"pictures of {height} × {width} pixels"
    return f"at most {preprocess.max_length} tokens of a text (data.max_length)"


def _folder(config: BackboneConfig) -> Path | None:
    if config.name.startswith(BUILTIN):
        return ASSETS / config.name.removeprefix(BUILTIN)
    return local_folder(config.name)


def _licence(backbone: Backbone, config: BackboneConfig, folder: Path | None) -> str:
    if not config.pretrained:
        return RANDOM
    if config.weights is not None:
        return UNKNOWN
    found = _of_timm(backbone) if folder is None else _of_folder(folder)
    return printable(found)[:LONGEST] if found else UNKNOWN


def _of_timm(backbone: Backbone) -> str | None:
    facts = getattr(getattr(backbone, "model", None), "pretrained_cfg", None)
    found = facts.get("license") if isinstance(facts, dict) else None
    return found if isinstance(found, str) else None


def _of_folder(folder: Path) -> str | None:
    """Return what config.json says, or the front matter of a README as model hubs keep it."""
    plain = folder_config(folder)
    inner = plain.get("pretrained_cfg")
    for facts in (plain, inner if isinstance(inner, dict) else {}):
        if isinstance(facts.get("license"), str):
            return str(facts["license"])
    try:
        with (folder / "README.md").open("rb") as stream:
            text = stream.read(HEAD).decode("utf-8", errors="replace")
    except OSError:
        return None
    head = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    line = re.search(r"^license: *(\S.*)$", head.group(1), flags=re.MULTILINE) if head else None
    return line.group(1).strip() if line else None
