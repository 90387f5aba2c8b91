"""Adapters and virtual tokens of peft: formulas by hand, merging, pruning, resuming."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mdpd_deploy import fit
from mdpd_deploy.adapters import LAYERS, build_tokens, inject, merged_weights
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import BackboneConfig, PeftConfig, check_config, load_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.graphs.signature import same_structure
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.tasks import Classify
from mdpd_deploy.tasks.head import Head
from mdpd_deploy.train.batches import StepDataset
from mdpd_deploy.train.methods import build_method
from mdpd_deploy.train.optim import build_optimizer
from mdpd_deploy.train.setup import prepare

SMALL = PeftConfig(rank=3, alpha=5, tokens=4)


@pytest.fixture
def backbones(tiny_vit, tiny_bert):
    torch.manual_seed(0)

    def load(kind):
        folder = tiny_vit if kind == "image" else tiny_bert
        return load_backbone(BackboneConfig(name=str(folder)), max_length=24).eval()

    return load


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, image_options, text_options):
    """Short completed runs by method and kind of data, made on demand."""
    made = {}

    def get(method, kind):
        if (method, kind) not in made:
            options = dict(image_options if kind == "image" else text_options)
            options["set"] = ["data.max_length=24"] if kind == "text" else []
            out = tmp_path_factory.mktemp("runs") / f"{method}-{kind}"
            made[method, kind] = fit(out=out, method=method, lr=0.02, quiet=True, **options)
        return made[method, kind]

    return get


def inputs_of(backbone, count=3):
    return tuple(backbone.example_inputs(count).values())


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_merged_weights_give_the_outputs_of_the_layers(name, kind, targets, backbones):
    adapted, plain = backbones(kind), backbones(kind)
    config = SMALL.model_copy(update={"targets": targets})
    inject(adapted, name, config, random=True)
    inputs = plain.example_inputs(3)
    with torch.no_grad():
        before, layered = plain(inputs), adapted(inputs)
        merged = merged_weights(adapted)
        for weight, value in merged.items():
            plain.get_parameter(weight).copy_(value)
        after = plain(inputs)
    assert (layered - before).abs().max() > 1e-2
    torch.testing.assert_close(after, layered, rtol=1e-4, atol=1e-4)
    linear = [path for layer in plain.layers(0) if layer.linear for path in layer.paths]
    if name != "ia3":
        per_block = {"all": len(linear), "attention": 1 if kind == "image" else 2}[targets]
        assert len(merged) == per_block * plain.depth


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_fresh_adapter_changes_nothing_and_merging_follows_the_papers(name, backbones):
    fresh, plain = backbones("text"), backbones("text")
    inject(fresh, name, SMALL)
    inputs = plain.example_inputs(2)
    torch.testing.assert_close(fresh(inputs), plain(inputs))
    for weight, value in merged_weights(fresh).items():
        torch.testing.assert_close(value, plain.get_parameter(weight).data)

    adapted = backbones("text")
    inject(adapted, name, SMALL, random=True)
    path = "model.encoder.layer.1.attention.self.value"
    weight = plain.get_submodule(path).weight
    layer = adapted.get_submodule(path)
    if name == "lora":
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = weight + (5 / 3) * b @ a
    elif name == "adalora":
        p, e, q = layer.lora_B["default"], layer.lora_E["default"], layer.lora_A["default"]
        assert e.shape == (5, 1)  # 1.5 × rank at first
        expected = weight + (5 / 5) * p @ torch.diag(e[:, 0]) @ q
    else:
        expected = torch.diag(layer.ia3_l["default"][:, 0]) @ weight
    torch.testing.assert_close(merged_weights(adapted)[f"{path}.weight"], expected)


def test_ia3_scales_keys_values_and_inner_units_alone(backbones):
    for kind, ends in (("text", {"key", "value", "output.dense"}), ("image", {"qkv", "fc2"})):
        backbone = backbones(kind)
        inject(backbone, "ia3", SMALL)
        scaled = {n.rpartition(".ia3_l")[0] for n, _ in backbone.named_parameters() if "ia3_l" in n}
        assert len(scaled) == len(ends) * backbone.depth
        assert all(any(name.endswith(end) for end in ends) for name in scaled)
        assert not any("attention.output" in name for name in scaled)


def test_prompt_tokens_are_seen_by_every_block_and_never_pooled(backbones):
    backbone = backbones("text")
    tokens = build_tokens(backbone, "prompt", SMALL)
    inputs = backbone.example_inputs(2)
    mask, start = inputs["attention_mask"], backbone.trace(inputs).taps[0]
    prompt = tokens.prompt.embedding.weight.expand(2, -1, -1)
    wide = torch.cat([torch.ones(2, 4), mask], dim=1)
    added = (1 - wide[:, None, None]) * torch.finfo(torch.float32).min
    with torch.no_grad():
        out = torch.cat([prompt, start], dim=1)
        for layer in backbone.model.encoder.layer:
            out = layer(out, attention_mask=added)
        expected = [row[4:][real.bool()].mean(0) for row, real in zip(out, mask, strict=True)]
        torch.testing.assert_close(tokens(backbone, inputs), torch.stack(expected))


def test_a_prefix_is_keys_and_values_before_the_blocks_own(backbones):
    """One attention by hand; the rest of the block is the library's."""
    backbone = backbones("text")
    tokens = build_tokens(backbone, "prefix", SMALL)
    inputs = backbone.example_inputs(2)
    mask, x = inputs["attention_mask"], backbone.trace(inputs).taps[0]
    first = tokens.prefix.embedding.weight[:, : 2 * 32].view(4, 2, 4, 8)  # T, k and v, heads, D/h
    block = backbone.blocks()[0]
    attention = block.attention.self

    def heads(y):
        return y.view(2, -1, 4, 8).transpose(1, 2)

    keys, values = (
        torch.cat([first[:, i].transpose(0, 1).expand(2, -1, -1, -1), heads(own(x))], dim=2)
        for i, own in enumerate((attention.key, attention.value))
    )
    scores = heads(attention.query(x)) @ keys.transpose(2, 3) / 8**0.5
    hidden = torch.cat([torch.zeros(2, 4), 1 - mask], dim=1).bool()[:, None, None]
    mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    middle = block.attention.output(mixed.transpose(1, 2).reshape(2, -1, 32), x)
    expected = block.output(block.intermediate(middle), middle)
    torch.testing.assert_close(tokens.trace(backbone, inputs).taps[1], expected)


@pytest.mark.parametrize(
    ("method", "kind"), [*((method, "text") for method in LAYERS), ("lora", "image")]
)
def test_the_unmerged_rival_has_the_trained_values(method, kind, run_of):
    run = run_of(method, kind)
    unmerged, trained = run.load_unmerged(method)
    assert trained
    inputs = inputs_of(unmerged.backbone)
    with torch.no_grad():
        torch.testing.assert_close(
            unmerged(*inputs), run.load_deployed()(*inputs), rtol=1e-4, atol=1e-5
        )
    other = next(name for name in LAYERS if name != method)
    random, trained = run.load_unmerged(other)
    assert not trained
    with torch.no_grad():
        assert (random(*inputs) - run.load_bare()(*inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("method", list(LAYERS))
def test_a_delta_holds_what_merging_changed_and_the_adapter_lies_beside_it(method, run_of):
    run = run_of(method, "text")
    delta = load_file(run.path / "model" / "delta.safetensors")
    fresh = run.load_backbone().state_dict()
    for name, value in delta.items():
        before = fresh.get(name.removeprefix("backbone."))
        if before is not None and before.any():  # a bias of zeros stays one when it is scaled
            assert not torch.equal(before, value)
    assert run.summary["params"]["deployed_delta"] == sum(t.numel() for t in delta.values())
    assert run.summary["params"]["backbone"] == sum(
        p.numel() for p in run.load_bare().backbone.parameters()
    )
    adapter = load_file(run.path / "model" / "adapter.safetensors")
    assert sum(t.numel() for t in adapter.values()) == run.summary["params"]["groups"]["adapter"]


def test_the_layers_of_an_unmerged_adapter_are_in_its_graph(run_of, tmp_path):
    run = run_of("lora", "image")
    merged = export_onnx(run.load_deployed(), tmp_path / "merged.onnx")
    bare = export_onnx(run.load_bare(), tmp_path / "bare.onnx")
    unmerged = export_onnx(run.load_unmerged("lora")[0], tmp_path / "unmerged.onnx")
    assert same_structure(merged.path, bare.path) == []
    assert unmerged.nodes >= bare.nodes + 3 * 3  # two products and a sum per block


def test_adapter_dropout_is_on_in_training_only(tiny_bert, sentence_folder):
    flags = {
        "task": "classify", "data.path": str(sentence_folder), "data.text": ["sentence"],
        "backbone.name": str(tiny_bert), "method": "lora", "data.max_length": 24,
        "peft.dropout": 0.5, "backbone.dropout_active": False,
    }  # fmt: skip
    method = prepare(load_config(None, flags)).method
    dropouts = [m for m in method.backbone.modules() if isinstance(m, torch.nn.Dropout)]
    method.train_mode()
    assert {m.p for m in dropouts if m.training} == {0.5}
    method.eval_mode()
    assert not any(m.training for m in dropouts)


def test_adalora_ends_with_its_budget(tmp_path, text_options):
    """Evaluations before it is reached cannot be the best, nor end the run early."""
    sets = ["data.max_length=24", "train.eval_every=1", "train.patience=2", "peft.rank=2"]
    options = {**text_options, "set": sets, "steps": 20}
    run = fit(out=tmp_path / "run", method="adalora", quiet=True, **options)
    assert run.summary["best_step"] >= 11 and run.summary["steps"] > 11
    adapter = load_file(run.path / "model" / "adapter.safetensors")
    left = sum(int(t.count_nonzero()) for name, t in adapter.items() if "lora_E" in name)
    assert left == 2 * 2 * 3  # rank × query and value × blocks
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if line["split"] == "train")
    assert line["loss"] == pytest.approx(line["loss_task"] + line["loss_orthogonal"], rel=1e-5)
    assert line["loss_orthogonal"] > 0


@pytest.mark.parametrize(("every", "steps"), [(3, 5), (5, 8)])  # amid the pruning, and after it
def test_a_resumed_adalora_is_bit_identical(every, steps, tmp_path, text_options):
    sets = ["data.max_length=24", "train.keep=last", f"checkpoint.every={every}"]
    options = {**text_options, "set": sets, "steps": steps}
    run = fit(out=tmp_path / "run", method="adalora", quiet=True, **options)
    whole = {path.name: path.read_bytes() for path in (run.path / "model").iterdir()}
    assert list((run.path / "checkpoints").glob(f"step-0000000{every}"))
    (run.path / "summary.json").unlink()
    shutil.rmtree(run.path / "model")
    again = fit(resume=run.path, quiet=True)
    assert {path.name: path.read_bytes() for path in (again.path / "model").iterdir()} == whole


def test_parts_of_a_step_share_adaloras_penalty(tiny_bert, sentence_folder):
    """Gradients of parts of 5 and 3 examples are those of all 8 at once, the penalty's included."""
    flags = {
        "task": "classify", "data.path": str(sentence_folder), "data.text": ["sentence"],
        "backbone.name": str(tiny_bert), "method": "adalora", "data.max_length": 24,
        "train.batch": 8, "backbone.dropout_active": False,
    }  # fmt: skip
    setup = prepare(load_config(None, flags))
    method = setup.method
    for name, weight in method.backbone_weights.items():  # Λ starts at 0, which hides P and Q
        if "lora_E" in name:
            torch.nn.init.constant_(weight, 0.3)
    dataset = StepDataset(
        setup.data.train, setup.backbone.preprocess, setup.task, setup.config, setup.schedule
    )
    (whole,) = dataset[0]

    def gradients(*cuts):
        method.modules.zero_grad()
        method.backbone.zero_grad()
        losses = [
            method.step(
                replace(
                    whole,
                    inputs={name: tensor[cut] for name, tensor in whole.inputs.items()},
                    labels=whole.labels[cut],
                    keys=whole.keys[cut],
                )
            )
            for cut in cuts
        ]
        grads = {n: p.grad.clone() for group in method.groups.values() for n, p in group.items()}
        return grads, {name: sum(float(loss[name]) for loss in losses) for name in losses[0]}

    one, loss_of_one = gradients(slice(0, 8))
    parts, loss_of_parts = gradients(slice(0, 5), slice(5, 8))
    assert loss_of_one["loss_orthogonal"] > 0.1
    assert loss_of_parts == pytest.approx(loss_of_one, rel=1e-5)
    for name, grad in one.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt"])
def test_parts_of_a_step_add_up(method, tmp_path, image_options):
    still = ["backbone.dropout_active=false", "train.keep=last"]
    runs = [
        fit(out=tmp_path / str(batch), method=method, quiet=True, **{
            **image_options, "steps": 3, "batch": batch,
            "set": [*still, f"train.accumulate={8 // batch}"],
        })
        for batch in (8, 2)
    ]  # fmt: skip
    one, many = (load_file(run.path / "model" / "adapter.safetensors") for run in runs)
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_prefix_needs_an_attention_that_takes_it(backbones):
    with pytest.raises(UserError, match=r"--method prefix: .* use --method prompt"):
        build_tokens(backbones("image"), "prefix", SMALL)


@pytest.mark.parametrize(
    "method, scales", [("adalora", "lora_E"), ("ia3", "ia3_l"), ("lora", None)]
)
def test_scales_are_not_decayed(method, scales, backbones):
    """And the maps are, those of rank one included."""
    config = check_config({"method": method, "peft": {} if method == "ia3" else {"rank": 1}})
    built = build_method(backbones("text"), Classify.numbered(3), config)
    groups = [g for g in build_optimizer(built).param_groups if g["group"] == "adapter"]
    decayed = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert len(decayed) == len(built.backbone_weights)
    for name, decay in decayed.items():
        assert decay == (0.0 if scales and scales in name else 0.01), name


def test_regression_and_a_stored_backbone_merge_too(tmp_path, text_options, many):
    options = {**text_options, "task": "regress", "data": many / "scores", "steps": 3}
    options["set"] = ["data.max_length=24", "backbone.pretrained=false", "train.precision=bf16"]
    run = fit(out=tmp_path / "run", method="lora", quiet=True, **options)
    assert isinstance(run.load_deployed().head, Head) and run.load_deployed().head.scaled
    inputs = inputs_of(run.load_backbone())
    with torch.no_grad():
        torch.testing.assert_close(
            run.load_unmerged("lora")[0](*inputs), run.load_deployed()(*inputs),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
