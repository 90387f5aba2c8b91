"""Models taken whole: any timm or transformers encoder, its blocks and norms found by looking."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AlbertConfig,
    AutoModel,
    ConvBertConfig,
    MBartConfig,
    XLMConfig,
)

from mdpd_deploy import bench_latency, export_run, load_bundle
from mdpd_deploy.adapters import inject, merged_weights
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.backbones.discover import discover
from mdpd_deploy.backbones.wrap import halves_of, wrapped
from mdpd_deploy.checks.parity import shape_batches
from mdpd_deploy.config import BackboneConfig, PeftConfig, load_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.graphs.signature import same_structure
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.model import Deployed
from mdpd_deploy.tasks import Classify
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.memory.forecast import forecast
from mdpd_deploy.train.methods import Batch, build_method

# timm name, picture size, blocks, tuned norms: per block and between or behind the blocks
VISION = {
    "test_mambaout": (64, 6 + 3 + 1, 6 + 3 + 1),
    "test_byobnet": (64, 4, 3 * 2 + 3 + 4),
    "test_maxvit": (None, 4 * 3, 4 * 7 + 1),
}
# a tenth of the families that benchmarks/backbones.py tries: timm name, blocks
SWEPT = {
    "test_byobnet": 4, "test_coatnet": 5, "test_convnext": 9, "test_efficientnet_evos": 5,
    "test_mambaout": 10, "test_maxvit": 12, "test_resnet": 4,
}  # fmt: skip
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TEXT = {  # config class, options, tuned norms
    "albert": (AlbertConfig, TINY | {"embedding_size": 16}, 2),  # one block, run twice
    "convbert": (ConvBertConfig, TINY | {"embedding_size": 32}, 2 * 2),
    "xlm": (XLMConfig, {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, 2 * 2),  # blocks fill a cache
}
# what the exporter or ONNX Runtime would change: scales of group norms that are reshaped, zeros
# around a max pool (bit); a decoder's first tokens, which a batch of one would lose (mbart)
MENDED = {
    "bit": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4),
    "mbart": dict(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    ),
}  # fmt: skip


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
    method = build_method(copy.deepcopy(backbone), Classify.numbered(3), config)
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
    if any(len(halves_of(block)) > 1 for block in backbone.blocks()):
        halved, _ = gradients(backbone, "recompute-halves")
        assert all(torch.equal(halved[name], gradient) for name, gradient in plain.items())
    late, _ = gradients(backbone, "late:1")
    fewer = backbone.depth > 1 and backbone.block_norms(0)  # XLM's norms lie beside its blocks
    assert 2 < len(late) < len(exact) + (not fewer)
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


@pytest.mark.parametrize("name", SWEPT)
def test_a_tenth_of_timms_families_in_small(name):
    config = BackboneConfig(name=f"timm:{name}", pretrained=False)
    torch.manual_seed(0)
    backbone = shaken(load_backbone(config))
    assert backbone.depth == SWEPT[name] and backbone.norms()
    plain, exact = (gradients(backbone, mode)[0] for mode in ("full", "recompute"))
    for path, gradient in plain.items():
        assert gradient is not None and torch.equal(exact[path], gradient), path


def test_statistics_of_batch_norms_stay_as_they_were_trained():
    backbone = vision("test_byobnet")
    before = {n: b.clone() for n, b in backbone.named_buffers() if "running" in n}
    assert before
    _, method = gradients(backbone, "recompute")
    assert method.backbone.training
    after = dict(method.backbone.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["test_byobnet", "albert"])
def test_a_forecast_is_what_a_step_takes(name, encoder_folder, real_peak):
    options = {"method": "norms", "train.batch": 4}
    if name in VISION:
        options |= {"backbone.name": f"timm:{name}", "backbone.img_size": 64}
    else:
        kind, more, _ = TEXT[name]
        options |= {"backbone.name": str(encoder_folder(kind, **more)), "data.max_length": 16}
    config = load_config(None, {**options, "backbone.pretrained": name not in VISION}, [])
    foreseen = forecast(config, Classify.numbered(3))
    assert foreseen.peak_bytes == pytest.approx(real_peak(config).peak_bytes, rel=0.02)


@pytest.mark.parametrize("method", ["side", "mdpd", "lora", "prompt", "prefix"])
def test_what_needs_declared_taps_is_refused_in_a_sentence(method):
    backbone = vision("test_byobnet")
    config = load_config(None, {"method": method}, [])
    with pytest.raises(UserError, match=r"test_byobnet.*use --method norms, bitfit"):
        build_method(backbone, Classify.numbered(3), config)


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_low_rank_layers_are_found_by_their_names_and_merge(name):
    with pytest.raises(UserError, match=r"test_byobnet have no queries .*set peft.targets=all"):
        inject(vision("test_byobnet"), name, PeftConfig())
    adapted, plain = (vision("test_maxvit") for _ in range(2))
    inject(adapted, name, PeftConfig(rank=2), random=True)
    inputs = plain.example_inputs(1)
    with torch.no_grad():
        before, layered, merged = plain(inputs), adapted(inputs), merged_weights(adapted)
        assert merged and all(weight.endswith("attn.qkv.weight") for weight in merged)
        for weight, value in merged.items():
            plain.get_parameter(weight).copy_(value)
        torch.testing.assert_close(plain(inputs), layered, rtol=0, atol=5e-3)
    assert (layered - before).abs().max() > 1
    with pytest.raises(UserError, match=r"makes? keys and values is not known; use --method lora"):
        inject(plain, "ia3", PeftConfig())


def test_bfloat16_holds_the_frozen_weights_and_leaves_norms_exact():
    backbone = vision("test_byobnet")
    config = load_config(None, {"method": "norms"}, ["train.precision=bf16"])
    method = build_method(backbone, Classify.numbered(3), config)
    norms = method.backbone.norms()
    for path, parameter in method.backbone.named_parameters():
        assert parameter.dtype == (torch.float32 if path in norms else torch.bfloat16), path
    statistics = [
        b
        for n, b in method.backbone.named_buffers()
        if n.startswith("model.stages.0.0.conv1_kxk.bn")
    ]
    assert all(b.dtype != torch.bfloat16 for b in statistics)
    method.train_mode()
    batch = Batch(backbone.example_inputs(3), torch.arange(3), np.arange(3), 1, 3.0, 3.0)
    assert torch.isfinite(method.step(batch)["loss"])


def test_a_block_keeps_a_forward_of_its_own():
    """timm's FasterNet gives every block one of two when it is made."""
    block = torch.nn.Linear(3, 3)
    block.forward = own = lambda x: x + 1
    plain = torch.nn.Linear(3, 3)
    with wrapped([block, plain], lambda index, forward, call: 2 * call.on(forward)(call.x)):
        assert torch.equal(block(torch.ones(3)), torch.full((3,), 4.0))
    assert block.forward is own and "forward" not in vars(plain)


def test_a_list_of_maps_is_replayed_as_the_block_met_it():
    """timm's HRNet changes its list in the block, RDNet appends to the list behind the block."""

    class Block(torch.nn.Module):
        def forward(self, maps):
            maps[0] = 2 * maps[0]
            return torch.stack(maps).sum(0)

    calls = []

    def twice(index, forward, call):
        calls.append(call)
        call.on(forward)(call.x)
        return call.on(forward)(call.x)

    block, maps = Block(), [torch.ones(3)]
    with wrapped([block], twice):
        assert torch.equal(block(maps), torch.full((3,), 2.0))
    maps.append(torch.ones(3))
    assert torch.equal(calls[0].of(block, calls[0].x), torch.full((3,), 2.0))


def test_norms_that_nothing_reads_are_left_out():
    """What a block writes beside the state that goes on is trained by no loss."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.aside = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
            self.map = torch.nn.Linear(4, 4)

        def forward(self, x):
            return x + self.map(self.norm(x)), self.aside(x)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x, _ = block(x)
            return x.mean(1)

    model = Model().requires_grad_(False)
    parts, features = discover(model, lambda: model(torch.randn(2, 3, 4)))
    assert parts.norms == ("blocks.0.norm", "blocks.1.norm")
    assert list(parts.blocks) == ["blocks.0", "blocks.1"]
    assert not features.requires_grad and not any(p.requires_grad for p in model.parameters())


def test_a_model_without_norms_is_refused_where_norms_are_tuned():
    backbone = load_backbone(BackboneConfig(name="timm:vgg11", pretrained=False, img_size=32))
    task = Classify.numbered(3)
    with pytest.raises(UserError, match=r"timm:vgg11 has no norms .* use --method full"):
        build_method(backbone, task, load_config(None, {"method": "norms"}, []))
    assert build_method(backbone, task, load_config(None, {"method": "probe"}, []))


@pytest.fixture
def mended(tmp_path, encoder_folder):
    def build(name):
        if name == "mbart":
            folder = encoder_folder(MBartConfig, **MENDED[name])
        else:
            folder = tmp_path / name
            AutoModel.from_config(CONFIG_MAPPING[name](**MENDED[name])).save_pretrained(folder)
            size = {"height": 32, "width": 32}
            plain = {"image_processor_type": "ViTImageProcessor", "size": size}
            (folder / "preprocessor_config.json").write_text(json.dumps(plain))
        return load_backbone(BackboneConfig(name=str(folder)), max_length=12)

    return build


@pytest.mark.parametrize("name", ["test_byobnet", "albert", *MENDED])
def test_the_graph_is_the_bare_backbones_and_answers_as_torch(
    name, encoder_folder, mended, tmp_path
):
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs exported graphs")
    if name in VISION:
        backbone = vision(name)
    elif name in MENDED:
        backbone = shaken(mended(name))
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


@pytest.mark.slow
@pytest.mark.usefixtures("unwarmed")
def test_a_convolutional_network_goes_from_training_to_latency(digit_folder, fit_in, tmp_path):
    """Real pictures through train, export with every gate, predict, and the benchmark."""
    pytest.importorskip("onnxruntime", reason="runs exported graphs")
    options = dict(
        task="classify", data=digit_folder, backbone="timm:test_byobnet", method="norms", steps=2,
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
    assert answer.label in run.task.labels
    report = bench_latency(run.path, runtime=["onnx"], batch=[1], seconds=0.2, openings=3)
    names = [note["name"] for note in report["variants"]]
    assert "bare" in names and not {"unipt", "sherl"} & set(names)
