"""Loading encoders of transformers: a local folder, or `hf:NAME[@revision]` on the hub.

Text encoders, vision encoders, and one tower of image-text models (`backbone.tower`). Code that a
model brings along is never run.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mdpd_deploy.backbones import hf_pictures, hf_texts
from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.backbones.build import explaining, quiet_libraries, skeleton
from mdpd_deploy.backbones.declared import TEXT, declaration_of
from mdpd_deploy.backbones.drop_path import no_drop_path
from mdpd_deploy.backbones.family import (
    BACKBONES,
    Family,
    LoadRequest,
    folder_config,
    local_folder,
)
from mdpd_deploy.backbones.transformer import PictureTransformer, TextTransformer
from mdpd_deploy.backbones.weights import load_exactly, read_state
from mdpd_deploy.backbones.whole import WholePicture, WholeText
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.data.preprocess import Preprocess, TextPreprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.hub import cached_commit, check_hub

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOWERS = {"vision": ("vision_model", "vision_tower", "image_model"), "text": ("text_model",)}


@BACKBONES.register("transformers")
class TransformersFamily(Family):
    """transformers' encoders of texts or of pictures."""

    names = "hf:NAME[@revision], or a folder with a transformers config.json"

    @classmethod
    def matches(cls, config: BackboneConfig) -> bool:
        folder = local_folder(config.name)
        if folder is not None:
            return "model_type" in folder_config(folder)
        return config.name.startswith("hf:")

    @classmethod
    def load(cls, request: LoadRequest) -> tuple[Backbone, str | None]:
        config = request.config
        _refuse_options(config)
        source = _Source(config)
        preprocess = source.read_preprocess(request)
        if request.weights is not None:
            backbone = source.backbone(skeleton(source.build), preprocess)
            state = read_state(request.weights, "the run's backbone")
            load_exactly(backbone, state, str(request.weights))
        elif request.fake:
            backbone = source.backbone(skeleton(source.build), preprocess)
        elif config.pretrained:
            backbone = source.backbone(source.read_model(), preprocess)
        else:
            backbone = source.backbone(source.build(), preprocess)
        return backbone, source.revision


class _Source:
    """One model, in a folder or on the hub, read part by part with transformers' own loaders.

    Attributes:
        facts: The config of the whole model.
        tower: The part of it that is the backbone, `vision` or `text`; None for all of it.
        encoder: The config of the backbone.
    """

    def __init__(self, config: BackboneConfig) -> None:
        folder = local_folder(config.name)
        self.name = config.name
        self.option = f"backbone.name={config.name!r}"
        self.local = folder is not None
        self.revision: str | None = None
        if folder is not None:
            self.where = str(folder)
        else:
            self.where, _, revision = config.name.removeprefix("hf:").partition("@")
            if self.where.startswith((".", "/", "~")) or not self.where:
                raise UserError(
                    f"{self.option}: the folder {self.where or '(empty)'} does not exist."
                )
            self.revision = revision or None
            check_hub(self.where, ("config.json",), self.revision, self.option)
        self.facts = self._read_config()
        self.tower = self._tower(config.tower)
        part = None if self.tower is None else f"{self.tower}_config"
        self.encoder: PreTrainedConfig = self.facts if part is None else getattr(self.facts, part)
        self._check_encoder()
        if config.drop_path is not None:
            if not hasattr(self.encoder, "drop_path_rate"):
                raise no_drop_path(self.name)
            self.encoder.drop_path_rate = config.drop_path

    @property
    def arguments(self) -> dict[str, Any]:
        """What every loader of the library is given."""
        arguments: dict[str, Any] = {"trust_remote_code": False}
        return arguments if self.revision is None else arguments | {"revision": self.revision}

    @property
    def takes_text(self) -> bool:
        """Whether the backbone reads texts; else it reads pictures."""
        return _is_text(self.encoder)

    def read_preprocess(self, request: LoadRequest) -> Preprocess:
        """Read the tokenizer, or how pictures are prepared."""
        if self.takes_text:
            return hf_texts.read_preprocess(
                self.where, self.encoder, self.arguments, request, self.option
            )
        return hf_pictures.read_preprocess(self.where, self.arguments, self.option)

    def build(self) -> "PreTrainedModel":
        """Build the encoder with random weights."""
        from transformers import AutoModel

        with quiet_libraries():
            auto: Any = AutoModel  # untyped in transformers
            return self._part(
                auto.from_config(self.facts, dtype=torch.float32, **_pooler(self.facts))
            )

    def read_model(self) -> "PreTrainedModel":
        """Read the weights in fp32; every tensor of the encoder must be there."""
        from transformers import AutoModel

        mend = "Take its weights file (model.safetensors) from a sound copy."
        with quiet_libraries(), explaining(f"{self.option}: the weights cannot be read", mend):
            model, report = AutoModel.from_pretrained(
                self.where,
                config=self.facts,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in words of ours
                **_pooler(self.facts),
                **self.arguments,
            )
        encoder = self._part(model)
        prefix = next(f"{n}." if n else n for n, m in model.named_modules() if m is encoder)
        other = sorted(str(entry[0]) for entry in report["mismatched_keys"])
        if other:
            raise UserError(
                f"{self.option}: {len(other)} tensors of its weights file have another shape than "
                f"its config.json says, e.g. {other[0]}: the two do not belong together. {mend}"
            )
        absent = sorted(name for name in report["missing_keys"] if name.startswith(prefix))
        if absent:
            raise UserError(
                f"{self.option}: its weights file lacks {len(absent)} tensors of the encoder, "
                f"e.g. {absent[0]}: the weights are of another model. {mend}"
            )
        return encoder

    def backbone(self, model: "PreTrainedModel", preprocess: Preprocess) -> Backbone:
        """Put the encoder behind our interface."""
        declared = declaration_of(model.config)
        if not isinstance(preprocess, TextPreprocess):
            if declared is not None:
                return PictureTransformer(model, declared, preprocess, self.name)
            return WholePicture(model, preprocess, self.name)
        if declared is not None:
            return TextTransformer(model, declared, preprocess)
        tower = self.tower is not None or model.config.model_type.endswith("_text_model")
        return WholeText(model, preprocess, self.name, pooled=tower)

    def _read_config(self) -> "PreTrainedConfig":
        from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

        mend = "Name an encoder of the library transformers."
        with quiet_libraries(), explaining(f"{self.option} cannot be read", mend):
            if self.local:
                plain = folder_config(Path(self.where))
            else:
                plain, _ = PreTrainedConfig.get_config_dict(self.where, **self.arguments)
            kind = plain.get("model_type")
            if kind not in CONFIG_MAPPING:
                brings = "brings code of its own, which is never run here, for"
                raise UserError(
                    f"{self.option} {brings if 'auto_map' in plain else 'is of'} the model type "
                    f"{kind!r}, which the library transformers does not have: name a model of a "
                    "type that it has."
                )
            facts: PreTrainedConfig = AutoConfig.from_pretrained(self.where, **self.arguments)
        if getattr(facts, "use_cache", False):
            facts.use_cache = False  # a decoder would fill it again in the backward pass
        if not self.local:
            self.revision = cached_commit(self.where, ("config.json",), self.revision)
        return facts

    def _tower(self, wanted: str | None) -> str | None:
        if hasattr(self.facts, "vision_config") and hasattr(self.facts, "text_config"):
            return wanted or "vision"
        if wanted is not None:
            raise UserError(
                f"backbone.tower={wanted}: {self.option} is one encoder, not one for pictures and "
                "one for texts; leave the option out."
            )
        return None

    def _part(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return the tower of an image-text model, or a model that is no such."""
        if self.tower is None:
            return model
        for name in TOWERS[self.tower]:
            part = getattr(model, name, None)
            if part is not None:
                return part
        raise UserError(
            f"{self.option} ({self.facts.model_type}) has no {self.tower} encoder that stands "
            "alone: take an image-text model of two encoders, such as CLIP or SigLIP."
        )

    def _check_encoder(self) -> None:
        """Refuse types that are no encoder, and variants that declared blocks would not fit."""
        facts = self.encoder
        if _class_of(self.facts) is None or not (_is_text(facts) or _is_vision(facts)):
            raise UserError(
                f"{self.option} is of the model type {facts.model_type!r}, neither a text encoder "
                "that transformers classifies texts with, such as bert or modernbert, nor a vision "
                "encoder, such as dinov2 or siglip."
            )
        kind = getattr(facts, "position_embedding_type", None)
        if getattr(facts, "is_decoder", False) or (
            declaration_of(facts) is not None and kind not in (None, "absolute")
        ):
            raise UserError(
                f"{self.option} is no plain encoder (is_decoder="
                f"{getattr(facts, 'is_decoder', False)}, position_embedding_type={kind}): "
                "take an encoder with absolute positions."
            )


def _is_text(facts: "PreTrainedConfig") -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    kind = facts.model_type
    known = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    known &= {*MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}
    return kind in known or kind in TEXT or kind.endswith("_text_model")


def _is_vision(facts: "PreTrainedConfig") -> bool:
    """Tell whether a model of this config maps pictures, and nothing else, to features."""
    return getattr(_class_of(facts), "main_input_name", None) == "pixel_values"


def _class_of(facts: "PreTrainedConfig") -> Any:
    """Return the class that the library makes of a config; None where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    mapping: Any = MODEL_MAPPING  # untyped in transformers
    found = mapping.get(type(facts), None)
    return found[0] if isinstance(found, tuple) else found


def _pooler(facts: "PreTrainedConfig") -> dict[str, bool]:
    """Leave out a pooler that was trained for another task, where the model lets one."""
    takes = inspect.signature(_class_of(facts)).parameters
    own = facts.model_type in ("beit", "data2vec-vision")  # it holds their last norm
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes and not own else {}


def _refuse_options(config: BackboneConfig) -> None:
    for name in ("weights", "img_size", "patch_size"):
        if getattr(config, name) is not None:
            raise UserError(
                f"backbone.{name} does not apply to {config.name}, a model of transformers: "
                "leave it out."
            )
