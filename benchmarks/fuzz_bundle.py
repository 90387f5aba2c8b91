"""Does a bundle that was damaged, by chance or on purpose, ever do more than be refused?

    python benchmarks/fuzz_bundle.py runs/RUN/bundles/onnx-fp32 --examples 10000 --out fuzz.json

A bundle of several tasks is damaged in its base graph, its deltas and the table of its tasks too.
Every example copies the bundle, damages the copy and opens and verifies it. Half of the damage is
as a broken disk does it; after the other half the hashes in the manifest (and the notes in graphs
and deltas) are made right again, as an attacker would, so that the parsers behind them are reached.
Allowed is a refusal by one sentence (`UserError`, `VerificationError`), a report of failed checks,
or, for damage that changes nothing that counts, a report that all is well. Anything else ends the
program with the smallest example that hypothesis finds, and exit code 1: another exception, more
than `--seconds` for one example, more than `--megabytes` on top of the sound bundle's peak.

Hash-correct changes of a tokenizer or of `model.onnx` where the certificate was changed too are
beyond a check of the bundle alone: that is what a signature is for.
"""

import argparse
import collections
import hashlib
import json
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mdpd_deploy import verify_bundle
from mdpd_deploy.artifacts.manifest import (
    BASE_FILE,
    DELTA_FILE,
    EXTERNAL_FILE,
    TASKS,
    graph_notes,
    weights_note,
)
from mdpd_deploy.errors import UserError, VerificationError
from mdpd_deploy.graphs.mixed import TABLE
from mdpd_deploy.machine import describe

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63, 10**20, 10**400])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["../../etc/passwd", "/dev/zero", "\ud800", "a\nb", "1.9", "", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
GRAPHS = ("model.onnx", BASE_FILE)
DTYPES = ("f4", "f8", "f2", "i8", "i4", "u1", "?")
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 20, 641]), max_size=4).filter(
    lambda shape: np.prod(shape) < 2_000_000
)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str] | None]:
    """Tensors and notes of a safetensors file."""
    with safe_open(path, framework="np") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata()  # noqa: SIM118


def retie(folder: Path) -> None:
    """Let the base graph of several tasks name the weights beside it, and deltas that base graph."""
    base, weights = folder / BASE_FILE, folder / EXTERNAL_FILE
    if not (base.is_file() and weights.is_file()):
        return
    try:
        proto = onnx.load(base, load_external_data=False)
        onnx.helper.set_model_props(proto, weights_note(sha256_of(weights)))
        base.write_bytes(proto.SerializeToString())
    except DecodeError:  # no graph any more
        pass
    for delta in folder.glob(f"{TASKS}/*/{DELTA_FILE}"):
        try:
            tensors, notes = read_tensors(delta)
        except SafetensorError:
            continue
        delta.write_bytes(save(tensors, (notes or {}) | {"base_sha256": sha256_of(base)}))


def relist(folder: Path) -> None:
    """Bring notes and manifest up to date with the files, as someone who tampers would."""
    retie(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256_of(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def places(plain: object, here: tuple = ()) -> list[tuple]:
    """Every place in nested JSON."""
    found = [here] if here else []
    items = (
        plain.items()
        if isinstance(plain, dict)
        else enumerate(plain)
        if isinstance(plain, list)
        else ()
    )
    for key, value in items:
        found += places(value, (*here, key))
    return found


def change(draw: Callable, plain: dict) -> dict:
    """Replace, remove or add something in nested JSON."""
    for _ in range(draw(st.integers(1, 3))):
        everywhere = places(plain)
        if not everywhere:
            return plain
        *way, last = draw(st.sampled_from(everywhere))
        inside = plain
        for key in way:
            inside = inside[key]
        if draw(st.booleans()) and isinstance(inside, dict):
            inside.pop(last)
        else:
            inside[last] = draw(JSON)
    return plain


def damage_bytes(draw: Callable, folder: Path) -> bool:
    """Flip bits in a file, cut it short or append to it; the hashes are mended or not."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    path = folder / draw(st.sampled_from(names))
    raw = bytearray(path.read_bytes())
    kind = draw(st.sampled_from(["flip", "cut", "append", "empty"]))
    if kind == "flip" and raw:
        for _ in range(draw(st.integers(1, 4))):
            raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del raw[draw(st.integers(0, len(raw))) :]
    elif kind == "append":
        raw += draw(st.binary(min_size=1, max_size=64))
    else:
        raw.clear()
    path.write_bytes(raw)
    return path.name != "manifest.json" and draw(st.booleans())


def damage_manifest(draw: Callable, folder: Path) -> bool:
    """Change values of the manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(change(draw, json.loads(path.read_text()))))
    return False


def damage_json(draw: Callable, folder: Path) -> bool:
    """Change values of preprocessing (manifest and notes follow) or of the certificate."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if draw(st.booleans()):
        path = folder / "parity.json"
        path.write_text(json.dumps(change(draw, json.loads(path.read_text()))))
        return True
    if "tasks" in manifest:
        told = draw(st.sampled_from(manifest["tasks"]))
        path = folder / TASKS / told["name"] / "preprocess.json"
    else:
        told, path = manifest, folder / "preprocessor" / "preprocess.json"
    told["preprocess"] = change(draw, json.loads(path.read_text()))
    path.write_text(json.dumps(told["preprocess"]))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    try:
        onnx.helper.set_model_props(proto, graph_notes(manifest))
    except UnicodeEncodeError:  # a graph cannot hold such text
        return True
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return True


def damage_tensors(draw: Callable, folder: Path) -> bool:
    """Replace tensors of golden vectors, of the bare norms or of a task's delta by others."""
    path = draw(st.sampled_from(sorted(folder.rglob("*.safetensors"))))
    tensors, notes = read_tensors(path)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*tensors, "raw.0.text", "raw.0.first", "raw.9.rgb", "input."]))
        if draw(st.booleans()):
            tensors.pop(name, None)
        else:
            shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
            fill = draw(st.sampled_from([0, 1, 255, float("nan"), float("inf")]))
            with np.errstate(invalid="ignore"):
                tensors[name] = np.full(shape, fill).astype(dtype)
    path.write_bytes(save(tensors, notes))
    return True


def damage_graph(draw: Callable, folder: Path) -> bool:
    """Rename, reshape, move out, multiply or drop parts of a graph."""
    path = folder / draw(st.sampled_from([n for n in GRAPHS if (folder / n).is_file()]))
    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    kinds = ["dims", "flat", "external", "name", "twice", "gone", "node", "copy", "input"]
    kind = draw(st.sampled_from([*kinds, "opset", "raw", "type", "no input"]))
    node = graph.node[draw(st.integers(0, len(graph.node) - 1))]
    tables = [place for place, t in enumerate(graph.initializer) if t.name == TABLE]
    tensor = graph.initializer[
        draw(st.sampled_from(tables * 99 + [*range(len(graph.initializer))]))
    ]
    if kind == "dims":
        tensor.dims.append(draw(st.sampled_from([-1, 0, 2, 2**40, 2**62])))
    elif kind == "flat":
        del tensor.dims[:]
    elif kind == "twice":
        graph.initializer.add().CopyFrom(tensor)
    elif kind == "gone":
        graph.initializer.remove(tensor)
    elif kind == "type":
        tensor.data_type = draw(st.sampled_from([0, 1, 6, 8, 10, 16, 99]))
    elif kind == "no input":
        graph.input.pop()
    elif kind == "external":
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            entry = tensor.external_data.add()
            entry.key = key
            entry.value = draw(
                st.sampled_from(["model.onnx", "../x", "-1", "0", "9" * 30, "x", ""])
            )
    elif kind == "name":
        tensor.name = draw(st.sampled_from(["side.map", "", graph.initializer[0].name]))
    elif kind == "node":
        graph.node.remove(node)
    elif kind == "copy":
        graph.node.add().CopyFrom(node)
    elif kind == "input":
        del node.input[:]
    elif kind == "opset":
        del proto.opset_import[:]
    else:
        tensor.raw_data = draw(st.binary(max_size=16))
    path.write_bytes(proto.SerializeToString())
    return True


DAMAGE = {
    "bytes": damage_bytes,
    "manifest": damage_manifest,
    "json": damage_json,
    "tensors": damage_tensors,
    "graph": damage_graph,
}


def outcome_of(folder: Path) -> str:
    """Open and verify; return what came of it, or raise what must not come."""
    try:
        report = verify_bundle(folder)
    except (UserError, VerificationError) as err:
        message = str(err)
        message.encode()  # it must be printable
        assert "\n" not in message and len(message) < 1500, message
        return "refused"
    json.dumps(report.to_json(), allow_nan=False).encode()
    return "checks failed" if report.unsound else "sound"


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def fuzz(bundle: Path, examples: int, seconds: float, megabytes: float) -> dict:
    """Run the examples; raise on the first that misbehaves."""
    seen: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="mdpd-fuzz-") as place:
        copy = Path(shutil.copytree(bundle, Path(place, "b")))
        assert outcome_of(copy) == "sound", "the bundle given is not sound"
        before = peak_mb()

        @settings(
            max_examples=examples, deadline=None, database=None, print_blob=False,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        @given(st.data(), st.sampled_from(sorted(DAMAGE)))
        def one(data: st.DataObject, kind: str) -> None:
            nonlocal slowest
            shutil.rmtree(copy)
            shutil.copytree(bundle, copy)
            mend = DAMAGE[kind](data.draw, copy)
            if mend:
                relist(copy)
            start = time.monotonic()
            outcome = outcome_of(copy)
            took = time.monotonic() - start
            slowest = max(slowest, took)
            assert took < seconds, f"{kind}: {took:.1f} s"
            assert peak_mb() - before < megabytes, f"{kind}: {peak_mb() - before:.0f} MB more"
            seen[f"{kind}, {'hashes mended' if mend else 'as it is'}: {outcome}"] += 1

        start = time.monotonic()
        one()
        took = time.monotonic() - start
    return {
        "bundle": bundle.name,
        "examples": sum(seen.values()),
        "outcomes": dict(sorted(seen.items())),
        "slowest_s": round(slowest, 2),
        "peak_mb_of_the_sound_bundle": round(before),
        "peak_mb_more": round(peak_mb() - before),
        "seconds": round(took),
        "cpu": describe()["cpu"],
    }


def main() -> None:
    """Fuzz, print the outcomes, write them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=30, help="that one example may take")
    parser.add_argument("--megabytes", type=float, default=500, help="that may be used on top")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # as the command line does
    found = fuzz(options.bundle, options.examples, options.seconds, options.megabytes)
    for what, count in found["outcomes"].items():
        print(f"{count:7d}  {what}")
    print(json.dumps({key: value for key, value in found.items() if key != "outcomes"}))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
