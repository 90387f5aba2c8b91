"""The benchmark on real small models: ONNX Runtime and PyTorch, inputs, counts, report, chart."""

import io
import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from onnx import numpy_helper
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from mdpd_deploy.data.preprocess import TextPreprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.serve.latency.benchmark import Grid, run_benchmark
from mdpd_deploy.serve.latency.cells import Plan
from mdpd_deploy.serve.latency.chart import draw, write_chart
from mdpd_deploy.serve.latency.contention import Contention, Counters
from mdpd_deploy.serve.latency.gpu_state import gpu_state
from mdpd_deploy.serve.latency.inputs import InputSource, size_of
from mdpd_deploy.serve.latency.runtimes import (
    OnnxSession,
    TorchSession,
    choose_device,
    torch_threads,
)
from mdpd_deploy.serve.latency.table import render
from mdpd_deploy.serve.latency.variants import (
    RIVALS,
    rival_names,
    variants_of_bundle,
    variants_of_run,
)
from mdpd_deploy.serve.operations import count_flops, count_nodes, count_operators

BRIEF = Plan(openings=3, seconds=0.05, warmup_seconds=0.0, warmup_cap=0.0)
CLASSES = 3


def pictures(count):
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def source(tiny_run):
    return InputSource("test pictures", tiny_run.preprocess, CLASSES, pictures(20))


@pytest.fixture(scope="module")
def report(tiny_run, source, graphs):
    grid = Grid(("onnx", "torch"), (1, 2), "cpu", 1, BRIEF, seed=0)
    variants = variants_of_run(tiny_run, rival_names(["bare", "unipt", "sherl"]))
    about = {
        "kind": "run",
        "name": "tiny",
        "task": "digits",
        "method": "mdpd",
        "side": "unipt",
        "backbone": "tiny",
    }
    return run_benchmark(variants, source, grid, source=about, folder=graphs)


NAMES = ["deployed", "deployed (A/A)", "bare", "unipt", "sherl"]


def test_every_cell_has_every_variant_and_enough_times(report):
    cells = [(runtime, batch) for runtime in ("onnx", "torch") for batch in (1, 2)]
    assert [(r.runtime, r.batch, r.variant) for r in report.rows] == [
        (*cell, name) for cell in cells for name in NAMES
    ]
    raw = {(r.runtime, r.batch, r.variant): r.times_ns for r in report.raw}
    for row in report.rows:
        times = raw[row.runtime, row.batch, row.variant]
        assert row.n == len(times) >= BRIEF.fewest_rounds
        assert row.p50_ms == pytest.approx(np.median(times) / 1e6)
        assert row.items_per_s == pytest.approx(row.batch * row.n / (sum(times) / 1e9))
        assert row.p50_ms <= row.p90_ms <= row.p95_ms
        assert row.size == "3x16x16" and row.warmup["calls"] >= 8


def test_ratios_stay_inside_their_cell(report):
    raw = {(r.runtime, r.batch, r.variant): np.array(r.times_ns) for r in report.raw}
    assert len(report.ratios) == 4 * (len(NAMES) - 1)
    for ratio in report.ratios:
        cell = (ratio.runtime, ratio.batch)
        paired = np.log(raw[*cell, ratio.variant] / raw[*cell, "deployed"])
        (note,) = (note for note in report.cells if (note.runtime, note.batch) == cell)
        parts = np.split(paired, np.cumsum(note.openings)[:-1])
        assert len(note.openings) == 3 and sum(note.openings) == len(paired)
        medians = [np.median(part) for part in parts]
        assert ratio.openings == pytest.approx(np.exp(medians))
        assert ratio.median == pytest.approx(np.exp(np.mean(medians)))
        assert ratio.ci95[0] <= ratio.median <= ratio.ci95[1]
        assert ratio.control == (ratio.variant == "deployed (A/A)")
        assert ratio.over == "deployed"


def test_counts_show_what_a_side_network_adds_and_fading_removes(report):
    for ratio in report.ratios:
        if ratio.variant in ("bare", "deployed (A/A)"):
            assert ratio.nodes_ratio == ratio.flops_ratio == 1
        else:
            assert ratio.nodes_ratio > 1.2 and ratio.flops_ratio > 1.0
    parameters = {note.name: note.parameters for note in report.variants}
    assert parameters["deployed"] == parameters["bare"] < parameters["unipt"]
    assert {note.name for note in report.variants if note.untrained} == {"sherl"}


def test_the_deployed_graph_is_the_bare_one(report):
    assert report.identity.identical and report.identity.differences == []
    assert report.identity.nodes == report.rows[0].nodes


def test_latency_json_holds_the_contract_and_no_place_of_this_machine(report, tmp_path):
    report.write(tmp_path / "latency.json")
    text = (tmp_path / "latency.json").read_text(encoding="utf-8")
    plain = json.loads(text)
    assert plain == json.loads(json.dumps(report.to_dict()))
    cell = {"variant", "runtime", "precision", "batch"}
    times = {"size", "n", "p50_ms", "p95_ms", "p99_ms", "items_per_s", "nodes", "flops"}
    assert cell | times <= set(plain["rows"][0])
    assert cell | {"over", "median", "ci95"} <= set(plain["ratios"][0])
    assert plain["schema"] == "mdpd.latency/1" and plain["identity"]["identical"] is True
    assert {"versions", "cpu", "git_commit"} <= set(plain["machine"])
    assert plain["settings"]["seed"] == 0 and plain["settings"]["threads"] == 1
    assert len(plain["raw"]) == len(plain["rows"])
    assert os.getcwd() not in text and str(tmp_path.parent) not in text
    assert "raw" not in report.to_dict(raw=False)


def test_claims_name_runtime_device_and_batch(report):
    assert len(report.claims) == 2 * 3
    for claim in report.claims:
        assert claim.startswith(("onnx on cpu, fp32: ", "torch on cpu, fp32: "))
        assert "batch" in claim
    assert all("(untrained)" in claim for claim in report.claims if "sherl" in claim)


def test_the_table_fits_a_terminal_and_shows_every_model(report):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(report))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for name in ("deployed (A/A)", "bare", "unipt", "sherl*", "batch 2", "identity", "control"):
        assert name in text
    assert "below 100 rounds or 10 s" in text


def test_the_chart_is_a_real_svg_and_png(report, tmp_path):
    svg, png = write_chart(report, tmp_path)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    with Image.open(png) as picture:
        assert picture.width > 1000 and picture.height > 500
        assert len(picture.convert("RGB").resize((200, 100)).getcolors(200 * 100)) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latency.png", "latency.svg"]


def test_the_chart_shows_every_interval_whole(report):
    wide = deepcopy(report)
    torch_ratio = next(i for i, r in enumerate(wide.ratios) if r.runtime == "torch")
    wide.ratios[torch_ratio] = replace(wide.ratios[torch_ratio], median=3.0, ci95=(0.3, 4.5))
    for axis in draw(wide).axes:
        left, right = axis.get_xlim()
        assert left < 0.3 and right > 4.5
    labels = [text.get_text() for text in draw(wide).axes[0].get_yticklabels()]
    assert labels[:5] == ["batch 1", "deployed (A/A)", "bare", "unipt", "sherl*"]


def test_flops_equal_the_count_by_hand(tiny_run, source):
    model = tiny_run.load_deployed()
    arrays = source.batches(2, seed=0)[0]
    macs = 0

    def add(module, inputs, output):
        nonlocal macs
        if isinstance(module, nn.Linear):
            macs += output.numel() * module.in_features
        else:
            kernel = module.kernel_size[0] * module.kernel_size[1]
            macs += output.numel() * module.in_channels * kernel

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(add)
    flops = count_flops(model, arrays)
    rows, columns = model.backbone.grid
    tokens = rows * columns + model.backbone.prefix_tokens
    attention = 2 * 2 * tokens * tokens * model.backbone.width * model.backbone.depth  # QKᵀ and ·V
    assert flops == 2 * (macs + attention)


def test_operators_do_not_grow_with_the_batch(tiny_run, source):
    model = tiny_run.load_deployed()
    one, two = (count_operators(model, source.batches(size, seed=0)[0]) for size in (1, 2))
    # A ViT block runs 2 norms, 4 products, 1 attention, 1 activation, 2 sums at the least.
    assert one == two >= 10 * model.backbone.depth


def test_both_runtimes_time_the_same_computation(tiny_run, source, report, graphs):
    batches = source.batches(2, seed=0)
    model = tiny_run.load_deployed()
    onnx_call = OnnxSession(graphs / "deployed.onnx", device="cpu", threads=1).prepare(batches)
    torch_call = TorchSession(model, ("pixel_values",), device="cpu").prepare(batches)
    for index in range(len(batches)):
        (found,) = onnx_call(index)
        np.testing.assert_allclose(found, torch_call(index).numpy(), atol=1e-4)


def with_other_weights(graph):
    def write(path):
        proto = onnx.load(graph)
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                values = numpy_helper.to_array(tensor) * 2
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save_model(proto, path)
        return path

    return write


def with_another_attribute(graph):
    def write(path):
        proto = onnx.load(graph)
        norm = next(node for node in proto.graph.node if node.op_type == "LayerNormalization")
        next(a for a in norm.attribute if a.name == "epsilon").f = 0.5
        onnx.save_model(proto, path)
        return path

    return write


@pytest.mark.parametrize("same", [True, False])
def test_a_bundle_without_its_run_is_compared_with_bare_only(
    source, report, graphs, tmp_path, same
):
    graph = graphs / "deployed.onnx"
    write_bare = (with_other_weights if same else with_another_attribute)(graph)
    grid = Grid(("onnx",), (1,), "cpu", 1, BRIEF, seed=0)
    synthetic = InputSource("random", source.preprocess, CLASSES)
    variants = variants_of_bundle(graph, write_bare, rival_names(["bare"]))
    found = run_benchmark(variants, synthetic, grid, source={}, folder=tmp_path)
    assert [row.variant for row in found.rows] == NAMES[:3]
    assert found.identity.identical is same and bool(found.identity.differences) is not same
    assert found.rows[0].flops is None
    assert found.rows[0].nodes == count_nodes(graph) == report.rows[0].nodes
    with pytest.raises(UserError, match="bundle without its run can only be compared with bare"):
        variants_of_bundle(graph, write_bare, rival_names(["bare", "unipt"]))


def test_rivals_of_other_methods_are_built_from_any_run(tiny_run):
    names = ["full", "lora", "lora-unmerged", "prompt", "sherl-multi"]
    variants = variants_of_run(tiny_run, rival_names(names))[2:]
    models = {variant.name: variant.load() for variant in variants if variant.load}
    assert list(models) == names and not any(trained for _, trained in models.values())
    arrays = tiny_run.preprocess(pictures(2))
    counts = {name: count_operators(model, arrays) for name, (model, _) in models.items()}
    bare = count_operators(tiny_run.load_bare(), arrays)
    assert counts["full"] == counts["lora"] == bare
    assert min(counts["lora-unmerged"], counts["prompt"], counts["sherl-multi"]) > bare
    with pytest.raises(UserError, match=r"prefix: .* use --method prompt"):
        RIVALS["prefix"].load(tiny_run)


def test_rival_names():
    assert rival_names(["bare", "side:unipt", "unipt", " sherl"]) == ("bare", "unipt", "sherl")
    with pytest.raises(UserError, match=r"--rivals: unknown 'uniptt'\. Did you mean 'unipt'"):
        rival_names(["uniptt"])


def test_real_inputs_are_distinct_and_repeat_only_when_they_must(source):
    batches = source.batches(2, seed=0, sets=8)
    assert [batch["pixel_values"].shape for batch in batches] == [(2, 3, 16, 16)] * 8
    pixels = np.concatenate([batch["pixel_values"] for batch in batches])
    assert len(np.unique(pixels.reshape(16, -1), axis=0)) == 16
    assert len(np.concatenate([b["pixel_values"] for b in source.batches(32, seed=0)])) == 8 * 32
    again = source.batches(2, seed=0, sets=8)
    np.testing.assert_array_equal(batches[3]["pixel_values"], again[3]["pixel_values"])


def test_synthetic_pictures_look_normalised(source):
    batches = InputSource("random", source.preprocess, CLASSES).batches(16, seed=0)
    pixels = np.concatenate([batch["pixel_values"] for batch in batches])
    assert pixels.dtype == np.float32 and pixels.shape == (128, 3, 16, 16)
    assert abs(pixels.mean()) < 0.02 and abs(pixels.std() - 1) < 0.02


@pytest.mark.parametrize("pad", ["longest", "max"])
def test_synthetic_texts_have_several_lengths_and_right_padding(pad):
    words = {f"w{index}": index for index in range(50)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    names = ("input_ids", "attention_mask")
    preprocess = TextPreprocess(tokenizer, names, max_length=24, pad_id=7, pad=pad)
    batches = InputSource("random", preprocess, 2).batches(4, seed=0)
    for arrays in batches:
        assert tuple(arrays) == names
        mask, tokens = arrays["attention_mask"], arrays["input_ids"]
        lengths = mask.sum(axis=1)
        assert lengths.min() >= 4 and len(set(lengths)) > 1
        assert (np.diff(mask, axis=1) <= 0).all()
        assert (tokens[mask == 0] == 7).all() and tokens.max() < 50
        assert tokens.shape[1] == (24 if pad == "max" else lengths.max())
    assert size_of(batches) == ("24 tokens" if pad == "max" else size_of(batches))
    assert size_of(batches).endswith(" tokens")


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_never_replaced_in_silence():
    assert choose_device("auto", ("onnx", "torch")) == "cpu"
    for runtime in ("onnx", "torch"):
        with pytest.raises(UserError, match="--device cuda"):
            choose_device("cuda", (runtime,))
    with pytest.raises(UserError, match="--device"):
        choose_device("tpu", ("onnx",))


def test_the_state_of_gpus_is_read_from_the_drivers_tool(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$1" in *compute-apps*) echo 11; echo 12;;\n'
        '*) echo "0, NVIDIA X, 580.1, 1980 MHz, 2619 MHz, 70 W, 700 W, 33, 0 %, 0x0";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (gpu,) = gpu_state()
    assert gpu["name"] == "NVIDIA X" and gpu["clocks.sm"] == "1980 MHz"
    assert gpu["power.limit"] == "700 W" and gpu["compute_processes_on_machine"] == "2"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpu_state() == []


def shown_whole(figure):
    """Every text of a drawn figure lies inside it; return the texts."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    ticks = {
        tick for axis in figure.axes for tick in axis.get_xticklabels()
    }  # some beyond the ends
    texts = [text for text in figure.findobj(Text) if text.get_text() and text not in ticks]
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, (text.get_text(), box)
    return [text.get_text() for text in texts]


def only(report, runtime, **changes):
    """The report of one runtime, on a processor with a long name."""
    cut = deepcopy(report)
    cut.ratios = [replace(r, **changes.get(r.variant, {})) for r in cut.ratios]
    cut.ratios = [ratio for ratio in cut.ratios if ratio.runtime == runtime]
    cut.rows = [row for row in cut.rows if row.runtime == runtime]
    cut.machine["cpu"] = "AMD EPYC 9R14 96-Core Processor with a long name, as they have"
    cut.warnings = [Contention(0.4, 0.1).words]
    return cut


def test_the_chart_of_one_runtime_is_not_cropped(report):
    said = shown_whole(draw(only(report, "onnx")))
    assert any("this machine was busy" in text.replace("\n", " ") for text in said)
    shown_whole(draw(report))


def test_one_wide_interval_does_not_squeeze_the_others(report):
    wide = only(report, "onnx", unipt={"median": 1.5, "ci95": (0.001, 1752.0)})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(wide))
    assert "1.50× 0.00-100+" in console.export_text()
    figure = draw(wide)
    assert any(text.endswith("×, to 1752×") for text in shown_whole(figure))
    left, right = figure.axes[0].get_xlim()
    assert right - left < 4 * max(ratio.median for ratio in wide.ratios)


def test_a_busy_machine_is_said():
    start = Counters(100.0, 60.0, 1.0, 50.0)
    seen = start.until(Counters(120.0, 75.0, 2.0, 55.0))
    assert (seen.others, seen.stolen) == pytest.approx((0.5, 0.05))
    assert "busy: other programs 50% and the host 5% of all processors' time" in seen.words
    assert start.until(Counters(120.0, 70.0, 1.0, 60.0)).words is None  # all of it our own
    assert start.until(start).words is None


def test_the_processors_counters_tell_others_work_from_our_own():
    before = Counters.now()
    burn = "import time; end = time.process_time() + 1.5\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-S", "-c", burn], check=True)  # a child counts as ours
    after = Counters.now()
    assert after.own - before.own >= 1.4
    assert after.used - before.used >= 0.9 * (after.own - before.own)
    assert after.total > before.total


def test_the_report_says_how_busy_the_machine_was(report):
    assert set(report.machine["contention"]) == {"others", "stolen"}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(only(report, "onnx")))
    assert "this machine was busy" in console.export_text()
