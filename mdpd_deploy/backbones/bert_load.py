"""Loading BERT-family encoders: a local folder, or `hf:NAME[@revision]` on the hub."""

import inspect
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.backbones.bert import LAYOUTS, BertBackbone
from mdpd_deploy.backbones.build import explaining, quiet_libraries, skeleton
from mdpd_deploy.backbones.family import (
    BACKBONES,
    Family,
    LoadRequest,
    folder_config,
    local_folder,
)
from mdpd_deploy.backbones.weights import load_exactly, read_state
from mdpd_deploy.backbones.whole import WholeText
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.data.preprocess import TextPreprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.hub import cached_commit, check_hub

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@BACKBONES.register("bert")
class BertFamily(Family):
    """transformers' BERT, RoBERTa, XLM-RoBERTa, MiniLM and DistilBERT."""

    names = "hf:NAME[@revision], or a folder with a transformers config.json"

    @classmethod
    def matches(cls, config: BackboneConfig) -> bool:
        folder = local_folder(config.name)
        if folder is not None:
            return "model_type" in folder_config(folder)
        return config.name.startswith("hf:")

    @classmethod
    def load(cls, request: LoadRequest) -> tuple[Backbone, str | None]:
        _refuse_vision_options(request.config)
        source = _Source(request.config)
        facts = source.read_config()
        preprocess = source.read_tokenizer(facts, request)
        build = partial(_build, facts)
        if request.weights is not None:
            backbone = _backbone(skeleton(build), preprocess, request.config)
            state = read_state(request.weights, "the run's backbone")
            load_exactly(backbone, state, str(request.weights))
        elif request.fake:
            backbone = _backbone(skeleton(build), preprocess, request.config)
        elif request.config.pretrained:
            backbone = _backbone(source.read_model(facts), preprocess, request.config)
        else:
            backbone = _backbone(build(), preprocess, request.config)
        return backbone, source.revision


def _backbone(
    model: "PreTrainedModel", preprocess: TextPreprocess, config: BackboneConfig
) -> Backbone:
    if model.config.model_type in LAYOUTS:
        return BertBackbone(model, preprocess)
    return WholeText(model, preprocess, config.name)


class _Source:
    """One model, in a folder or on the hub, read part by part with transformers' own loaders."""

    def __init__(self, config: BackboneConfig) -> None:
        folder = local_folder(config.name)
        self.option = f"backbone.name={config.name!r}"
        self.local = folder is not None
        self.revision: str | None = None
        if folder is not None:
            self.where = str(folder)
            return
        self.where, _, revision = config.name.removeprefix("hf:").partition("@")
        if self.where.startswith((".", "/", "~")) or not self.where:
            raise UserError(f"{self.option}: the folder {self.where or '(empty)'} does not exist.")
        self.revision = revision or None
        check_hub(self.where, ("config.json",), self.revision, self.option)

    @property
    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"trust_remote_code": False}
        return arguments if self.revision is None else arguments | {"revision": self.revision}

    def read_config(self) -> "PreTrainedConfig":
        """Read the architecture; refuse types and variants that the blocks would not fit."""
        from transformers import AutoConfig

        mend = "Name a text encoder of the library transformers."
        if self.local:
            _check_type(folder_config(Path(self.where)).get("model_type"), self.option)
        with quiet_libraries(), explaining(f"{self.option} cannot be read", mend):
            facts: PreTrainedConfig = AutoConfig.from_pretrained(self.where, **self._arguments)
        _check_type(facts.model_type, self.option)
        if not self.local:
            self.revision = cached_commit(self.where, ("config.json",), self.revision)
        kind = getattr(facts, "position_embedding_type", None)
        if getattr(facts, "is_decoder", False) or (
            facts.model_type in LAYOUTS and kind not in (None, "absolute")
        ):
            raise UserError(
                f"{self.option} is no plain encoder (is_decoder="
                f"{getattr(facts, 'is_decoder', False)}, position_embedding_type={kind}): "
                "take an encoder with absolute positions."
            )
        return facts

    def read_tokenizer(self, facts: "PreTrainedConfig", request: LoadRequest) -> TextPreprocess:
        """Read the tokenizer and check it against the embeddings."""
        from transformers import AutoTokenizer

        mend = "Give the folder its tokenizer.json and tokenizer_config.json."
        with quiet_libraries(), explaining(f"{self.option}: no tokenizer can be read", mend):
            tokenizer = AutoTokenizer.from_pretrained(self.where, **self._arguments)
        fast = getattr(tokenizer, "backend_tokenizer", None)
        if fast is None or tokenizer.pad_token_id is None:
            raise UserError(
                f"{self.option}: the tokenizer has no fast form or no padding token. {mend}"
            )
        if not len(tokenizer.all_special_tokens) < len(tokenizer) <= facts.vocab_size:
            raise UserError(
                f"{self.option}: the tokenizer has {len(tokenizer)} tokens, the model "
                f"{facts.vocab_size}: they do not belong together. {mend}"
            )
        _check_length(facts, request.max_length, self.option)
        _check_settings(tokenizer, request.max_length, self.option)
        fast.enable_truncation(request.max_length, direction=tokenizer.truncation_side)
        segments = getattr(facts, "type_vocab_size", 0) > 1
        segments = segments and "token_type_ids" in tokenizer.model_input_names
        names = ("input_ids", "attention_mask", *(["token_type_ids"] if segments else []))
        return TextPreprocess(
            tokenizer=fast,
            input_names=names,
            max_length=request.max_length,
            pad_id=tokenizer.pad_token_id,
            pad=request.pad,
        )

    def read_model(self, facts: "PreTrainedConfig") -> "PreTrainedModel":
        """Read the weights in fp32; every tensor of the encoder must be there."""
        from transformers import AutoModel

        mend = "Take its weights file (model.safetensors) from a sound copy."
        with quiet_libraries(), explaining(f"{self.option}: the weights cannot be read", mend):
            model: PreTrainedModel
            model, report = AutoModel.from_pretrained(
                self.where,
                config=facts,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in words of ours
                **_pooler(facts),
                **self._arguments,
            )
        other = sorted(str(entry[0]) for entry in report["mismatched_keys"])
        if other:
            raise UserError(
                f"{self.option}: {len(other)} tensors of its weights file have another shape than "
                f"its config.json says, e.g. {other[0]}: the two do not belong together. {mend}"
            )
        absent = sorted(report["missing_keys"])
        if absent:
            raise UserError(
                f"{self.option}: its weights file lacks {len(absent)} tensors of the encoder, "
                f"e.g. {absent[0]}: the weights are of another model. {mend}"
            )
        return model


def _build(facts: "PreTrainedConfig") -> "PreTrainedModel":
    from transformers import AutoModel

    with quiet_libraries():
        auto: Any = AutoModel  # untyped in transformers
        model: PreTrainedModel = auto.from_config(facts, dtype=torch.float32, **_pooler(facts))
        return model


def _pooler(facts: "PreTrainedConfig") -> dict[str, bool]:
    """Leave the pooler out where the model lets one."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    mapping: Any = MODEL_MAPPING  # untyped in transformers
    takes = inspect.signature(mapping[type(facts)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def _check_type(model_type: object, option: str) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    encoders = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *LAYOUTS}
    if model_type not in encoders & {*MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, *LAYOUTS}:
        raise UserError(
            f"{option} is of the model type {model_type!r}, no text encoder that transformers "
            f"classifies texts with, such as {', '.join(LAYOUTS)}, modernbert or deberta-v2; vision "
            "models load as timm:NAME."
        )


def _check_length(facts: "PreTrainedConfig", max_length: int, option: str) -> None:
    positions = getattr(facts, "max_position_embeddings", None) or max_length
    layout = LAYOUTS.get(facts.model_type)
    if layout is not None and layout.offset:
        positions -= facts.pad_token_id + 1
    if max_length > positions > 0:
        raise UserError(
            f"data.max_length={max_length} is more than the {positions} positions of "
            f"{option}: choose at most {positions}."
        )


def _check_settings(tokenizer: Any, max_length: int, option: str) -> None:
    """Refuse settings of the tokenizer that its fast form, which is all we keep, cannot carry."""
    own = tokenizer.model_max_length
    if own is not None and max_length > own:
        raise UserError(
            f"data.max_length={max_length} is more than the {own} tokens that {option} was made for "
            f"(model_max_length of its tokenizer): choose at most {own}."
        )
    strategy = tokenizer.init_kwargs.get("truncation_strategy", "longest_first")
    for name, value, kept in (
        ("padding_side", tokenizer.padding_side, "right"),
        ("split_special_tokens", tokenizer.split_special_tokens, False),
        ("truncation_strategy", strategy, "longest_first"),
    ):
        if value != kept:
            raise UserError(
                f"{option}: its tokenizer has {name}={value!r}, and texts are prepared with "
                f"{kept!r} here: set it so in tokenizer_config.json of a local copy."
            )


def _refuse_vision_options(config: BackboneConfig) -> None:
    for name in ("weights", "img_size", "patch_size"):
        if getattr(config, name) is not None:
            raise UserError(
                f"backbone.{name} does not apply to the text model {config.name}: leave it out."
            )
