"""The behaviours that every method shares, with every side network that it can use.

Which ones there are comes from the registries: what is registered runs here. `ROWS` is the one
table of what is expected of a method, said in other words than the method's own; a side network
needs no row.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from mdpd_deploy import fit
from mdpd_deploy.adapters import LAYERS
from mdpd_deploy.adapters.lora import Lora
from mdpd_deploy.backbones import Backbone, load_backbone
from mdpd_deploy.checks.parity import compare_with_torch
from mdpd_deploy.checks.reference import shape_batches
from mdpd_deploy.config import check_config
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.model import Deployed
from mdpd_deploy.runtimes.onnx import OnnxRunner
from mdpd_deploy.sides import SIDES, SideNetwork, SideOutput
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train import apply_entry, default_entries, parse_entry
from mdpd_deploy.train.checkpoint import load_best
from mdpd_deploy.train.memory.forecast import forecast
from mdpd_deploy.train.methods import METHODS, Batch, build_method
from mdpd_deploy.train.methods.peft import adapter_method
from mdpd_deploy.train.optim import build_optimizer
from mdpd_deploy.train.setup import prepare

Names = Callable[[Backbone], Iterable[str]]


def ending(*ends: str) -> Names:
    return lambda backbone: [n for n, _ in backbone.named_parameters() if n.endswith(ends)]


def biases(backbone: Backbone) -> list[str]:
    return [name for name in ending(".bias")(backbone) if "embed" not in name]


@dataclass(frozen=True)
class Row:
    """What is expected of a method.

    Attributes:
        changes: Names of the backbone's tensors whose values differ in what is deployed.
        kinds: The data that it takes.
    """

    changes: Names = lambda _: ()
    kinds: tuple[str, ...] = ("image", "text")


NORMS = Row(Backbone.norms)
LOW_RANK = Row(ending("query.weight", "value.weight", "qkv.weight"))
ROWS = {
    "mdpd": NORMS,
    "norms": NORMS,
    "bitfit": Row(biases),
    "full": Row(ending("")),
    "lora": LOW_RANK,
    "adalora": LOW_RANK,
    # biases are scaled too, and stay: those of a tiny encoder are all zero
    "ia3": Row(ending("key.weight", "value.weight", "qkv.weight", "fc2.weight",
                      *(f"{block}.output.dense.weight" for block in range(3)))),
    "prefix": Row(kinds=("text",)),
}  # fmt: skip


def row_of(label):
    """The row of a method; without one it leaves the backbone as it is."""
    return ROWS.get(parse_entry(label).method, Row())


CASES = [(entry.label, kind) for entry in default_entries() for kind in row_of(entry.label).kinds]


@pytest.fixture(scope="module")
def folders(tiny_vit, tiny_bert):
    return {"image": tiny_vit, "text": tiny_bert}


@pytest.fixture(scope="module")
def options_of(image_options, text_options):
    return {"image": image_options, "text": text_options}


def config_of(label, folder):
    base = {"backbone": {"name": str(folder)}, "data": {"max_length": 24}, "train": {"batch": 16}}
    return apply_entry(check_config({**base, "side": {"reduction": 2}}), parse_entry(label))


def build(label, folder):
    config = config_of(label, folder)
    torch.manual_seed(0)
    backbone = load_backbone(config.backbone, max_length=24)
    return build_method(backbone, Classify.numbered(3), config)


# --- trains only what it says --------------------------------------------------------------------


def check_steps(label, folder):
    method = build(label, folder)
    before = {name: tensor.clone() for name, tensor in method.backbone.state_dict().items()}
    head = [
        p.clone() for p in method.groups["head" if "head" in method.groups else "side"].values()
    ]
    method.train_mode()
    optimizer = build_optimizer(method)
    inputs = method.backbone.example_inputs(6, 9)
    for step in range(2):  # what starts at zero hides its partner from the first
        method.step(Batch(inputs, torch.arange(6) % 3, np.arange(6), step, 6.0, 6.0))
        optimizer.step()
        optimizer.zero_grad()
    after = method.backbone.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved == set(method.backbone_weights)
    if label not in LAYERS:
        plain = load_backbone(method.config.backbone, max_length=24)
        assert moved == set(row_of(label).changes(plain))
    trained = method.groups["head" if "head" in method.groups else "side"].values()
    assert any(not torch.equal(old, new) for old, new in zip(head, trained, strict=True))


@pytest.mark.parametrize(("label", "kind"), CASES)
def test_steps_move_only_what_the_method_trains(label, kind, folders):
    check_steps(label, folders[kind])


# --- padding -------------------------------------------------------------------------------------


def check_padding(label, folder):
    method = build(label, folder)
    for group in method.groups.values():
        for parameter in group.values():  # also what starts at 0
            parameter.data += 0.1 * torch.randn_like(parameter)
    method.eval_mode()
    inputs = method.backbone.example_inputs(3, 9)
    longer = {name: nn.functional.pad(tensor, (0, 5)) for name, tensor in inputs.items()}
    with torch.no_grad():
        plain, padded = method.outputs(inputs), method.outputs(longer)
    for name, answer in plain.items():
        torch.testing.assert_close(padded[name], answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [label for label, kind in CASES if kind == "text"])
def test_padding_changes_no_answer(label, folders):
    check_padding(label, folders["text"])


# --- forecast = measured -------------------------------------------------------------------------


def check_forecast(label, folder, real_peak):
    config = config_of(label, folder)
    real = real_peak(config)
    predicted = forecast(config, Classify.numbered(3))
    assert predicted.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    for name in ("weights", "trained", "optimizer_state", "batch"):
        assert predicted.parts.get(name) == real.parts.get(name)
    assert sum(predicted.parts.values()) == predicted.peak_bytes


@pytest.mark.parametrize(("label", "kind"), CASES)
def test_forecast_equals_a_real_step(label, kind, folders, real_peak):
    check_forecast(label, folders[kind], real_peak)


# --- a run: saved and loaded, exported -----------------------------------------------------------


def train(label, options, out):
    entry = parse_entry(label)
    sets = [line for line in options.get("set", ()) if not line.startswith("side.")]
    steps = 6 if label in LAYERS else 2  # an update of two factors starts slowly
    words = {**options, "method": entry.method, "steps": steps, "lr": 0.02, "quiet": True}
    if entry.side is not None:
        words["side"] = entry.side
        sets += ["side.reduction=2"] if "reduction" in SIDES[entry.side].options else []
    return fit(out=out, **{**words, "set": sets})


def check_reload(label, run):
    """What is loaded answers as what was trained, and differs from the backbone as it may."""
    trained = prepare(run.config).method
    load_best(run.path / "checkpoints", trained)
    trained.eval_mode()
    model, fresh = run.load_deployed(), run.load_backbone()
    inputs = model.backbone.example_inputs(3)
    with torch.no_grad():
        expected = trained.outputs(inputs)
        close = dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(*inputs.values()), expected["deployed"], **close)
        bare = run.load_bare()(*inputs.values())
        if "side" in expected:
            beside, own = run.load_with_side()
            assert own
            torch.testing.assert_close(beside(*inputs.values()), expected["side"], **close)
    plain = fresh.state_dict()
    deployed = model.backbone.state_dict()
    changed = {name for name in plain if not torch.equal(deployed[name], plain[name])}
    assert changed == set(row_of(label).changes(fresh))
    if changed or run.keeps:
        assert (bare - expected["deployed"]).abs().max() > 1e-4


def check_export(run, folder):
    """What stays beside the backbone is exported equal; else the deployed graph is the bare one."""
    model = run.load_deployed()
    if run.keeps:
        pytest.importorskip("onnxruntime", reason="runs exported graphs")
        graph = export_onnx(model, folder / "model.onnx")
        batches = list(shape_batches(model))
        assert compare_with_torch(model, OnnxRunner(graph.path), batches).passed
        return
    assert type(model) is Deployed
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in run.load_bare().state_dict().items()}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory, options_of):
    label, kind = request.param
    return label, train(label, options_of[kind], tmp_path_factory.mktemp("run") / "run")


def test_a_run_is_loaded_as_it_was_trained(case):
    check_reload(*case)


def test_a_run_is_exported_as_it_was_trained(case, tmp_path):
    check_export(case[1], tmp_path)


# --- something new -------------------------------------------------------------------------------


class ToySide(SideNetwork):
    """A bottleneck on the last tap; s_l is each tap through its narrow half."""

    options = ("rank",)

    def __init__(self, width, depth, rank):
        super().__init__()
        self.width, self.last_tap = rank, depth
        self.feature_layers = tuple(range(1, depth + 1))
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)

    @classmethod
    def build(cls, shape, config):
        return cls(shape.width, shape.depth, config.rank)

    def forward(self, taps, mask, run_block):
        features = {layer: self.down(taps[layer]) for layer in self.feature_layers}
        return SideOutput(self.up(features[self.last_tap]), features)


class ToyAdapter(Lora):
    """LoRA by another name."""


def check_everything(label, folders, options_of, real_peak, tmp_path):
    assert label in [entry.label for entry in default_entries()]
    check_steps(label, folders["text"])
    check_padding(label, folders["text"])
    check_forecast(label, folders["text"], real_peak)
    run = train(label, options_of["text"], tmp_path / "run")
    check_reload(label, run)
    check_export(run, tmp_path)


@pytest.mark.parametrize("method", ["side", "mdpd"])
def test_a_new_side_network_is_one_class_and_one_registry_line(
    method, monkeypatch, folders, options_of, real_peak, tmp_path
):
    monkeypatch.setitem(SIDES, "toy", ToySide)
    check_everything(f"{method}:toy", folders, options_of, real_peak, tmp_path)


def test_a_new_adapter_is_one_class_one_registry_line_and_one_row(
    monkeypatch, folders, options_of, real_peak, tmp_path
):
    monkeypatch.setitem(LAYERS, "toy", ToyAdapter)
    monkeypatch.setitem(METHODS, "toy", adapter_method(ToyAdapter))  # as is done with all of LAYERS
    monkeypatch.setitem(ROWS, "toy", LOW_RANK)
    check_everything("toy", folders, options_of, real_peak, tmp_path)
