"""`mdpd verify`: what a sound bundle shows, which check sees which tampering, and the signature."""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save

from mdpd_deploy import export_run, load_bundle, sign_bundle, verify_bundle
from mdpd_deploy.artifacts.manifest import graph_notes
from mdpd_deploy.artifacts.signing import check_signature
from mdpd_deploy.cli import main
from mdpd_deploy.errors import UserError, VerificationError
from mdpd_deploy.export import fade as fading
from mdpd_deploy.export import write as packing
from mdpd_deploy.graphs.signature import same_structure
from mdpd_deploy.graphs.trace import export_onnx

pytest.importorskip("onnxruntime", reason="runs exported graphs")

CHECKS = ["files", "schema", "signature", "graph", "side_free", "identity", "parameters"]
CHECKS += ["labels", "preprocessing", "parity", "golden", "metric"]
FUZZ = Path(__file__).parents[1] / "benchmarks" / "fuzz_bundle.py"


@pytest.fixture(scope="module")
def exported(tiny_bundle):
    """A real bundle; treat it as read-only."""
    return tiny_bundle.path


@pytest.fixture
def bundle(exported, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(exported, tmp_path / "b")


def seen(bundle, **options):
    return {check.name: check for check in verify_bundle(bundle, **options).checks}


def verdicts(bundle, **options):
    return {name: check.verdict for name, check in seen(bundle, **options).items()}


def relist(bundle, **changes):
    """Bring the manifest up to date with the files, as someone who tampers would."""
    manifest = json.loads((bundle / "manifest.json").read_text()) | changes
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json"]
    manifest["files"] = {
        path.relative_to(bundle).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in files
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def with_graph(change):
    def damage(bundle):
        proto = onnx.load(bundle / "model.onnx")
        change(proto.graph)
        onnx.save(proto, bundle / "model.onnx")

    return damage


def with_json(name, change):
    def damage(bundle):
        plain = json.loads((bundle / name).read_text())
        change(plain)
        (bundle / name).write_text(json.dumps(plain))

    return damage


def with_tensors(name, change):
    def damage(bundle):
        tensors = load_file(bundle / name)
        change(tensors)
        (bundle / name).write_bytes(save(tensors))

    return damage


def move(graph, part):
    tensor = next(t for t in graph.initializer if part in t.name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 0.01, tensor.name))


def add_weight(graph, name, *, read):
    graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), "f4"), name))
    if read:
        graph.node.append(onnx.helper.make_node("Identity", [name], ["nowhere"]))


def swap_nodes_operator(graph):
    node = next(node for node in graph.node if node.op_type == "Softmax")
    node.op_type = "LogSoftmax"


def other_interpolation(bundle):
    """Manifest, notes and preprocessing agree, but it is not what the model was exported with."""
    path = bundle / "preprocessor" / "preprocess.json"
    path.write_text(path.read_text().replace("bilinear", "nearest"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["preprocess"] = json.loads(path.read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    proto = onnx.load(bundle / "model.onnx")
    onnx.helper.set_model_props(proto, graph_notes(manifest))
    onnx.save(proto, bundle / "model.onnx")


def swap_norms(tensors):
    first = next(name for name in tensors if name.endswith("weight"))
    tensors[first] = tensors[first] + np.float32(0.5)


TAMPERED = {
    "side network by name": (
        with_graph(lambda g: add_weight(g, "side.map", read=True)), "side_free", "'side.map'"),
    "weight nobody reads": (
        with_graph(lambda g: add_weight(g, "cargo", read=False)), "side_free", "'cargo'"),
    "one more node": (
        with_graph(lambda g: add_weight(g, "cargo", read=True)), "identity", "node for node"),
    "another operator": (with_graph(swap_nodes_operator), "identity", "node for node"),
    "frozen weight": (
        with_graph(lambda g: move(g, "mlp.fc1.bias")), "identity", "beside the tuned norms"),
    "head": (with_graph(lambda g: move(g, "head.linear")), "identity", "beside the tuned norms"),
    "tuned norm": (
        with_graph(lambda g: move(g, "norm1.weight")), "graph", "a weight of the graph is not"),
    "an operator": (with_graph(swap_nodes_operator), "graph", "node for node, the one that was"),
    "bare norm": (
        with_tensors("bare_norms.safetensors", swap_norms), "identity", "beside the tuned norms"),
    "bare norms of another shape": (
        with_tensors("bare_norms.safetensors", lambda t: t.update({"x": np.ones(3, "f4")})),
        "identity", "'x' of bare_norms.safetensors is no weight"),
    "numbers": (
        with_json("parity.json", lambda p: p["side_free"].update(graph_numbers=3)),
        "parameters", "not the 3 of the export"),
    "a comparison that failed": (
        with_json("parity.json", lambda p: p["parity"].update(scaled_diff=0.5)),
        "parity", "comparison with PyTorch"),
    "a verdict that is no verdict": (
        with_json("manifest.json", lambda m: m["verification"].update(parity=None)),
        "parity", "says ''"),
    "a damaged certificate": (
        with_json("parity.json", lambda p: p["parity"].update(spread=-1)),
        "parity", "damaged at 'parity.spread'"),
    "golden outputs": (
        with_tensors("golden.safetensors", lambda t: t.update(output=t["output"] * 2)),
        "golden", "outputs are off"),
    "golden inputs": (
        with_tensors("golden.safetensors", lambda t: t.pop("raw.3.rgb")),
        "golden", "holds no golden vectors"),
    "a golden picture too large": (
        with_tensors(
            "golden.safetensors",
            lambda t: t.update({"raw.0.rgb": np.zeros((900, 900, 3), "u1")})),
        "golden", "a picture of the shape"),
    "preprocessing": (other_interpolation, "golden", "preprocessing gives other arrays"),
}  # fmt: skip


def test_a_fresh_bundle_passes(exported, digit_folder, capsys):
    words = ["verify", str(exported), "--eval-data", str(digit_folder / "validation")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and [check["name"] for check in found["checks"]] == CHECKS
    verdict = {check["name"]: check["verdict"] for check in found["checks"]}
    assert verdict.pop("parity") == "recorded" and verdict.pop("signature") == "not applicable"
    assert set(verdict.values()) == {"passed"}
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "what was seen" in shown and "not signed" in shown and "measured again" in shown


def test_without_the_data_the_metric_is_shown_as_recorded(exported):
    found = seen(exported)["metric"]
    assert found.verdict == "recorded" and "on validation, 18 examples, at export" in found.note


def test_other_data_is_not_taken_for_the_exports(exported, digit_folder):
    found = seen(exported, eval_data=str(digit_folder / "train"))["metric"]
    assert found.verdict == "failed" and "not the 18 of the export" in found.note


def test_no_torch_is_imported(exported, digit_folder, run_python):
    code = (
        "import sys; from mdpd_deploy import verify_bundle; "
        "print(verify_bundle(sys.argv[1], eval_data=sys.argv[2]).unsound); "
        "print([n for n in ('torch', 'transformers', 'timm') if n in sys.modules])"
    )
    done = run_python("-c", code, str(exported), str(digit_folder / "validation"))
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stderr


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_that_mends_the_hashes_is_seen(name, bundle):
    damage, check, words = TAMPERED[name]
    damage(bundle)
    relist(bundle)
    found = seen(bundle)[check]
    assert found.verdict == "failed" and words in found.note and "\n" not in found.note


def test_a_graph_that_is_not_the_exports_is_not_run(bundle, digit_folder):
    with_graph(lambda graph: move(graph, "head.linear"))(bundle)
    relist(bundle)
    found = verdicts(bundle, eval_data=str(digit_folder / "validation"))
    assert found["golden"] == found["metric"] == "not run"


def test_a_metric_that_was_not_measured_is_seen(bundle, digit_folder):
    def praise(plain):
        plain["metric"]["onnx"]["accuracy"] = 1.0 - plain["metric"]["onnx"]["accuracy"]

    with_json("parity.json", praise)(bundle)
    relist(bundle)
    found = seen(bundle, eval_data=str(digit_folder / "validation"))["metric"]
    assert found.verdict == "failed" and "here and was" in found.note


def test_a_failed_check_is_exit_code_1_after_the_table(bundle, capsys):
    with_graph(lambda graph: move(graph, "head.linear"))(bundle)
    relist(bundle)
    assert main(["verify", str(bundle)]) == 1
    said = capsys.readouterr()
    assert "identity" in said.out and said.err.count("\n") == 1
    assert said.err.endswith("did not pass: graph, identity, golden.\n")


def test_a_flipped_byte_is_refused_before_anything_is_read(bundle, capsys):
    raw = bytearray((bundle / "model.onnx").read_bytes())
    raw[-9] ^= 1
    (bundle / "model.onnx").write_bytes(raw)
    assert main(["verify", str(bundle)]) == 2
    said = capsys.readouterr()
    assert "model.onnx is not the file that was exported" in said.err and not said.out


def test_a_bundle_of_before_the_certificate_says_so(bundle, digit_folder):
    def forget(plain):
        for gate, names in (
            ("identity", ("structure_sha256", "bare_values_sha256")),
            ("metric", ("examples_sha256", "allowed")),
        ):
            for name in names:
                del plain[gate][name]

    with_json("parity.json", forget)(bundle)
    relist(bundle)
    found = seen(bundle)
    assert found["identity"].verdict == "not recorded"
    assert found["identity"].note.endswith("export the run again")
    assert found["metric"].verdict == "recorded" and found["golden"].verdict == "passed"
    again = verdicts(bundle, eval_data=str(digit_folder / "validation"))
    assert again["metric"] == "not recorded"
    assert verify_bundle(bundle).unsound == ["identity"]


def test_what_keeps_its_side_network_has_nothing_to_fade(tiny_side_run, tmp_path):
    options = dict(metric_gate=False, golden="synthetic")
    kept = export_run(tiny_side_run.path, out=tmp_path / "b", **options).path
    found = verdicts(kept)
    assert {found[name] for name in ("side_free", "identity", "parameters")} == {"not applicable"}
    assert found["golden"] == "passed" and found["metric"] == "recorded"
    assert not verify_bundle(kept).unsound


def test_a_converted_graph_keeps_the_record_of_its_identity(bundle):
    relist(bundle, precision="fp16")
    found = seen(bundle)
    assert found["identity"].verdict == "recorded" and "FP32 graph" in found["identity"].note
    assert found["parameters"].verdict == "passed"
    with_graph(lambda g: add_weight(g, "cargo", read=True))(bundle)
    big = numpy_helper.from_array(np.ones((300, 300), "f2"), "big")
    with_graph(lambda g: g.node.add().CopyFrom(onnx.helper.make_node("Constant", [], ["c"], value=big)))(bundle)  # fmt: skip
    relist(bundle)
    assert seen(bundle)["parameters"].verdict == "failed"


@pytest.fixture(scope="module", params=["int8-cpu", "fp16"])
def exported_low(request, tiny_text_run, tmp_path_factory):
    """A real bundle of reduced precision; treat it as read-only."""
    out = tmp_path_factory.mktemp("low") / "b"
    options = dict(precision=request.param, metric_gate=False, golden="synthetic")
    return export_run(tiny_text_run.path, out=out, **options).path


@pytest.fixture
def low(exported_low, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(exported_low, tmp_path / "low")


def reverse_matrices(graph):
    """Give every matrix other weights of the same shape and type."""
    for tensor in graph.initializer:
        if len(tensor.dims) == 2:
            values = numpy_helper.to_array(tensor)[::-1].copy()
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def forget_digests(bundle):
    """Make it a bundle of before digests of the deployed graph were kept."""
    with_json("parity.json", lambda plain: plain.pop("graph"))(bundle)
    relist(bundle)


def test_a_converted_graph_with_other_weights_is_seen(low):
    found = seen(low)
    assert found["graph"].verdict == found["golden"].verdict == "passed"
    assert found["identity"].verdict == "recorded" and "weights as exported" in found["graph"].note
    with_graph(reverse_matrices)(low)
    relist(low)
    found = seen(low)
    assert found["graph"].verdict == "failed" and found["golden"].verdict == "not run"


def test_one_scale_of_a_converted_graph_is_seen(low):
    """A change far too small for the golden vectors."""

    def nudge(graph):
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        tensor = next(t for t in graph.initializer if t.data_type in floats and t.dims)
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] = np.nextafter(values.flat[0], values.dtype.type(9))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    with_graph(nudge)(low)
    relist(low)
    assert verify_bundle(low).unsound[0] == "graph"
    forget_digests(low)
    assert verify_bundle(low).unsound == []


def test_golden_vectors_hold_a_bundle_without_digests(low, bundle):
    """int8 has no tolerance of its own: what counts is how far off it was at the export."""
    forget_digests(low)
    found = seen(low)
    assert found["graph"].verdict == "recorded" and not verify_bundle(low).unsound
    with_graph(reverse_matrices)(low)
    relist(low)
    found = seen(low)["golden"]
    assert found.verdict == "failed" and "outputs are off" in found.note

    with_graph(lambda graph: move(graph, "norm1.weight"))(bundle)
    forget_digests(bundle)
    found = seen(bundle)["golden"]
    assert found.verdict == "failed" and "outputs are off" in found.note


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: np.concatenate([outputs, outputs], axis=1),
        lambda outputs: np.full_like(outputs, np.nan),
    ],
    ids=["another shape", "not finite"],
)
def test_golden_outputs_of_another_shape_or_not_finite_fail(low, change):
    with_tensors("golden.safetensors", lambda t: t.update(output=change(t["output"])))(low)
    relist(low)
    assert verdicts(low)["golden"] == "failed"


def test_a_foreign_device_is_bad_input(exported):
    with pytest.raises(UserError, match="choose one of cpu, cuda"):
        verify_bundle(exported, device="tpu")
    with pytest.raises(UserError, match="add --key"):
        verify_bundle(exported, signature="x.sig")


# --- weights outside the graph's file ------------------------------------------------------------


def test_weights_in_their_own_file(tiny_run, tmp_path, monkeypatch):
    large = partial(export_onnx, external_above_bytes=1000)
    monkeypatch.setattr(packing, "export_onnx", large)
    monkeypatch.setattr(fading, "export_onnx", large)
    bundle = export_run(tiny_run.path, out=tmp_path / "b", metric_gate=False).path
    data = bundle / "model.onnx.data"
    assert data.stat().st_size > 1000 and verdicts(bundle)["identity"] == "passed"
    bare = load_bundle(bundle).write_bare_graph(tmp_path / "bare.onnx")
    assert same_structure(bare, bundle / "model.onnx") == []

    raw = data.read_bytes()
    data.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(UserError, match=r"model\.onnx\.data is not the file"):
        verify_bundle(bundle)
    relist(bundle)
    assert verdicts(bundle)["identity"] == "failed"
    data.unlink()
    with pytest.raises(UserError, match=r"model\.onnx\.data is missing"):
        verify_bundle(bundle)
    (tmp_path / "outside").write_bytes(raw)
    os.link(tmp_path / "outside", data)
    with pytest.raises(UserError, match=r"model\.onnx\.data is a hard link"):
        verify_bundle(bundle)
    data.unlink()
    data.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=r"model\.onnx\.data is a symbolic link"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../outside"},
        {"location": "golden.safetensors", "offset": "999999999"},
        {"location": "golden.safetensors", "offset": "-8", "length": "8"},
        {"location": "golden.safetensors", "length": "many"},
        {"location": "golden.safetensors", "length": "9" * 5000},
        {},
    ],
)
@pytest.mark.parametrize("inside_a_node", [False, True])
def test_a_weight_that_points_out_of_the_bundle(bundle, entries, inside_a_node):
    def point(graph):
        tensor = next(t for t in graph.initializer if "norm1.weight" in t.name)
        if inside_a_node:  # ONNX Runtime follows these too
            node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
            graph.node.append(node)
            tensor = graph.node[-1].attribute[0].t
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    proto = onnx.load(bundle / "model.onnx")
    point(proto.graph)
    (bundle / "model.onnx").write_bytes(proto.SerializeToString())
    relist(bundle)
    with pytest.raises(UserError, match="lies outside the bundle's files"):
        verify_bundle(bundle)


# --- signature -----------------------------------------------------------------------------------


@pytest.fixture
def signed(bundle, keys):
    sign_bundle(bundle, key=keys / "private.pem")
    return bundle


def test_a_signed_bundle_passes_with_its_key(bundle, keys, tmp_path, capsys):
    public = str(keys / "public.pem")
    assert main(["verify", str(bundle), "--key", public]) == 1
    assert "is not signed" in capsys.readouterr().err
    assert main(["sign", str(bundle), "--key", str(keys / "private.pem")]) == 0
    assert str(bundle) + ".sig" in capsys.readouterr().out
    assert main(["verify", str(bundle), "--key", public, "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {
        "name": "signature",
        "verdict": "passed",
        "note": f"signed by the owner of {public}",
    } in checks
    assert "not checked" in seen(bundle)["signature"].note, "never silently unchecked"
    moved = bundle.rename(tmp_path / "renamed")
    assert seen(moved, key=public, signature=str(bundle) + ".sig")["signature"].verdict == "passed"
    with pytest.raises(VerificationError, match="is not signed"):
        verify_bundle(moved, key=public)


def test_the_librarys_own_command_reads_the_signature(signed, keys, run_python):
    words = ["verify", "key", str(signed), "--signature", f"{signed}.sig"]
    words += ["--public_key", str(keys / "public.pem"), "--no-ignore-git-paths"]
    done = run_python("-m", "model_signing", *words)
    assert done.returncode == 0, done.stderr


def test_a_wrong_key_or_a_changed_bundle_is_one_sentence(signed, keys, capsys):
    assert main(["verify", str(signed), "--key", str(keys / "other-public.pem")]) == 1
    said = capsys.readouterr().err
    assert "another key's" in said and said.count("\n") == 1
    (signed / ".gitignore").write_text("git's own files are signed too")
    public = ["--key", str(keys / "public.pem")]
    assert main(["verify", str(signed), *public]) == 1
    assert ".gitignore" in capsys.readouterr().err
    (signed / ".gitignore").unlink()
    other_interpolation(signed)
    relist(signed)
    assert load_bundle(signed), "the manifest agrees with the change: only the signature does not"
    assert main(["verify", str(signed), *public]) == 1
    said = capsys.readouterr()
    assert "does not fit bundle" in said.err and said.err.count("\n") == 1 and not said.out


def test_a_signature_that_leaves_files_out_is_refused(bundle, keys):
    from model_signing import hashing, signing

    part = hashing.Config().set_ignored_paths(paths=["model.onnx"])
    signer = signing.Config().use_elliptic_key_signer(private_key=keys / "private.pem")
    signer.set_hashing_config(part).sign(bundle, f"{bundle}.sig")
    with pytest.raises(VerificationError, match=r"leaves out model\.onnx"):
        verify_bundle(bundle, key=keys / "public.pem")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"[" * 100_000, b"\xff\xfe"])
def test_a_broken_signature_is_refused(content, bundle, keys):
    Path(f"{bundle}.sig").write_bytes(content)
    with pytest.raises(VerificationError, match="does not fit bundle"):
        verify_bundle(bundle, key=keys / "public.pem")


def test_keys_that_cannot_be_used(bundle, keys, tmp_path, capsys, monkeypatch):
    (tmp_path / "no.pem").write_text("no key")
    for name in ("no.pem", "nowhere.pem"):
        for verb in ("sign", "verify"):
            assert main([verb, str(bundle), "--key", str(tmp_path / name)]) == 2
            said = capsys.readouterr().err
            assert f"{name} cannot be used as the" in said and said.count("\n") == 1
    locked = ["sign", str(bundle), "--key", str(keys / "locked-private.pem")]
    monkeypatch.setenv("MDPD_KEY_PASSWORD", "wrong")
    assert main(locked) == 2
    assert "cannot be used as the private key" in capsys.readouterr().err
    monkeypatch.setenv("MDPD_KEY_PASSWORD", "open sesame")
    assert main(locked) == 0
    capsys.readouterr()
    assert main(locked) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*locked, "--overwrite"]) == 0
    assert not verify_bundle(bundle, key=keys / "locked-public.pem").unsound


def test_only_a_sound_bundle_is_signed(bundle, keys):
    (bundle / "more").write_text("x")
    with pytest.raises(UserError, match="more is not listed"):
        sign_bundle(bundle, key=keys / "private.pem")
    assert not Path(f"{bundle}.sig").exists()


# --- damage by chance ----------------------------------------------------------------------------

# --- what inputs and outputs mean ----------------------------------------------------------------


def renoted(bundle, change):
    """Change manifest, preprocessing and the graph's notes alike, and mend the hashes."""
    path = bundle / "preprocessor" / "preprocess.json"
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    path.write_text(json.dumps(manifest["preprocess"]))
    proto = onnx.load(bundle / "model.onnx")
    onnx.helper.set_model_props(proto, graph_notes(manifest))
    onnx.save(proto, bundle / "model.onnx")
    relist(bundle)


def test_swapped_labels_are_seen(bundle):
    renoted(bundle, lambda manifest: manifest["labels"].reverse())
    assert load_bundle(bundle)
    assert verify_bundle(bundle).unsound == ["labels"]
    assert "class names of the task are not those" in seen(bundle)["labels"].note


def test_another_name_of_the_task_is_seen(bundle):
    renoted(bundle, lambda manifest: manifest.update(task="glue/sst2"))
    assert verify_bundle(bundle).unsound == ["labels"]


def test_settings_of_the_preprocessing_are_seen(bundle):
    """A larger picture is scaled down by the golden inputs' own size: only the digest tells."""
    renoted(bundle, lambda manifest: manifest["preprocess"].update(crop_pct=0.999))
    assert "preprocessing" in verify_bundle(bundle).unsound


def test_a_tokenizer_that_rewrites_words_is_seen(tiny_text_bundle, tmp_path):
    bundle = shutil.copytree(tiny_text_bundle.path, tmp_path / "films")
    path = bundle / "preprocessor" / "tokenizer.json"
    plain = json.loads(path.read_text())
    plain["normalizer"] = {
        "type": "Replace", "pattern": {"String": "dull mess"}, "content": "great",
    }  # fmt: skip
    path.write_text(json.dumps(plain))
    relist(bundle)
    said, rewritten = load_bundle(bundle).predict(["dull mess", "great"])
    assert said == rewritten, "the tokenizer is a program"
    assert verify_bundle(bundle).unsound == ["preprocessing"]
    assert seen(bundle)["preprocessing"].note.startswith("the tokenizer is not the one")


def test_a_bundle_of_before_these_digests_says_so(bundle):
    with_json("parity.json", lambda plain: plain.pop("meaning"))(bundle)
    relist(bundle)
    found = seen(bundle)
    assert found["labels"].verdict == found["preprocessing"].verdict == "recorded"
    assert "before digests of the class names were kept" in found["labels"].note
    assert not verify_bundle(bundle).unsound


def test_the_manifest_cannot_switch_proofs_off(bundle):
    relist(bundle, faded=False)
    found = verdicts(bundle)
    assert found["side_free"] == found["identity"] == found["parameters"] == "passed"
    with_graph(lambda graph: add_weight(graph, "side.map", read=False))(bundle)
    relist(bundle, method="side")
    assert seen(bundle)["side_free"].verdict == "failed"


def test_methods_that_keep_something_are_those_of_the_registry():
    from mdpd_deploy.checks.subject import KEEPING
    from mdpd_deploy.train.methods import METHODS

    assert set(KEEPING) == {name for name, method in METHODS.items() if method.deploys_added}


def import_other_operators(proto):
    proto.opset_import.add(domain="com.microsoft", version=1)


def import_onnx_twice(proto):
    """`ai.onnx` is another name of ONNX's own operators: a runtime may take either version."""
    proto.opset_import.add(domain="ai.onnx", version=13)


def define_an_operator(proto):
    body = onnx.helper.make_node("Neg", ["x"], ["y"])
    own = onnx.helper.make_function(
        "", "Softmax", ["x"], ["y"], [body], [onnx.helper.make_opsetid("", 20)], ["axis"]
    )
    proto.functions.append(own)


@pytest.mark.parametrize("change", [import_other_operators, import_onnx_twice, define_an_operator])
def test_imports_and_functions_belong_to_the_structure(change, bundle):
    proto = onnx.load(bundle / "model.onnx")
    change(proto)
    onnx.save(proto, bundle / "model.onnx")
    relist(bundle)
    found = seen(bundle)
    assert found["graph"].verdict == found["identity"].verdict == "failed"
    assert found["golden"].verdict == "not run"


# --- a name and a version ------------------------------------------------------------------------


def test_an_old_signed_bundle_cannot_stand_in_for_a_new_one(bundle, keys, run_python, capsys):
    private, public = str(keys / "private.pem"), str(keys / "public.pem")
    sign = ["sign", str(bundle), "--key", private, "--overwrite"]
    verify = ["verify", str(bundle), "--key", public]
    assert main([*sign, "--name", "films", "--version", "1.2"]) == 0
    capsys.readouterr()
    for expected in ("films", "films@1.2"):
        assert main([*verify, "--json", "--expect", expected]) == 0
        assert "as films@1.2" in capsys.readouterr().out
    for expected in ("films@1.3", "film", "films@1", "digits"):
        assert main([*verify, "--expect", expected]) == 1
        said = capsys.readouterr()
        assert f"was signed as films@1.2, not as {expected}" in said.err and not said.out
    words = ["verify", "key", str(bundle), "--signature", f"{bundle}.sig", "--public_key", public]
    done = run_python("-m", "model_signing", *words, "--no-ignore-git-paths")
    assert done.returncode == 0, done.stderr
    assert main(sign) == 0
    assert main([*verify, "--expect", bundle.name]) == 1
    assert "was signed without a name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sign", "--version", "2"], "add --name"),
        (["sign", "--name", "a b"], "letters, digits"),
        (["sign", "--name", "films", "--version", "1@2"], "letters, digits"),
        (["verify", "--expect", "films"], "add --key"),
    ],
)
def test_a_name_that_cannot_be_used(words, said, exported, keys, capsys):
    key = ["--key", str(keys / "private.pem")] if words[0] == "sign" else []
    assert main([words[0], str(exported), *words[1:], *key]) == 2
    assert said in capsys.readouterr().err


def test_a_bundle_that_changes_behind_its_signature_is_refused(signed, keys):
    checked = check_signature(signed, keys / "public.pem")
    relist(signed, nodes=7)
    with pytest.raises(VerificationError, match="changed after its signature was checked"):
        checked.require_same(signed, load_bundle(signed).manifest)


@pytest.mark.slow
def test_fuzzed_bundles_are_only_ever_refused_or_fail_checks(exported, run_python, tmp_path):
    """The same program makes 10,000 examples for docs/reliability.md."""
    out = tmp_path / "fuzz.json"
    done = run_python(str(FUZZ), str(exported), "--examples", "150", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["examples"] >= 150
    assert {"refused", "checks failed"} <= {what.split(": ")[1] for what in found["outcomes"]}
