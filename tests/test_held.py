"""Frozen weights held in fewer bits: the numbers by formula, what is kept, and whole runs."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.backbones.held import FORMS, LEVELS, hold_weights, let_go
from mdpd_deploy.commands.train import fit, plan
from mdpd_deploy.config import check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.memory.forecast import forecast
from mdpd_deploy.train.methods import build_method

DTYPES = [torch.float32, torch.bfloat16]


def nearest(number, choices):
    return min(choices, key=lambda choice: abs(choice - number))


def by_formula(form, weight, dtype):
    """Number for number, in Python: what a weight [rows, n] must read as."""
    rows = []
    for row in weight.tolist():
        size = 64 if form == "nf4" else len(row)
        out = []
        for start in range(0, len(row), size):
            block = row[start : start + size]
            most = max(map(abs, block)) / (1 if form == "nf4" else 127)
            scale = torch.tensor(most).to(dtype)
            whole = range(-127, 128) if form == "int8" else LEVELS
            out += [float(torch.tensor(nearest(n / float(scale), whole)).to(dtype) * scale)
                    for n in block]  # fmt: skip
        rows.append(out)
    return torch.tensor(rows).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_weight_reads_as_the_formula_says(form, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(128, 3).requires_grad_(False)
    linear.weight[0] *= 7
    wanted = by_formula(form, linear.weight, dtype)
    hold_weights(linear, form, dtype, ())
    torch.testing.assert_close(linear.weight, wanted, rtol=0, atol=0)
    held = sum(b.numel() * b.element_size() for b in linear.buffers())
    bits = {"int8": 8 * 128 * 3 + 3 * 8 * dtype.itemsize,
            "nf4": 4 * 128 * 3 + (6 + 16) * 8 * dtype.itemsize}  # fmt: skip
    assert 8 * held == bits[form]


def test_bf16_and_rows_of_zeros():
    weight = torch.randn(4, 128)
    weight[1] = 0
    for form in FORMS:
        linear = nn.Linear(128, 4).requires_grad_(False)
        linear.weight.copy_(weight)
        hold_weights(linear, form, torch.float32, ())
        assert linear.weight[1].abs().max() == 0 and linear.weight.isfinite().all()
        assert form != "bf16" or torch.equal(linear.weight, weight.bfloat16().float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", list(FORMS))
def test_a_held_module_is_the_plain_one_with_the_same_numbers(form, dtype):
    """Linear maps, their biases trained or not, tables and convolutions, both passes, every bit."""
    torch.manual_seed(0)
    plain = [
        nn.Linear(64, 5),
        nn.Linear(64, 5, bias=False),
        nn.Conv2d(64, 6, 3),
        nn.Embedding(9, 64),
    ]
    held = nn.ModuleList(plain).to(dtype).requires_grad_(False)
    hold_weights(held, form, dtype, ())
    assert [type(m).__name__ for m in held] == ["Linear", "Linear", "Conv2d", "Embedding"]
    assert "weight" not in {name.rpartition(".")[2] for name, _ in held.named_parameters()}
    bias = held[0].bias.requires_grad_()
    x = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True)
    seed = torch.randn(2, 7, 5, dtype=dtype)

    def gradients(out):
        wanted = torch.autograd.grad(out, [x, bias], seed, allow_unused=True)
        return out, *(g for g in wanted if g is not None)

    for module in held[:2]:
        ours = gradients(module(x))
        theirs = gradients(F.linear(x, module.weight, module.bias))
        assert all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs)
    picture = torch.randn(2, 64, 5, 5, dtype=dtype)
    conv, table = held[2], held[3]
    if form != "nf4":  # rows of 576 numbers are nine blocks: held in every form
        assert not conv._parameters.get("weight")
    assert torch.equal(conv(picture), F.conv2d(picture, conv.weight, conv.bias))
    indices = torch.tensor([[0, 8, 3], [3, 3, 1]])
    assert torch.equal(table(indices), table.weight[indices])


def test_a_linear_map_keeps_no_weight_for_the_backward_pass():
    linear = nn.Linear(64, 32).requires_grad_(False)
    hold_weights(linear, "int8", torch.float32, ())
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert not kept


def test_what_stays_as_it_is_and_what_is_shared():
    first, second, odd = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(63, 4)
    second.weight = first.weight
    trained, table = nn.Linear(64, 64), nn.Embedding(5, 64, max_norm=1.0)
    model = nn.ModuleList([first, second, odd, trained, table])
    hold_weights(model, "nf4", torch.float32, {id(trained.weight)})
    assert [isinstance(m._parameters.get("weight"), nn.Parameter) for m in model] == [
        False, False, True, True, True,
    ]  # fmt: skip
    assert first.weight_nf4_0 is second.weight_nf4_0
    wanted = first.weight
    let_go(first)
    let_go(odd)
    assert type(first) is nn.Linear and set(first.state_dict()) == {"weight", "bias"}
    assert torch.equal(first.weight, wanted) and isinstance(first.weight, nn.Parameter)


def method_of(folder, method, **train):
    backbone = {"name": str(folder), "pretrained": False}
    words = {"method": method, "backbone": backbone, "train": {"batch": 8, **train}}
    config = check_config(words | ({"side": {"reduction": 2}} if method == "mdpd" else {}))
    loaded = load_backbone(config.backbone, max_length=24)
    return build_method(loaded, Classify.numbered(3).example(config), config)


@pytest.mark.parametrize("method", ["norms", "bitfit", "lora", "ia3", "mdpd", "prompt"])
def test_only_frozen_matrices_are_held(tiny_bert, method):
    held = method_of(tiny_bert, method, hold="int8")
    names = dict(held.backbone.named_parameters())
    matrices = [n for n, p in names.items() if p.ndim > 1 and not p.requires_grad]
    assert not [n for n in matrices if n.endswith(".weight")]
    trained = {name for name, p in names.items() if p.requires_grad}
    assert trained == set(method_of(tiny_bert, method).tuned())
    for part in (*held.modules.parameters(), *held.backbone.norms().values()):
        assert part.dtype == torch.float32
    kept = {b.dtype for n, b in held.backbone.named_buffers() if "weight_int8_0" in n}
    assert kept == {torch.int8}


@pytest.mark.parametrize("norm_grad", ["full", "recompute"])
def test_one_weight_at_a_time_is_more_than_what_is_held(norm_grad):
    """Of a ViT-B in float32; `full` keeps every activation, and yet none of the weights."""
    need = {}
    for hold in (None, "int8"):
        words = {"batch": 4, "norm_grad": norm_grad} | ({"hold": hold} if hold else {})
        backbone = {"name": "timm:vit_base_patch16_224", "pretrained": False}
        config = check_config({"method": "norms", "backbone": backbone, "train": words})
        need[hold] = forecast(config, Classify.numbered(10)).parts
    most = (
        4 * 768 * 3072 * 4 / 3
    )  # bytes of the largest weight, and a third for what is made on the way
    assert need["int8"]["activations"] <= need[None]["activations"] + most
    assert need["int8"]["weights"] < 0.27 * need[None]["weights"]


def test_a_run_says_what_is_held_and_deploys_float32(tmp_path, image_options):
    words = {**image_options, "set": ["train.hold=int8"]}
    made = plan(**words)
    assert made.hold == "int8" and made.options["train.hold"] == "int8"
    run = fit(**words, out=tmp_path / "run", quiet=True)
    memory = run.summary["memory"]
    assert (memory["hold"], memory["precision"]) == ("int8", "fp32")
    assert memory["peak_live_bytes"] == pytest.approx(made.forecast_bytes, rel=0.02)
    deployed, plain = run.load_deployed().backbone, load_backbone(run.config.backbone)
    norms = set(plain.norms())
    for name, tensor in plain.state_dict().items():
        assert name in norms or torch.equal(deployed.state_dict()[name], tensor)
    both = fit(**{**words, "set": ["train.hold=nf4", "train.precision=bf16"]}, quiet=True,
               out=tmp_path / "both")  # fmt: skip
    assert math.isfinite(both.summary["metrics"]["deployed"][both.summary["primary_metric"]])


def test_an_adapter_is_merged_into_the_weights_of_the_file(tmp_path, text_options):
    words = {**text_options, "set": ["data.max_length=24", "train.hold=int8"], "steps": 3}
    run = fit(**words, method="lora", out=tmp_path / "run", quiet=True)
    plain = load_backbone(run.config.backbone, max_length=24).state_dict()
    adapter = load_file(run.path / "model" / "adapter.safetensors")
    delta = load_file(run.path / "model" / "delta.safetensors")
    merged = [name for name in delta if name.startswith("backbone.")]
    assert merged
    for name in merged:
        path = f"adapter.{name.removeprefix('backbone.').removesuffix('.weight')}"
        a, b = (adapter[f"{path}.lora_{x}.default.weight"] for x in "AB")
        wanted = plain[name.removeprefix("backbone.")] + 2.0 * b @ a  # alpha / rank
        torch.testing.assert_close(delta[name], wanted, rtol=1e-6, atol=1e-7)
    numbers = sum(delta[name].numel() for name in delta)
    assert run.summary["params"]["deployed_delta"] == numbers


def test_a_resumed_run_is_the_same(tmp_path, image_options):
    sets = ["train.hold=int8", "train.precision=bf16", "checkpoint.every=2", "train.eval_every=2"]
    run = fit(**{**image_options, "set": sets}, out=tmp_path / "run", quiet=True)
    whole = {path.name: path.read_bytes() for path in (run.path / "model").iterdir()}
    (run.path / "summary.json").unlink()
    again = fit(resume=run.path, quiet=True)  # from step 4 of 6
    assert {path.name: path.read_bytes() for path in (run.path / "model").iterdir()} == whole
    assert again.summary["memory"]["hold"] == "int8"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train": {"hold": "int4"}}, r"train\.hold: .*'bf16', 'int8' or 'nf4'"),
        ({"train": {"hold": "bf16", "precision": "bf16"}}, "is what train.precision=bf16 does"),
        ({"train": {"hold": "int8"}, "side": {"init": "fisher"}}, "of train.hold=int8 have none"),
    ],
)
def test_what_cannot_be_held_is_refused(config, said):
    with pytest.raises(UserError, match=said):
        check_config(config)


def test_full_fine_tuning_holds_nothing(tiny_vit):
    with pytest.raises(UserError, match=r"train\.hold=int8 does nothing with --method full"):
        method_of(tiny_vit, "full", hold="int8")
