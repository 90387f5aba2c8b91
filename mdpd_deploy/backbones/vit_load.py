"""Loading timm models: by timm name, from a local weights file or folder, or built in.

Names: `timm:NAME` (with `backbone.weights` a local weights file), `timm:OWNER/NAME[@revision]` on
the hub, `builtin:NAME`, or a folder whose config.json is timm's hub format (`architecture`,
`pretrained_cfg`) or ours (`timm_model`, `timm_kwargs`). Other picture or patch sizes resample the
position and patch embeddings with timm's own filter, for local weights as for downloaded ones.
"""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from mdpd_deploy.backbones.base import Backbone
from mdpd_deploy.backbones.build import explaining, quiet_libraries, skeleton
from mdpd_deploy.backbones.drop_path import check_drop_path, no_drop_path
from mdpd_deploy.backbones.family import (
    BACKBONES,
    Family,
    LoadRequest,
    folder_config,
    local_folder,
)
from mdpd_deploy.backbones.stages import StagesBackbone, is_staged
from mdpd_deploy.backbones.vit import VitBackbone, image_size, is_plain
from mdpd_deploy.backbones.weights import load_arrays, load_exactly, read_state
from mdpd_deploy.backbones.whole import WholeVision
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.hub import cached_commit, check_hub

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

ASSETS = Path(__file__).parents[1] / "assets"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "pytorch_model.pth")
MODULES = ("vision_transformer", "deit")  # timm's files that hold plain vision transformers
BODY = ("blocks.", "norm.", "norm_pre.", "patch_embed.", "pos_embed", "cls_token", "reg_token")


@BACKBONES.register("timm")
class TimmFamily(Family):
    """timm's models: plain vision transformers with their taps, every other one as a whole."""

    names = "builtin:NAME, timm:NAME, or a folder with a timm config.json"

    @classmethod
    def matches(cls, config: BackboneConfig) -> bool:
        if config.name.startswith(("timm:", "builtin:")):
            return True
        folder = local_folder(config.name)
        return folder is not None and bool(
            {"timm_model", "architecture"} & folder_config(folder).keys()
        )

    @classmethod
    def check(cls, config: BackboneConfig) -> None:
        _plan(config)

    @classmethod
    def load(cls, request: LoadRequest) -> tuple[Backbone, str | None]:
        config = request.config
        plan = _plan(config)
        if request.weights is not None:
            state = read_state(request.weights, "the run's backbone")
            model = skeleton(partial(_create, plan, _norm_place(plan, state, "model.")))
            backbone = _backbone(model, config)
            load_exactly(backbone, state, str(request.weights))
            return backbone, plan.revision
        if request.fake or not config.pretrained or plan.weights is not None:
            return _backbone(_local(plan, request), config), plan.revision
        model, commit = _download(plan, config)
        return _backbone(model, config), commit or plan.revision


def _backbone(model: nn.Module, config: BackboneConfig) -> Backbone:
    if is_plain(model):
        return VitBackbone(cast("VisionTransformer", model))
    if is_staged(model):
        return StagesBackbone(model, config.name)
    return WholeVision(model, config.name)


@dataclass(frozen=True)
class _Plan:
    """What to ask timm for.

    Attributes:
        model: The name for `timm.create_model`; `local-dir:` and `hf-hub:` included.
        kwargs: Arguments of the architecture, without None values.
        facts: Facts about the weights that replace timm's (picture size, mean, ...).
        weights: A local weights file; None downloads.
        revision: Of the hub repository, if named.
    """

    model: str
    kwargs: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    revision: str | None = None


def _plan(config: BackboneConfig) -> _Plan:
    asked = {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "drop_path_rate": config.drop_path,
    }
    kwargs = {name: value for name, value in asked.items() if value is not None}
    weights = None if config.weights is None else Path(config.weights).expanduser()
    scheme, _, rest = config.name.partition(":")
    if scheme == "timm":
        if "/" in rest and Path(rest).expanduser().is_dir():
            raise UserError(f"backbone.name: {rest} is a folder: name the folder without timm:.")
        if "/" in rest:
            revision = rest.partition("@")[2] or None
            return _Plan(f"hf-hub:{rest}", kwargs, weights=weights, revision=revision)
        _check_name(rest)
        return _Plan(rest, kwargs, weights=weights)
    folder = ASSETS / rest if scheme == "builtin" else local_folder(config.name)
    if folder is None or not folder.is_dir():
        raise unknown("backbone.name builtin", rest, [f.name for f in ASSETS.iterdir()])
    plain = folder_config(folder)
    weights = weights or _weights_of(folder)
    if "timm_model" not in plain:
        _check_name(str(plain["architecture"]))
        return _Plan(f"local-dir:{folder}", kwargs, weights=weights)
    _check_name(str(plain["timm_model"]))
    facts = {name: plain[name] for name in _FACTS if name in plain}
    facts.setdefault("crop_pct", 1.0)
    own = dict(plain.get("timm_kwargs", {}))
    return _Plan(str(plain["timm_model"]), own | kwargs, facts, weights)


_FACTS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def _weights_of(folder: Path) -> Path:
    """Return a folder's weights file, or the one it lacks, so that reading it names it."""
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    return found[0] if found else folder / WEIGHT_FILES[0]


def _check_name(name: str) -> None:
    """Refuse a timm model that is unknown, before any download."""
    import timm

    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), n=3)
        hint = (
            f"Near: {', '.join(near)}." if near else "`timm.list_models()` names those there are."
        )
        raise UserError(f"backbone.name: timm has no model {name!r}. {hint}")


def _create(
    plan: _Plan, norm: Mapping[str, Any] | None = None, *, pretrained: bool = False
) -> nn.Module:
    import timm

    facts, kwargs = dict(plan.facts), {**plan.kwargs, **(norm or {}), "num_classes": 0}
    with (
        quiet_libraries(),
        explaining(
            f"backbone.name: timm cannot build {plan.model}",
            "Check the name, backbone.img_size and backbone.patch_size.",
        ),
    ):
        make = partial(timm.create_model, plan.model, pretrained=pretrained)
        try:
            return make(pretrained_cfg_overlay=facts or None, **kwargs)
        except TypeError as err:
            if "drop_path_rate" in str(err):
                raise no_drop_path(plan.model) from err
            if "img_size" not in str(err):
                raise
        size = kwargs.pop("img_size")  # a convolutional network takes any
        facts["input_size"] = (3, size, size)
        return make(pretrained_cfg_overlay=facts, **kwargs)


def _local(plan: _Plan, request: LoadRequest) -> nn.Module:
    config = request.config
    if request.fake:
        return _checked(skeleton(partial(_create, plan)), config)
    if not config.pretrained:
        return _checked(_create(plan), config)
    assert plan.weights is not None
    if plan.weights.suffix == ".npz":
        model = _checked(skeleton(partial(_create, plan)), config)
        load_arrays(model, plan.weights, config.name)
        return model
    state = read_state(plan.weights, "backbone.weights" if config.weights else "backbone.name")
    model = _checked(skeleton(partial(_create, plan, _norm_place(plan, state))), config)
    _load_filtered(model, state, config.name, plan.weights)
    return model


def _download(plan: _Plan, config: BackboneConfig) -> tuple[nn.Module, str | None]:
    """Load a hub model with timm's own loader; return it with its commit.

    Everything that can be refused is refused before the weights are fetched.
    """
    option = f"backbone.name={config.name!r}"
    if plan.model.startswith("hf-hub:"):
        repo = plan.model.removeprefix("hf-hub:").partition("@")[0]
        check_hub(repo, ("config.json",), plan.revision, option)
    model = _checked(skeleton(partial(_create, plan)), config)
    source: dict[str, Any] = vars(model)["pretrained_cfg"]
    repo = str(source.get("hf_hub_id") or "").partition("@")[0]
    if not (repo or source.get("url")):
        raise UserError(
            f"{option} has no published weights: name another model, give backbone.weights a "
            "local file, or set backbone.pretrained=false."
        )
    if not repo:
        return _create(plan, pretrained=True), None
    file = source.get("hf_hub_filename")
    files = (str(file),) if file else WEIGHT_FILES
    check_hub(repo, files, plan.revision, option)
    model = _create(plan, pretrained=True)
    return model, cached_commit(repo, files, plan.revision)


def _checked(model: nn.Module, config: BackboneConfig) -> nn.Module:
    """Refuse models that do not fit, and picture sizes that would lose pixels at the edge."""
    check_drop_path(model, config)
    facts: Any = model
    channels = facts.pretrained_cfg["input_size"][0]
    if channels != 3:
        raise UserError(f"backbone.name: {config.name} takes {channels} channels instead of 3.")
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    size = image_size(model)
    known = is_plain(model) or is_staged(model)
    if known and any(pixels % edge for pixels, edge in zip(size, patch, strict=True)):
        raise UserError(
            f"backbone.img_size={size[0]} is no multiple of the patch size {patch[0]}: choose "
            f"{max(size[0] // patch[0], 1) * patch[0]} or {(size[0] // patch[0] + 1) * patch[0]}."
        )
    return model


def _norm_place(plan: _Plan, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, bool]:
    """Return a plain transformer's `fc_norm` as the weights have it; empty where none tells."""
    from timm.models import is_model_in_modules

    before, after = (f"{prefix}{name}.weight" in state for name in ("norm", "fc_norm"))
    known = ":" in plan.model or is_model_in_modules(plan.model.partition(".")[0], MODULES)
    return {"fc_norm": after} if known and before != after else {}


def _load_filtered(model: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Fit foreign weights with timm's filter and load them; every tensor must be found.

    Heads and decoders are left out; a left-over tensor of a transformer itself is an error,
    because it means that the weights belong to another architecture.
    """
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    takes = () if fit is None else inspect.signature(fit).parameters
    resample: dict[str, Any] = {"adapt_layer_scale": True} if "adapt_layer_scale" in takes else {}
    if "flexi" in name:
        resample |= {"interpolation": "bilinear", "antialias": False}
    with (
        quiet_libraries(),
        explaining(f"{path} does not fit {name}", "Check that name and weights belong together."),
    ):
        fitted = state if fit is None else fit(state, model, **resample)
    wanted = model.state_dict().keys()
    kept = {key: t for key, t in fitted.items() if key in wanted or key.startswith(BODY)}
    load_exactly(model, kept, f"{path} ({name})")
