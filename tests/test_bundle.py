"""Bundles: what is accepted, what is refused and in which words, and how one is used."""

import json
import os
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import save_file

from mdpd_deploy import load_bundle
from mdpd_deploy.artifacts.bundle import is_bundle
from mdpd_deploy.artifacts.golden import Golden, keep_raw, load_golden, replay, spread_evenly
from mdpd_deploy.artifacts.manifest import graph_notes
from mdpd_deploy.artifacts.sealed import read_checked, seal
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.checks.reference import torch_outputs
from mdpd_deploy.config import BackboneConfig
from mdpd_deploy.data.preprocess import ImagePreprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.model import Deployed
from mdpd_deploy.runtimes import onnx as runner
from mdpd_deploy.runtimes.base import only
from mdpd_deploy.runtimes.onnx import open_session
from mdpd_deploy.tasks import Classify, Regress
from mdpd_deploy.tasks.head import Head

onnxruntime = pytest.importorskip("onnxruntime", reason="runs exported graphs")

LABELS = ["ant", "bee", "cat"]
PORT = {"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 16, 16]}


@pytest.fixture(scope="module")
def model(tiny_vit):
    torch.manual_seed(0)
    backbone = load_backbone(BackboneConfig(name=str(tiny_vit)))
    for parameter in backbone.norms().values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    made = Deployed(backbone, Head(32, 3)).eval()
    torch.nn.init.normal_(made.head.linear.weight)
    return made


@pytest.fixture(scope="module")
def sealed(model, tmp_path_factory):
    """A bundle written by the parts that export uses."""
    folder = tmp_path_factory.mktemp("bundle") / "b"
    (folder / "preprocessor").mkdir(parents=True)
    graph = export_onnx(model, folder / "model.onnx")
    model.backbone.preprocess.save(folder / "preprocessor")
    facts = {
        "task": "classify",
        "kind": "classify",
        "fields": ["image"],
        "method": "mdpd",
        "faded": True,
        "labels": LABELS,
        "metrics": ["accuracy"],
        "data": {"columns": ["image"], "seed": 0, "options": {}},
        "preprocess": json.loads((folder / "preprocessor" / "preprocess.json").read_text()),
        "graphs": [
            {
                "name": "model",
                "file": "model.onnx",
                "inputs": [PORT],
                "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 3]}],
                "shapes": {"batch": {"min": 1, "opt": 8, "max": 32}},
                "opset": 20,
                "nodes": graph.nodes,
            }
        ],
        "pipeline": "single",
        "precision": "fp32",
        "engine": {"status": "not-asked"},
        "verification": {},
        "source": {"run": "r"},
        "versions": {},
    }
    proto = onnx.load(graph.path)
    onnx.helper.set_model_props(proto, graph_notes(facts))
    onnx.save(proto, graph.path)
    zeros = {
        f"backbone.{name}": np.zeros(p.shape, "f4") for name, p in model.backbone.norms().items()
    }
    save_file(zeros, folder / "bare_norms.safetensors")
    seal(folder, facts)
    return folder


@pytest.fixture
def bundle(sealed, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(sealed, tmp_path / "b")


def pictures(count=3):
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)
    ]


def test_a_sound_bundle_predicts_what_torch_predicts(bundle, model):
    loaded = load_bundle(bundle)
    assert is_bundle(bundle) and loaded.kind == "classify"
    assert loaded.label_names == tuple(LABELS)
    found = loaded.predict(pictures(5), batch=2)
    logits = torch_outputs(model, loaded.preprocess(pictures(5)))["logits"]
    expected = torch.from_numpy(logits).softmax(dim=1)
    for prediction, row in zip(found, expected, strict=True):
        assert prediction.label == LABELS[int(row.argmax())]
        assert prediction.probability == pytest.approx(float(row.max()), abs=1e-5)
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert list(prediction.probabilities) == [LABELS[i] for i in row.argsort(descending=True)]
    assert loaded.predict([]) == []


def rewrite(bundle, change):
    plain = json.loads((bundle / "manifest.json").read_text())
    change(plain)
    (bundle / "manifest.json").write_text(json.dumps(plain))


def rewrite_graph(bundle, change):
    rewrite(bundle, lambda plain: change(plain["graphs"][0]))


def flip_a_byte(bundle):
    path = bundle / "model.onnx"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def relist(bundle, name):
    """Bring the manifest up to date, as someone who tampers would."""
    import hashlib

    raw = (bundle / name).read_bytes()
    entry = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    rewrite(bundle, lambda plain: plain["files"].update({name: entry}))


def external_outside(bundle):
    """A graph whose weights are read from a file that is not the bundle's."""
    proto = onnx.load(bundle / "model.onnx")
    onnx.save(
        proto, bundle / "model.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    (bundle / "w").rename(bundle.parent / "w")
    proto = onnx.load(bundle / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../w" if entry.key == "location" else entry.value
    (bundle / "model.onnx").write_bytes(proto.SerializeToString())
    relist(bundle, "model.onnx")


def external_past_the_end(bundle):
    proto = onnx.load(bundle / "model.onnx")
    onnx.save(
        proto, bundle / "model.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    (bundle / "w").write_bytes((bundle / "w").read_bytes()[:-8])
    relist(bundle, "model.onnx")
    relist(bundle, "w")


def other_labels(bundle):
    rewrite(bundle, lambda plain: plain.update(labels=["cat", "bee", "ant"]))


def other_preprocessing(bundle):
    path = bundle / "preprocessor" / "preprocess.json"
    path.write_text(path.read_text().replace("bicubic", "nearest").replace("bilinear", "nearest"))
    relist(bundle, "preprocessor/preprocess.json")


def move_out_and_link(bundle):
    outside = bundle.parent / "model.onnx"
    (bundle / "model.onnx").rename(outside)
    (bundle / "model.onnx").symlink_to(outside)


def move_out_and_hard_link(bundle):
    outside = bundle.parent / "model.onnx"
    (bundle / "model.onnx").rename(outside)
    os.link(outside, bundle / "model.onnx")


def link_a_folder(bundle):
    (bundle / "preprocessor").rename(bundle.parent / "p")
    (bundle / "preprocessor").symlink_to(bundle.parent / "p", target_is_directory=True)


DAMAGE = {
    "flipped byte": (flip_a_byte, "model.onnx is not the file that was exported"),
    "missing file": (lambda b: (b / "model.onnx").unlink(), "model.onnx is missing"),
    "unlisted file": (lambda b: (b / "model.plan").write_bytes(b"x"), "model.plan is not listed"),
    "symbolic link": (move_out_and_link, "model.onnx is a symbolic link"),
    "hard link": (move_out_and_hard_link, "model.onnx is a hard link"),
    "linked folder": (link_a_folder, "preprocessor is a symbolic link"),
    "named pipe": (lambda b: os.mkfifo(b / "pipe"), "pipe is not a regular file"),
    "schema": (lambda b: rewrite(b, lambda p: p.update(schema="3.0")), "bundle schema '3.0'"),
    "a schema of no text": (
        lambda b: rewrite(b, lambda p: p.update(schema="\ud800\n")),
        r"bundle schema '\ud800\n'",
    ),
    "no schema": (lambda b: rewrite(b, lambda p: p.pop("schema")), "not a manifest of mdpd-deploy"),
    "too deep": (lambda b: (b / "manifest.json").write_text("[" * 200_000), "not readable JSON"),
    "a number of 5000 digits": (
        lambda b: (b / "manifest.json").write_text('{"schema": ' + "9" * 5000 + "}"),
        "not readable JSON",
    ),
    "a giant manifest": (
        lambda b: (b / "manifest.json").write_bytes(b" " * 17_000_000),
        "manifest.json is larger than any",
    ),
    "a name with a line break": (lambda b: (b / "a\nb").write_bytes(b""), "a\\nb is not listed"),
    "a falling range": (
        lambda b: rewrite_graph(b, lambda g: g["shapes"].update(batch=dict(min=9, opt=1, max=1))),
        "damaged at 'graphs.0.shapes.batch'",
    ),
    "other ports": (
        lambda b: rewrite_graph(b, lambda g: g["inputs"][0].update(shape=["batch", 3, 99, 99])),
        "inputs or outputs of model.onnx contradict",
    ),
    "not JSON": (lambda b: (b / "manifest.json").write_text("{"), "not readable JSON"),
    "a list": (lambda b: (b / "manifest.json").write_text("[]"), "not a manifest of mdpd-deploy"),
    "missing field": (lambda b: rewrite(b, lambda p: p.pop("labels")), "damaged at 'labels'"),
    "wrong type": (lambda b: rewrite(b, lambda p: p.update(files=[])), "damaged at 'files'"),
    "foreign path": (
        lambda b: rewrite(
            b, lambda p: p["files"].update({"../x": {"sha256": "0" * 64, "bytes": 0}})
        ),
        "../x is missing",
    ),
    "weights elsewhere": (external_outside, "lies outside the bundle's files"),
    "weights cut short": (external_past_the_end, "lies outside the bundle's files"),
    "other labels": (other_labels, "the notes inside model.onnx contradict manifest.json"),
    "other preprocessing": (other_preprocessing, "preprocessor/ contradicts manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_bundle_is_refused_in_one_sentence(name, bundle):
    damage, words = DAMAGE[name]
    damage(bundle)
    with pytest.raises(UserError) as refused:
        load_bundle(bundle)
    message = str(refused.value)
    assert words in message and str(bundle) in message and "\n" not in message
    assert refused.value.exit_code == 2


def test_a_foreign_folder_is_refused(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"is not a bundle.*mdpd export"):
            load_bundle(path)


def test_a_later_minor_schema_is_read(bundle):
    rewrite(bundle, lambda plain: plain.update(schema="2.7", something_new={"x": 1}))
    assert load_bundle(bundle).manifest["something_new"] == {"x": 1}


def test_random_bytes_in_the_manifest_never_crash(bundle):
    rng = np.random.default_rng(0)
    sound = (bundle / "manifest.json").read_bytes()
    for _ in range(60):
        raw = bytearray(sound)
        for place in rng.integers(0, len(raw), 3):
            raw[place] = rng.integers(0, 256)
        (bundle / "manifest.json").write_bytes(raw)
        try:
            read_checked(bundle)
        except UserError:
            continue


@pytest.fixture
def two_graphs(bundle):
    """A bundle with a second graph, whose weight lies in the file that its graphs share."""
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    info, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    product = onnx.helper.make_node("MatMul", ["x", "w"], ["mapped"], name="map")
    least = onnx.helper.make_node("ReduceMin", ["x"], ["least"], name="least", keepdims=1)
    ports = {"x": ["batch", 4], "mapped": ["batch", 3], "least": [1, 1]}
    values = {name: info(name, float32, shape) for name, shape in ports.items()}
    outputs = [values["mapped"], values["least"]]
    graph = onnx.helper.make_graph([product, least], "g", [values["x"]], outputs, [weight])
    proto = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(proto, bundle / "extra.onnx", save_as_external_data=True, location="model.onnx.data",
              size_threshold=0)  # fmt: skip
    plain = json.loads((bundle / "manifest.json").read_text())
    facts = {k: v for k, v in plain.items() if k not in ("schema", "files", "caches")}
    told = [{"name": n, "dtype": "float32", "shape": shape} for n, shape in ports.items()]
    entry = {"name": "extra", "file": "extra.onnx", "inputs": told[:1], "outputs": told[1:]}
    shapes = {"batch": {"min": 1, "opt": 1, "max": 2}}
    facts["graphs"].append({**entry, "shapes": shapes, "opset": 20, "nodes": 2})
    seal(bundle, facts)
    return bundle


def test_every_graph_of_a_bundle_is_run_by_its_name(two_graphs, sealed):
    both, alone = load_bundle(two_graphs), load_bundle(sealed)
    assert [both.graph(name)["file"] for name in ("model", "extra")] == ["model.onnx", "extra.onnx"]
    x = np.array([[1, 0, 0, 2]], dtype=np.float32)
    found = both.runner(graph="extra")({"x": x})
    np.testing.assert_array_equal(found["mapped"], [[18, 21, 24]])
    assert found["least"].tolist() == [[0]]
    assert both.predict(pictures()) == alone.predict(pictures())
    with pytest.raises(UserError, match=r"graph: unknown 'head'.*extra, model"):
        both.runner(graph="head")
    with pytest.raises(UserError, match=r"one output is asked for.* mapped, least"):
        only(found)


EXTRA_DAMAGE = {
    "its file": (lambda b: (b / "extra.onnx").unlink(), "extra.onnx is missing"),
    "shared weights": (
        lambda b: (b / "model.onnx.data").write_bytes(b"\1" * 48),
        "model.onnx.data is not the file that was exported",
    ),
    "its ports": (
        lambda b: rewrite(b, lambda p: p["graphs"][1]["outputs"].reverse()),
        "inputs or outputs of extra.onnx contradict",
    ),
    "two of one name": (
        lambda b: rewrite(b, lambda p: p["graphs"][1].update(name="model")),
        "graphs of one name",
    ),
    "none that answers": (
        lambda b: rewrite(b, lambda p: p["graphs"].pop(0)),
        "two graphs of one name, or no model.onnx",
    ),
    "a file elsewhere": (
        lambda b: rewrite(b, lambda p: p["graphs"][1].update(file="../extra.onnx")),
        "damaged at 'graphs.1.file'",
    ),
}


@pytest.mark.parametrize("name", EXTRA_DAMAGE)
def test_a_second_graph_is_checked_as_the_first(name, two_graphs):
    damage, words = EXTRA_DAMAGE[name]
    damage(two_graphs)
    with pytest.raises(UserError) as refused:
        load_bundle(two_graphs)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_golden_vectors_of_several_outputs_come_back_by_name(tmp_path):
    outputs = {"vector": np.ones((2, 3, 4), np.float32), "share": np.zeros((2, 1), np.float32)}
    Golden(("a", "b"), {"x": np.ones((2, 4), np.int64)}, outputs).save(tmp_path / "g")
    found = load_golden(tmp_path / "g", names=["vector", "share"]).outputs
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in outputs.items()
    }
    with pytest.raises(UserError, match="holds no golden vectors"):
        load_golden(tmp_path / "g", names=["vector", "other"])


def test_the_bare_graph_has_the_bare_norms(bundle, tmp_path):
    loaded = load_bundle(bundle)
    path = loaded.write_bare_graph(tmp_path / "bare.onnx")
    before = {t.name: t for t in onnx.load(bundle / "model.onnx").graph.initializer}
    after = {t.name: t for t in onnx.load(path).graph.initializer}
    changed = {n for n in after if after[n].SerializeToString() != before[n].SerializeToString()}
    assert changed and all("norm" in name for name in changed)
    assert all(not numpy_helper.to_array(after[name]).any() for name in changed)


def test_a_bundle_without_bare_norms_says_so(bundle, tmp_path):
    (bundle / "bare_norms.safetensors").unlink()
    rewrite(bundle, lambda plain: plain["files"].pop("bare_norms.safetensors"))
    with pytest.raises(UserError, match="cannot give the bare backbone"):
        load_bundle(bundle).write_bare_graph(tmp_path / "bare.onnx")


def test_the_wrong_kind_of_input_is_named(bundle):
    with pytest.raises(UserError, match="takes pictures, not text"):
        load_bundle(bundle).predict(["a sentence"])


def test_a_score_is_read_as_it_is():
    prediction = Regress().decode({"scores": np.array([[3.25]], dtype=np.float32)})[0]
    assert prediction.to_json() == {"score": 3.25}
    assert prediction.label is None and prediction.probability is None


def test_large_logits_do_not_overflow():
    prediction = Classify(tuple(LABELS)).decode(
        {"logits": np.array([[1e4, -1e4, 0]], dtype=np.float32)}
    )[0]
    assert prediction.probability == 1 and prediction.label == "ant"
    assert prediction.to_json(top=2)["top"][1] == {"label": "cat", "probability": 0}


def test_norms_run_unfused_on_a_cpu(tiny_text_bundle, tmp_path, monkeypatch):
    """The fusion's kernel is slower there (benchmarks/norm_fusion.py); without the rule it is made."""

    class Kept(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            self.optimized_model_filepath = str(tmp_path / "optimized.onnx")

    def operators():
        open_session(tiny_text_bundle.path / "model.onnx", "cpu", 1)
        graph = onnx.load(tmp_path / "optimized.onnx").graph
        return {node.op_type for node in graph.node}

    monkeypatch.setattr(onnxruntime, "SessionOptions", Kept)
    assert "LayerNormalization" in operators() and "SkipLayerNormalization" not in operators()
    monkeypatch.setattr(runner, "SLOW_FUSIONS", {})
    assert "SkipLayerNormalization" in operators()


def test_golden_vectors_come_back_and_catch_another_preprocessing(bundle, model, tmp_path):
    loaded = load_bundle(bundle)
    raws = tuple(keep_raw(raw) for raw in pictures(4))
    arrays = loaded.preprocess(raws)
    path = tmp_path / "golden.safetensors"
    Golden(raws, arrays, torch_outputs(model, arrays)).save(path)
    golden = load_golden(path, names=["logits"])
    assert [np.asarray(raw).tolist() for raw in golden.raws] == [
        np.asarray(r).tolist() for r in raws
    ]
    same = replay(golden, loaded.preprocess, loaded.runner(), {"logits": 1.0})
    assert same.preprocessing_diff == 0 and same.output_diff < 1e-4
    own = loaded.preprocess
    assert isinstance(own, ImagePreprocess)
    other = ImagePreprocess(own.size, own.mean, own.std, interpolation="nearest")
    assert replay(golden, other, loaded.runner(), {"logits": 1.0}).preprocessing_diff > 0.05


def test_golden_texts_come_back(tmp_path):
    raws = ("Grüße, 東京 🙂", ("first", "second"), "")
    outputs = {"logits": np.zeros((3, 2), dtype=np.float32)}
    Golden(raws, {"input_ids": np.ones((3, 4), dtype=np.int64)}, outputs).save(tmp_path / "g")
    assert load_golden(tmp_path / "g").raws == raws
    (tmp_path / "g").write_bytes(b"broken")
    with pytest.raises(UserError, match="holds no golden vectors"):
        load_golden(tmp_path / "g")


def test_golden_inputs_are_spread_and_not_too_large():
    assert spread_evenly([str(i) for i in range(100)], 4) == ["0", "33", "66", "99"]
    assert spread_evenly(["a", "b"], 8) == ["a", "b"]
    large = keep_raw(Image.new("RGB", (1300, 900)))
    assert max(large.size) == 640
