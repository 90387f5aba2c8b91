"""Backbones: frozen encoders of any library behind one interface (`Backbone`).

Nothing outside this package knows which library a backbone comes from. A new family is one file
that registers its `Family`, and one line in `load.py`.
"""

from mdpd_deploy.backbones.base import Backbone, BackboneSource, Inputs, weights_sha256
from mdpd_deploy.backbones.card import Card, card_of
from mdpd_deploy.backbones.family import BACKBONES, Family, LoadRequest
from mdpd_deploy.backbones.load import check_backbone, load_backbone

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneSource",
    "Card",
    "Family",
    "Inputs",
    "LoadRequest",
    "card_of",
    "check_backbone",
    "load_backbone",
    "weights_sha256",
]
