"""Lists of methods: every word, and a config that each method accepts."""

import pytest

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import Config, SideConfig, check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.sides import SIDES, build_side, other_side
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train import Entry, apply_entry, default_entries, parse_entry
from mdpd_deploy.train.methods import METHODS, build_method

# An option of every kind that some method or side network ignores.
OPTIONS = {
    "method": "mdpd",
    "side": {"name": "sherl", "reduction": 4, "late_layers": 2, "variant": "paper"},
    "distill": {"mask_ratio": 0.25},
    "loss": {"deep": 1e-3, "logits_form": "kl", "temperature": 3.0},
    "train": {"norm_grad": "late:1", "student_task_weight": 0.5},
    "optim": {"norm_lr": 1e-4, "head_lr": 1e-4},
}


@pytest.mark.parametrize(
    ("word", "entry"),
    [
        ("probe", Entry("probe")),
        ("mdpd", Entry("mdpd", "unipt")),
        ("mdpd:sherl", Entry("mdpd", "sherl")),
        ("mdpd:dtl", Entry("mdpd", "dtlv1")),
        ("side:lst", Entry("side", "lst")),
        ("side", Entry("side", "unipt")),
        ("unipt", Entry("side", "unipt")),
        ("dtl", Entry("side", "dtlv1")),
        (" side : lst ", Entry("side", "lst")),
    ],
)
def test_words(word, entry):
    assert parse_entry(word) == entry


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("unipd", r"unknown 'unipd'. Did you mean 'unipt'\? Choose one of: .*probe.*unipt"),
        ("mpdp:unipt", r"method .*unknown 'mpdp'. Did you mean 'mdpd'\?"),
        ("mdpd:unipd", r"side.name .*unknown 'unipd'. Did you mean 'unipt'\?"),
        ("mdpd:", "side.name .*unknown ''"),
        ("probe:unipt", "probe:unipt: the method probe has no side network; write probe"),
        ("", "unknown ''"),
    ],
)
def test_wrong_words(word, message):
    with pytest.raises(UserError, match=message):
        parse_entry(word)


def test_the_default_list_holds_every_method_and_side_network():
    entries = default_entries()
    assert {entry.method for entry in entries} == set(METHODS)
    assert {entry.side for entry in entries} == {None, *SIDES}
    assert [parse_entry(entry.label) for entry in entries] == entries
    assert len(set(entries)) == len(entries)


@pytest.mark.parametrize("name", SIDES)
def test_which_side_networks_have_features(name, tiny_vit):
    backbone = load_backbone(check_config({"backbone": {"name": str(tiny_vit)}}).backbone)
    side = build_side(backbone, other_side(SideConfig(reduction=2), name))
    assert SIDES[name].has_features == bool(side.feature_layers)


@pytest.mark.parametrize("label", [entry.label for entry in default_entries()])
def test_one_config_serves_every_method(label, tiny_vit, tiny_bert):
    folder = tiny_bert if label == "prefix" else tiny_vit  # which pictures do not have
    base = check_config(OPTIONS | {"backbone": {"name": str(folder)}, "task": "classify"})
    entry = parse_entry(label)
    config = apply_entry(base, entry)
    backbone = load_backbone(config.backbone, max_length=24)
    assert build_method(backbone, Classify.numbered(3), config)
    assert config.method == entry.method
    assert config.side.name == (entry.side or SideConfig().name)
    assert (config.backbone, config.task) == (base.backbone, base.task)
    assert check_config(config.model_dump()) == config


def test_what_a_method_reads_stays_and_the_rest_is_reset():
    base = check_config(OPTIONS)
    assert apply_entry(base, Entry("mdpd", "sherl")) == base
    norms = apply_entry(base, Entry("norms"))
    assert (norms.train, norms.optim) == (
        base.train.model_copy(update={"student_task_weight": 1.0}),
        base.optim,
    )
    assert (norms.side, norms.distill, norms.loss) == (
        Config().side,
        Config().distill,
        Config().loss,
    )
    lst = apply_entry(base, Entry("side", "lst"))
    assert lst.side == SideConfig(name="lst", reduction=4)
    assert lst.optim.head_lr is None
    assert apply_entry(base, Entry("mdpd", "unipt")).side.variant == "paper"
