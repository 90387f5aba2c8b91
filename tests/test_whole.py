"""Models taken whole: any timm or transformers encoder, its blocks and norms found by looking."""

import copy

import numpy as np
import onnx
import pytest
import torch
from transformers import DebertaV2Config, ElectraConfig, ModernBertConfig, MPNetConfig

from mdpd_deploy import bench_latency, export_run, load_bundle
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.checks.reference import shape_batches
from mdpd_deploy.config import BackboneConfig, load_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.graphs.signature import same_structure
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.model import Deployed
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.forecast import forecast
from mdpd_deploy.train.methods import Batch, TaskSpec, build_method

# timm name, picture size, blocks, tuned norms: per block and between or behind the blocks
VISION = {
    "swin_tiny_patch4_window7_224": (None, 12 + 3, 12 * 2 + 3 + 1),
    "convnext_atto": (None, 12 + 3 + 1, 12 + 3 + 1),
    "resnet18": (64, 8, 8 * 2 + 3),
    "tf_efficientnet_lite0": (64, 16, 16 * 3 - 1 + 1),
    "eva02_tiny_patch14_224": (None, 12, 12 * 2 + 1),
}
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TEXT = {  # config class, options, tuned norms
    "modernbert": (ModernBertConfig, TINY, 2 * 2 - 1 + 1),
    "deberta-v2": (
        DebertaV2Config,
        TINY | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        2 * 2,
    ),
    "electra": (ElectraConfig, TINY | {"embedding_size": 16}, 2 * 2),
    "mpnet": (MPNetConfig, TINY, 2 * 2),
}


def vision(name):
    size, *_ = VISION[name]
    config = BackboneConfig(name=f"timm:{name}", pretrained=False, img_size=size)
    torch.manual_seed(0)
    return shaken(load_backbone(config))


def shaken(backbone):
    """Give every weight a little noise, so that no gradient is 0 by symmetry."""
    for parameter in backbone.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return backbone


@pytest.fixture(scope="module", params=[*VISION, *TEXT])
def backbone(request, encoder_folder):
    if request.param in VISION:
        return vision(request.param)
    kind, options, _ = TEXT[request.param]
    folder = encoder_folder(kind, **options)
    return shaken(load_backbone(BackboneConfig(name=str(folder)), max_length=12))


def gradients(backbone, mode):
    config = load_config(None, {"method": "norms"}, [f"train.norm_grad={mode}"])
    torch.manual_seed(0)
    method = build_method(copy.deepcopy(backbone), TaskSpec("classify", 3), config)
    method.train_mode()
    batch = Batch(backbone.example_inputs(3, 9), torch.arange(3), np.arange(3), 1, 3.0, 3.0)
    torch.manual_seed(5)
    method.step(batch)
    return {n: p.grad for group in method.groups.values() for n, p in group.items()}, method


def test_the_gradient_of_every_norm_is_that_of_plain_back_propagation(backbone):
    plain, _ = gradients(backbone, "full")
    exact, method = gradients(backbone, "recompute")
    assert plain.keys() == exact.keys() and len(exact) > 5
    for name, gradient in plain.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.equal(exact[name], gradient), name
    others = {n for n, p in method.backbone.named_parameters() if p.grad is not None}
    assert {f"backbone.{n}" for n in others} == exact.keys() - {
        "head.linear.weight",
        "head.linear.bias",
    }
    late, _ = gradients(backbone, "late:1")
    assert 2 < len(late) < len(exact)
    assert all(torch.equal(exact[name], gradient) for name, gradient in late.items())


def test_only_norms_of_blocks_and_behind_them_are_tuned(backbone):
    name = backbone.name.removeprefix("timm:")
    expected = VISION[name][2] if name in VISION else TEXT[backbone.model.config.model_type][2]
    norms = {path.rpartition(".")[0] for path in backbone.norms()}
    assert len(norms) == expected
    assert not any("embed" in path or "stem" in path or "q_norm" in path for path in norms)
    inside = [path for index in range(backbone.depth) for path in backbone.block_norms(index)]
    assert sorted([*inside, *backbone.final_norm_parameters()]) == sorted(backbone.norms())
    if name in VISION:
        assert backbone.depth == VISION[name][1]


def test_statistics_of_batch_norms_stay_as_they_were_trained():
    backbone = vision("resnet18")
    before = {n: b.clone() for n, b in backbone.named_buffers() if "running" in n}
    assert before
    _, method = gradients(backbone, "recompute")
    assert method.backbone.training
    after = dict(method.backbone.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["resnet18", "modernbert"])
def test_a_forecast_is_what_a_step_takes(name, encoder_folder, real_peak):
    options = {"method": "norms", "train.batch": 4}
    if name in VISION:
        options |= {"backbone.name": f"timm:{name}", "backbone.img_size": 64}
    else:
        kind, more, _ = TEXT[name]
        options |= {"backbone.name": str(encoder_folder(kind, **more)), "data.max_length": 16}
    config = load_config(None, {**options, "backbone.pretrained": name not in VISION}, [])
    foreseen = forecast(config, outputs=3, kind="classify")
    assert foreseen.peak_bytes == pytest.approx(real_peak(config).peak_bytes, rel=0.02)


@pytest.mark.parametrize("method", ["side", "mdpd", "lora", "prompt", "prefix"])
def test_what_needs_declared_taps_is_refused_in_a_sentence(method):
    backbone = vision("resnet18")
    config = load_config(None, {"method": method}, [])
    with pytest.raises(UserError, match=r"resnet18.*use --method norms, bitfit"):
        build_method(backbone, TaskSpec("classify", 3), config)


def test_bfloat16_holds_the_frozen_weights_and_leaves_norms_exact():
    backbone = vision("resnet18")
    config = load_config(None, {"method": "norms"}, ["train.precision=bf16"])
    method = build_method(backbone, TaskSpec("classify", 3), config)
    norms = method.backbone.norms()
    for path, parameter in method.backbone.named_parameters():
        assert parameter.dtype == (torch.float32 if path in norms else torch.bfloat16), path
    statistics = [
        b for n, b in method.backbone.named_buffers() if n.startswith("model.layer1.0.bn1")
    ]
    assert all(b.dtype != torch.bfloat16 for b in statistics)
    method.train_mode()
    batch = Batch(backbone.example_inputs(3), torch.arange(3), np.arange(3), 1, 3.0, 3.0)
    assert torch.isfinite(method.step(batch)["loss"])


def test_a_model_without_norms_is_refused_where_norms_are_tuned():
    backbone = load_backbone(BackboneConfig(name="timm:vgg11", pretrained=False, img_size=32))
    task = TaskSpec("classify", 3)
    with pytest.raises(UserError, match=r"timm:vgg11 has no norms .* use --method full"):
        build_method(backbone, task, load_config(None, {"method": "norms"}, []))
    assert build_method(backbone, task, load_config(None, {"method": "probe"}, []))


@pytest.mark.parametrize("name", ["resnet18", "modernbert"])
def test_the_graph_is_the_bare_backbones_and_answers_as_torch(name, encoder_folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs exported graphs")
    if name in VISION:
        backbone = vision(name)
    else:
        kind, options, _ = TEXT[name]
        folder = encoder_folder(kind, **options)
        backbone = load_backbone(BackboneConfig(name=str(folder)), max_length=12)
    model = Deployed(backbone, Head(backbone.width, 3)).eval()
    bare = export_onnx(model, tmp_path / "bare.onnx")
    for parameter in backbone.norms().values():  # equal in value: each keeps its own name
        parameter.data.fill_(0.7)
    graph = export_onnx(model, tmp_path / "tuned.onnx")
    assert same_structure(bare.path, graph.path) == []
    names = {entry.name for entry in onnx.load(graph.path).graph.initializer}
    assert {f"backbone.{path}" for path in backbone.norms()} <= names
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    for _, arrays in shape_batches(model, max_batch=3):
        fed = {value.name: arrays[value.name] for value in session.get_inputs()}
        with torch.no_grad():
            expected = model(*(torch.from_numpy(arrays[n]) for n in graph.input_names)).numpy()
        np.testing.assert_allclose(session.run(None, fed)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_convolutional_network_goes_from_training_to_latency(digit_folder, fit_in, tmp_path):
    """Real pictures through train, export with every gate, predict, and the benchmark."""
    pytest.importorskip("onnxruntime", reason="runs exported graphs")
    options = dict(
        task="classify", data=digit_folder, backbone="timm:resnet10t", method="norms", steps=2,
        batch=8, set=["backbone.pretrained=false", "backbone.img_size=32"],
    )  # fmt: skip
    run = fit_in(tmp_path / "run", options)
    assert run.summary["backbone"]["taps"] is False
    bundle = export_run(run.path)
    verdicts = {gate: entry["verdict"] for gate, entry in bundle.manifest["verification"].items()}
    assert set(verdicts.values()) == {"passed"} and {"identity", "parity", "golden"} <= set(
        verdicts
    )
    picture = next((digit_folder / "validation").rglob("*.png"))
    (answer,) = load_bundle(bundle.path).predict([picture])
    assert answer.label in run.label_names
    report = bench_latency(run.path, runtime=["onnx"], batch=[1], seconds=0.2, openings=3)
    names = [note["name"] for note in report["variants"]]
    assert "bare" in names and not {"unipt", "sherl"} & set(names)
