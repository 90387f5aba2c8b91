"""What can differ on a card: exactness, dropout, bfloat16, a whole run and its bundle.

`CHECK_DEVICE=cpu` runs the same on the processor, so that a short time on a card is not lost to a
mistake that any machine would have shown.
"""

import copy
import os

import numpy as np
import pytest
import torch
from packaging.version import Version

from mdpd_deploy import export_run, fit
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig, load_config
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.methods import Batch, build_method

DEVICE = os.environ.get("CHECK_DEVICE", "cuda")
torch_is_old = Version(torch.__version__) < Version("2.15")  # cannot trace every model
absent = DEVICE == "cuda" and not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(absent, reason="needs a CUDA device")]


@pytest.fixture(params=["vit", "bert", "swin"])
def backbone(request, tiny_vit, tiny_bert, staged_folder):
    folder = {"vit": tiny_vit, "bert": tiny_bert}.get(request.param) or staged_folder("swin")
    return load_backbone(BackboneConfig(name=str(folder)), max_length=24)


def gradients(backbone, method, *sets):
    """Return the gradient of every trained tensor and the losses of one step on the device."""
    config = load_config(
        None, {"method": method}, ["side.reduction=2", *sets] if method == "mdpd" else sets
    )
    torch.manual_seed(0)
    built = build_method(copy.deepcopy(backbone), Classify.numbered(3), config)
    built.backbone.to(DEVICE)
    built.modules.to(DEVICE)
    built.train_mode()
    torch.manual_seed(3)
    inputs = {name: t.to(DEVICE) for name, t in built.backbone.example_inputs(4, 9).items()}
    batch = Batch(inputs, (torch.arange(4) % 3).to(DEVICE), np.arange(4), 1, 4.0, 4.0)
    torch.manual_seed(5)
    losses = built.step(batch)
    found = {
        name: parameter.grad for group in built.groups.values() for name, parameter in group.items()
    }
    return found, losses


@pytest.mark.parametrize("method", ["norms", "mdpd"])
@pytest.mark.parametrize("mode", ["recompute", "recompute-halves"])
def test_recomputed_gradients_are_those_of_plain_back_propagation(backbone, method, mode):
    plain, losses = gradients(backbone, method, "train.norm_grad=full")
    exact, same = gradients(backbone, method, f"train.norm_grad={mode}")
    assert set(plain) == set(exact) and len(plain) > 10
    for name, gradient in plain.items():
        torch.testing.assert_close(exact[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert float(same["loss"]) == pytest.approx(float(losses["loss"]), rel=1e-5)


def test_held_weights_in_bfloat16_give_the_gradient_nearly(backbone):
    plain, _ = gradients(backbone, "norms")
    held, _ = gradients(backbone, "norms", "train.precision=bf16")
    whole, near = (
        torch.cat([found[name].flatten().float() for name in plain]) for found in (plain, held)
    )
    assert torch.nn.functional.cosine_similarity(near, whole, dim=0) > 0.95


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_and_exports(tmp_path, precision):
    run = fit(
        task="digits", device=DEVICE, steps=60, out=tmp_path / "run", quiet=True,
        set=["train.eval_every=60", f"train.precision={precision}"],
    )  # fmt: skip
    assert run.summary["device"].startswith(DEVICE)
    assert run.summary["metrics"]["deployed"]["accuracy"] > 0.5  # ten classes
    if torch_is_old:
        pytest.skip("trained; exporting needs torch 2.15, which the project asks for")
    bundle = export_run(run.path, out=tmp_path / "bundle")
    assert (bundle.path / "manifest.json").is_file()
