"""Several tasks on one input: equal to separate models, with the plain blocks run once."""

import pytest
import torch

from mdpd_deploy import fit
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig, SideConfig
from mdpd_deploy.errors import UserError
from mdpd_deploy.model import WithSide
from mdpd_deploy.serve.shared import SharedTasks, load_shared
from mdpd_deploy.sides import SIDES, build_side, other_side
from mdpd_deploy.tasks.head import Head


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_shared_tasks_equal_separate_models(kind, tiny_vit, tiny_bert):
    folder = tiny_vit if kind == "vit" else tiny_bert
    models = []
    for seed, name in enumerate(sorted(SIDES)):
        torch.manual_seed(seed)
        backbone = load_backbone(BackboneConfig(name=str(folder)), max_length=24)
        side = build_side(backbone, other_side(SideConfig(reduction=2), name))
        for parameter in side.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        models.append(WithSide(backbone, side, Head(backbone.width, seed + 2)).eval())
    inputs = list(models[0].backbone.example_inputs(3, 9).values())
    with torch.no_grad():
        expected = [model(*inputs) for model in models]
        shared = SharedTasks(models, sorted(SIDES)).eval()
        found = shared(*inputs)
    assert list(found) == sorted(SIDES)
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_plain_blocks_run_once_whatever_the_number_of_tasks(tiny_vit):
    backbone = load_backbone(BackboneConfig(name=str(tiny_vit)))
    sides = [build_side(backbone, SideConfig(name="dtlv1")) for _ in range(4)]
    shared = SharedTasks([WithSide(backbone, side, Head(32, 2)) for side in sides]).eval()
    ran = []
    for index, block in enumerate(backbone.blocks()):
        block.attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        shared(*backbone.example_inputs(2).values())
    assert ran == [0, 1] + [2] * 4  # M = 2 of 3 blocks


def test_runs_of_side_networks_are_loaded_and_others_refused(
    tmp_path, tiny_side_run, tiny_run, image_options
):
    other = fit(
        out=tmp_path / "dtl", method="side", side="dtl", quiet=True, **{**image_options, "steps": 1}
    )
    shared = load_shared([tiny_side_run, other])
    arrays = tiny_side_run.load_deployed().backbone.example_inputs(2)
    with torch.no_grad():
        found = shared(*arrays.values())
        for run in (tiny_side_run, other):
            expected = run.load_deployed()(*arrays.values())
            torch.testing.assert_close(found[run.path.name], expected)
    with pytest.raises(UserError, match="tunes the backbone itself"):
        load_shared([tiny_side_run, tiny_run])
    with pytest.raises(UserError, match="two runs are named side"):
        load_shared([tiny_side_run, Run.open(tiny_side_run.path)])
    with pytest.raises(UserError, match="name at least one"):
        load_shared([])
