"""The options that make MDPD's objective the paper's, against an own derivation in plain torch.

And how much of the logits distillation is felt: measured, shown, and without a trace in training.
"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.backbones.layout import Layout
from mdpd_deploy.commands.train import plan
from mdpd_deploy.config import (
    FORMER_DEFAULTS,
    BackboneConfig,
    Config,
    DistillConfig,
    LossConfig,
    load_config,
)
from mdpd_deploy.distill import FeatureDistiller, Generator
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify, Regress
from mdpd_deploy.train.cautions import felt_caution
from mdpd_deploy.train.memory.forecast import forecast
from mdpd_deploy.train.memory.live import measure_peak
from mdpd_deploy.train.methods import METHODS, Batch, build_method
from mdpd_deploy.train.methods.base import check_options
from mdpd_deploy.train.methods.mdpd import MDPD

PAPER = {
    "train.student_task_weight": 0,
    "train.turns": "alternate",
    "distill.side_head": "paper",
    "distill.gen_conv": "full",
    "distill.share_phi": True,
    "distill.share_gen": True,
    "distill.phi_logits": True,
    "distill.mask_tokens": "all",
    "distill.last_layer": True,
    "optim.clip": None,
    "loss.logits_form": "mse",
    "loss.logits_where": "all",
}
WEIGHTS = {  # large enough to be seen
    "loss.logits": 0.3, "loss.shallow": 2e-3, "loss.deep": 3e-3,
    "loss.logits_form": "mse", "loss.logits_where": "all",
}  # fmt: skip


@pytest.fixture(params=["vit", "bert"])
def backbone(request, tiny_vit, tiny_bert):
    name = tiny_vit if request.param == "vit" else tiny_bert
    loaded = load_backbone(BackboneConfig(name=str(name)), max_length=24)
    for parameter in loaded.parameters():
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(1)
        )
    return loaded


def make(backbone, side="unipt", *, start=False, **sets):
    options = {"side.name": side, "side.reduction": 2, "backbone.dropout_active": False, **sets}
    lines = [f"{name}={'null' if value is None else value}" for name, value in options.items()]
    config = load_config(None, {"method": "mdpd"}, lines)
    torch.manual_seed(0)
    method = build_method(copy.deepcopy(backbone), Classify.numbered(3), config)
    method.train_mode()
    if start:
        return method
    for module in method.modules.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for parameter in method.modules.parameters():  # no gradient is 0 by symmetry
        parameter.data += 0.05 * torch.randn_like(parameter)
    return method


def batch_for(backbone, step=0):
    torch.manual_seed(3)
    inputs = backbone.example_inputs(4, 9)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 6:] = 0
    return Batch(inputs, torch.arange(4) % 3, np.arange(4), step, 4.0, 4.0)


def gradients(method, *batches):
    for group in method.groups.values():
        for parameter in group.values():
            parameter.grad = None
    losses = [method.step(batch) for batch in batches]
    return losses, {
        name: None if p.grad is None else p.grad.clone()
        for group in method.groups.values()
        for name, p in group.items()
    }


# --- the derivation: equations 1-7 with autograd alone ----------------------------------------


def convolve(x, first, second, grid, keep):
    """G of one sequence of tokens [B, n, C] by sums over the kernel, without any convolution."""

    def conv(x, layer):
        weight, out = layer.weight, layer.bias.expand(*x.shape[:2], -1).clone()
        full = weight if weight.shape[1] > 1 else torch.diag_embed(weight[:, 0].movedim(0, -1))
        full = full if weight.shape[1] > 1 else full.movedim((-2, -1), (0, 1))
        rows, columns = grid or (1, x.shape[1])
        for n in range(x.shape[1]):
            r, c = divmod(n, columns)
            for dr in (-1, 0, 1) if grid else (0,):
                for dc in (-1, 0, 1):
                    if 0 <= r + dr < rows and 0 <= c + dc < columns:
                        kernel = full[:, :, dr + 1, dc + 1] if grid else full[:, :, dc + 1]
                        source = (r + dr) * columns + c + dc
                        out[:, n] = out[:, n] + x[:, source] @ kernel.T
        return out

    x = conv(x if keep is None else x * keep, first).relu()
    return conv(x if keep is None else x * keep, second)


def derived(method, batch):
    """Return (side loss, backbone loss) of the paper's objective, each with its own graph."""
    config, backbone, distiller = method.config, method.backbone, method.distiller
    own, depth = config.distill, backbone.depth
    taps = [tap.detach() for tap in backbone.trace(batch.inputs).taps]
    mask = backbone.token_mask(batch.inputs)
    real = torch.ones(taps[0].shape[:2]) if mask is None else mask
    hidden = distiller.draw_mask(batch.keys, taps[0].shape[1], config.train.seed, batch.step)
    output = method.side_forward(backbone.trace(batch.inputs), True)
    s = output.features | {depth: output.features.get(depth, output.tokens)}
    layers = [n for n in range(1, depth + 1) if own.last_layer or n in output.features]
    half = -(-len(layers) // 2)
    prefix, grid = backbone.layouts[-1].prefix, backbone.layouts[-1].grid
    side_loss = 0.0
    for place, layer in enumerate(layers):
        key = f"shared {s[layer].shape[-1]} {backbone.width}" if own.share_phi else str(layer)
        phi = distiller.phi[key]
        down = s[layer] @ phi.down.weight.T + phi.down.bias
        up = lambda x, phi=phi: x @ phi.up.weight.T + phi.up.bias
        if place < half:
            error = (taps[layer] - up(down)).square().sum(-1)
            side_loss = side_loss + config.loss.shallow * (error * real).sum() / 4
            continue
        inside = down if own.gen_conv == "full" else up(down)
        width = inside.shape[-1]
        gen = distiller.gen[f"shared {width} {grid}" if own.share_gen else str(layer)]
        seen = torch.where(hidden[..., None] > 0, distiller.mask_token[str(width)], inside)
        keep = None if mask is None else mask[..., None].to(seen.dtype)
        made = convolve(seen[:, prefix:], gen.first, gen.second, grid, keep)
        alone = seen[:, :prefix]
        if own.mask_tokens == "all":
            tokens = [
                convolve(alone[:, [i]], gen.first, gen.second, (1, 1), None) for i in range(prefix)
            ]
            alone = torch.cat(tokens, 1) if tokens else alone
        made = torch.cat([alone, made], 1)
        made = up(made) if own.gen_conv == "full" else made
        error = (taps[layer] - made).square().sum(-1) * hidden * real
        side_loss = side_loss + config.loss.deep * error.sum() / 4

    def mean(x):
        weight = real[:, prefix:, None].to(x.dtype)
        return (x[:, prefix:] * weight).sum(1) / weight.sum(1)

    linear = method.modules["side_head"].linear
    pooled = mean(
        s[depth] if own.side_head == "paper" else backbone.normalise(output.tokens, blocked=True)
    )
    teacher = pooled @ linear.weight.T + linear.bias
    side_loss = side_loss + F.cross_entropy(teacher, batch.labels)
    top = backbone.trace(batch.inputs).ends[-1]  # a graph that keeps everything
    linear = method.modules["head"].linear
    answer = mean(backbone.normalise(top)) @ linear.weight.T + linear.bias
    phi = method.modules["phi_logits"]
    distance = (teacher.detach() - answer @ phi.weight.T - phi.bias).square().sum() / 4
    backbone_loss = config.loss.logits * distance
    if config.train.student_task_weight:
        backbone_loss = backbone_loss + config.train.student_task_weight * F.cross_entropy(
            answer, batch.labels
        )
    return side_loss, backbone_loss


def own_gradients(loss, tensors):
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return dict(zip(tensors, found, strict=True))


@pytest.mark.parametrize("conv", ["full", "depthwise"])
@pytest.mark.parametrize("side", ["unipt", "sherl", "lst"])
def test_the_paper_s_objective_by_an_own_derivation(backbone, side, conv):
    """Losses and gradients of both turns; the side pass reaches its own tensors and no other."""
    sets = {**PAPER, **WEIGHTS, "distill.gen_conv": conv, "distill.bottleneck": 5}
    method = make(backbone, side, **sets)
    for step in (0, 1):
        batch = batch_for(method.backbone, step)
        loss = derived(method, batch)[step]
        moved = {k: p for group in method.moved(step).values() for k, p in group.items()}
        expected = own_gradients(loss, moved)
        losses, found = gradients(method, batch)
        weights = {"loss_task": 1, "loss_shallow": 2e-3, "loss_deep": 3e-3}
        if step:
            weights = {"loss_logits": 0.3}
        total = sum(weight * losses[0][name] for name, weight in weights.items())
        torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=1e-6)
        assert {name for name, gradient in found.items() if gradient is not None} == moved.keys()
        for name, gradient in expected.items():
            assert gradient is not None, name
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_every_option_alone_by_the_same_derivation(backbone):
    """Jointly and with a task loss on the deployed head, so that none leans on another."""
    for name in ("gen_conv", "mask_tokens", "side_head", "last_layer"):
        option = f"distill.{name}"
        sets = {**WEIGHTS, option: PAPER[option], "distill.phi_logits": True}
        method = make(backbone, "sherl", **sets)
        batch = batch_for(method.backbone)
        expected = own_gradients(
            sum(derived(method, batch)),
            {k: p for group in method.groups.values() for k, p in group.items()},
        )
        _, found = gradients(method, batch)
        for tensor, gradient in expected.items():
            torch.testing.assert_close(
                found[tensor], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}: {tensor}"
            )


def test_recompute_equals_full_and_takes_turns(backbone):
    found = {}
    for mode in ("recompute", "full", "late:1"):
        method = make(backbone, "sherl", **{**PAPER, **WEIGHTS, "train.norm_grad": mode})
        found[mode] = gradients(method, batch_for(backbone, 0), batch_for(backbone, 1))[1]
        for name, gradient in found[mode].items():
            torch.testing.assert_close(gradient, found["recompute"][name], msg=f"{mode} {name}")


def test_turns_add_up_to_the_joint_step(backbone):
    sets = WEIGHTS | {"distill.phi_logits": True}
    joint = gradients(make(backbone, **sets), batch_for(backbone, 4))
    method = make(backbone, **sets, **{"train.turns": "alternate"})
    losses, side = gradients(method, batch_for(backbone, 4))
    assert losses[0].keys() == joint[0][0].keys()
    for name, value in losses[0].items():  # what does not learn in this turn is shown all the same
        torch.testing.assert_close(value, joint[0][0][name], msg=name)
    later = replace(batch_for(backbone, 4), step=5)
    student = gradients(method, later)[1]
    for name, gradient in joint[1].items():
        found = student[name] if side[name] is None else side[name]
        assert (side[name] is None) != (student[name] is None), name
        if side[name] is not None or "phi" not in name:
            torch.testing.assert_close(found, gradient, msg=name)


def test_the_forecast_of_turns_is_the_larger_one(tiny_vit):
    sizes = {}
    for turns in ("joint", "alternate"):
        options = {"method": "mdpd", "backbone": {"name": str(tiny_vit)}, "train": {"turns": turns}}
        sizes[turns] = forecast(Config(**options), Classify.numbered(3)).peak_bytes
    assert 0.5 * sizes["joint"] < sizes["alternate"] <= sizes["joint"]


# --- parts ------------------------------------------------------------------------------------


def test_the_full_generator_has_the_reported_size():
    """ViT-B/16 and UniPT at r = 2: the paper reports 5.50 - 5.19 = 0.31 M, norms included."""
    config = DistillConfig(gen_conv="full", share_phi=True, share_gen=True)
    patches = (14, 14)
    distiller = FeatureDistiller(
        [Layout(768, patches, 1)] * 13,
        dict.fromkeys(range(1, 13), Layout(384, patches, 1)),
        protect_first=True,
        config=config,
    )
    norms = 25 * 2 * 768
    assert sum(p.numel() for p in distiller.parameters()) + norms == 316_032


def test_a_full_generator_is_torch_s_own_convolution_and_a_class_token_a_map_of_its_own():
    torch.manual_seed(0)
    gen = Generator(Layout(4, (2, 3), 2), full=True, reads_prefix=True)
    x = torch.randn(2, 8, 4)
    out = gen(x, None)
    image = x[:, 2:].transpose(1, 2).reshape(2, 4, 2, 3)
    expected = gen.second(gen.first(image).relu()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out[:, 2:], expected)
    middle = lambda x, layer: x @ layer.weight[:, :, 1, 1].T + layer.bias
    torch.testing.assert_close(out[:, :2], middle(middle(x[:, :2], gen.first).relu(), gen.second))


@pytest.mark.parametrize("grid", [None, (2, 4)])
def test_the_mask_may_cover_every_token(grid):
    layout = Layout(8, grid, 0 if grid is None else 1)
    make = lambda **options: FeatureDistiller(
        [layout] * 3, {1: layout, 2: layout}, protect_first=True, config=DistillConfig(**options)
    )
    keys = np.arange(400)
    assert make().draw_mask(keys, 9, 0, 0)[:, 0].sum() == 0
    assert 0.4 < make(mask_tokens="all").draw_mask(keys, 9, 0, 0)[:, 0].mean() < 0.6


def test_phi_of_the_logits_begins_as_nothing_and_keeps_its_student_s_own_answer(backbone):
    """Only examples that Y_S answers better than Y_B itself count, whatever φ makes of Y_B."""
    labels = torch.tensor([0.0, 0.0])
    answer, teacher = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.5], [2.0]])
    config = load_config(None, {}, ["loss.logits_where=better", "loss.logits=1"]).loss
    found = Regress().distance(answer + 9, teacher, labels, config, answer=answer)
    assert float(found) == 9.5**2
    phi = make(backbone, **{"distill.phi_logits": True}, start=True).modules["phi_logits"]
    raw = torch.randn(2, 3)
    assert torch.equal(phi(raw), raw)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["train.turns=alternate", "train.late_norm_grad=true"], "does nothing with train.turns"),
        (["distill.phi_logits=true", "loss.logits=0"], "does nothing with loss.logits=0"),
        (["distill.gen_conv=full", "loss.deep=0", "loss.shallow=0"], "gen_conv=full does nothing"),
        (["side.name=dtlv1", "distill.side_head=paper"], "dtlv1 has none; use distill.side_head"),
        (["side.readout=released"], r"side\.readout=released is read by --side dtlv1, dtlv2"),
        (["side.gate=0.5"], r"side\.gate=0.5 is read by --side sherl only"),
    ],
)
def test_what_an_option_would_not_change_is_refused(backbone, sets, said):
    with pytest.raises(UserError, match=said):
        build_method(
            copy.deepcopy(backbone),
            Classify.numbered(3),
            load_config(None, {"method": "mdpd"}, sets),
        )


# --- how much of it is felt -------------------------------------------------------------------


def length(found):
    """The norm of the gradient of norms and deployed head."""
    kept = [g for k, g in found.items() if k.startswith(("backbone.", "head.")) and g is not None]
    return float(torch.cat([g.flatten() for g in kept]).norm())


@pytest.mark.parametrize("mode", ["recompute", "full", "none"])
def test_it_is_the_share_of_two_gradients(backbone, mode):
    """Each gradient from a step of its own: one without task loss, one without distillation."""
    common = {"loss.deep": 0, "loss.shallow": 0, "train.norm_grad": mode}
    steps = [
        make(backbone, **common, **{"loss.logits": logits, "train.student_task_weight": task})
        for logits, task in ((0.3, 0), (0, 0.5), (0.3, 0.5))
    ]
    for method in steps:
        method.eval_mode()
    batch = batch_for(backbone)
    logits, task = (length(gradients(method, batch)[1]) for method in steps[:2])
    assert steps[2].felt(batch) == pytest.approx(logits / (logits + task), rel=1e-4)
    assert steps[0].felt(batch) == 1.0 and steps[1].felt(batch) == 0.0


def test_it_leaves_gradients_random_state_and_peak_as_they_are(backbone):
    method = make(backbone, **{"loss.logits": 0.3, "distill.phi_logits": True})
    batch = batch_for(backbone)
    with measure_peak() as step:
        _, found = gradients(method, batch)
    before = torch.get_rng_state()
    method.eval_mode()
    for group in method.groups.values():
        for name, parameter in group.items():
            parameter.grad = found[name]
    with measure_peak() as felt:
        method.felt(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert felt.peak_bytes <= step.peak_bytes
    for group in method.groups.values():
        for name, parameter in group.items():
            assert parameter.grad is found[name], name


def test_a_run_trains_to_the_same_bits_with_it_and_without(
    tmp_path, image_options, fit_in, monkeypatch
):
    sets = ["train.eval_every=2", "loss.logits=0.5", "distill.phi_logits=true"]
    options = {**image_options, "steps": 4, "set": sets}
    files = []
    for name in ("with", "without"):
        run = fit_in(tmp_path / name, options)
        files.append(run.summary["files"])
        lines = [json.loads(x) for x in (run.path / "metrics.jsonl").read_text().splitlines()]
        found = [line["felt"] for line in lines if "felt" in line]
        if name == "with":
            assert len(found) == 2 and run.summary["felt"] == pytest.approx(sum(found) / 2)
            assert 0.01 < run.summary["felt"] < 1
            assert "Distillation felt" in (run.path / "report.html").read_text()
            assert not any("distillation makes" in note for note in run.summary["notes"])
        monkeypatch.setattr(MDPD, "felt", lambda self, batch: None)
    assert files[0] == files[1] and not found and run.summary["felt"] is None


def test_a_distillation_that_is_not_felt_is_said(tiny_run, image_options):
    assert tiny_run.summary["felt"] > 0.01
    assert not any("logits distillation" in note for note in tiny_run.summary["notes"])
    assert felt_caution(None) == felt_caution(0.01) == []
    (note,) = felt_caution(0.002)
    assert "0.20" in note and "--method norms" in note and "larger loss.logits" in note
    weak = "loss.logits=1e-4"
    said = lambda *sets: [n for n in plan(**image_options, set=sets).notes if "be felt" in n]
    assert len(said(weak)) == 1 and "loss.logits=0.0001 beside" in said(weak)[0]
    assert not said() and not said(weak, "train.student_task_weight=0")


def test_every_kind_of_task_has_a_distillation_of_its_own():
    assert Classify.numbered(3).distils(LossConfig()).logits_form == "kl"
    assert Regress().distils(LossConfig()).logits_form == "mse"
    chosen = LossConfig(logits=0.5, logits_form="mse")
    assert Classify.numbered(3).distils(chosen) == chosen


def test_options_that_earlier_runs_had_by_default_are_no_choice(tiny_run):
    """A run of `norms` from before wrote loss.logits=0.0001, which it does not read."""
    former = [f"{name}={value}" for name, value in FORMER_DEFAULTS.items()]
    check_options(METHODS["norms"], load_config(None, {"method": "norms"}, former))
    load_config(None, {"method": "mdpd"}, [*former, "loss.logits=0"])


def test_a_detached_teacher_moves_with_its_student_all_the_same(backbone):
    """It reads taps that the student's norms shape: drawn to it, the student moves its own target.

    That is why a felt distillation at a large rate of the norms can run away (docs/accuracy.md).
    """
    method = make(backbone, **{"loss.logits": 1, "train.student_task_weight": 0})
    batch = batch_for(backbone)
    answer = lambda: {k: v.detach() for k, v in method.outputs(batch.inputs).items()}
    method.eval_mode()
    before = answer()
    gradients(method, batch)
    with torch.no_grad():
        for parameter in method.groups["norms"].values():
            parameter -= 0.1 * parameter.grad.sign()
    after = answer()
    moved = {name: float((after[name] - before[name]).norm()) for name in before}
    assert min(moved.values()) > 1e-3  # though no tensor of the side network did


def test_beside_stages_every_part_learns(staged_folder):
    """SHERL's late block gives the last feature, as wide as its tap and on its own grid."""
    backbone = load_backbone(BackboneConfig(name=str(staged_folder("resnet")), img_size=64))
    options = {k: v for k, v in PAPER.items() if k != "train.turns"}
    method = make(backbone, "sherl", start=True, **{**options, **WEIGHTS})
    assert method.distiller.deep[-1] == backbone.depth
    missing = [k for k, g in gradients(method, batch_for(backbone))[1].items() if g is None]
    assert not missing
