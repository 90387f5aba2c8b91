"""Every name of TensorRT's API that our source uses exists in the real bindings.

Offline the source is compared with `trt_names.json`, which `python tests/trt_api.py` printed; with
the network the bindings are fetched and that file is compared with them.
"""

import ast
import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = json.loads((ROOT / "tests" / "trt_names.json").read_text())
SOURCES = [
    file
    for folder in ("mdpd_deploy", "export", "serve")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if any(word in file.relative_to(ROOT).as_posix() for word in ("trt", "tensorrt", "engine"))
]
# Variables that always hold an object of one class.
BOUND = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
    "config": "IBuilderConfig", "profile": "IOptimizationProfile", "engine": "ICudaEngine",
    "context": "IExecutionContext", "runtime": "Runtime", "refitter": "Refitter",
    "inspector": "EngineInspector",
}  # fmt: skip
GONE = {  # removed in 11; none of these may be in our source
    "EXPLICIT_BATCH", "OBEY_PRECISION_CONSTRAINTS", "int8_calibrator", "QuantizationFlag",
    "set_output_type", "dynamic_range", "supports_model", "device_memory_size",
    "create_execution_context_without_device_memory", "all_shape_inputs_specified",
    "has_implicit_batch_dimension", "IStreamReader",
}  # fmt: skip


def chain(node):
    """`trt.BuilderFlag.TF32` → ["trt", "BuilderFlag", "TF32"]; None if it starts otherwise."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) and parts else None


def used_names(source):
    """What a file takes from the module (`Class` or `Class.MEMBER`) and from bound variables."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        parts = chain(node)
        if parts is None:
            continue
        if parts[0] == "trt" and not parts[1].startswith("__"):
            found.add(".".join(part for part in parts[1:3] if not part.startswith("__")))
        for index, name in enumerate(parts[:-1]):  # also `runner.engine.refittable`
            if name in BOUND and parts[0] not in ("mdpd_deploy", "self") and index <= 1:
                found.add(f"{BOUND[name]}.{parts[index + 1]}")
    return found


@cache
def ours():
    found = set()
    for file in SOURCES:
        text = file.read_text()
        if "trt" in text or "tensorrt" in text:
            found |= used_names(text)
    return found


def missing_names(wanted, names):
    return {
        dotted
        for dotted in wanted
        if dotted.partition(".")[0] not in names
        or ("." in dotted and dotted.partition(".")[2] not in names[dotted.partition(".")[0]])
    }


@pytest.mark.parametrize("release", NAMES)
def test_our_source_uses_only_names_that_exist(release):
    assert len(ours()) > 40  # the search finds something
    for expected in ("Builder.build_serialized_network", "IExecutionContext.execute_async_v3"):
        assert expected in ours()
    assert not missing_names(ours(), NAMES[release])


def test_a_wrong_name_would_be_found():
    source = "import tensorrt as trt\nflag = trt.BuilderFlag.FP16\nconfig.int8_calibrator = 1\n"
    source += "context.execute_async_v2(0)\nrunner.engine.device_memory_size\ntrt.Nothing"
    found = used_names(source)
    assert missing_names(found, NAMES["11.4.0.106"]) == {
        "BuilderFlag.FP16", "IBuilderConfig.int8_calibrator", "IExecutionContext.execute_async_v2",
        "ICudaEngine.device_memory_size", "Nothing",
    }  # fmt: skip
    assert missing_names(found, NAMES["10.16.1.11"]) == {
        "IExecutionContext.execute_async_v2", "Nothing",
    }  # fmt: skip


def test_what_tensorrt_11_removed_is_nowhere():
    for file in SOURCES:
        words = {
            n.attr for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)
        }
        assert not words & GONE, file


def test_tensorrt_is_named_in_files_that_say_so():
    """`trt` is TensorRT and nothing else, in files whose names this test looks for."""
    for folder in ("mdpd_deploy", "train", "export", "serve"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
            imported = {a.name: a.asname for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}  # fmt: skip
            if "trt" in named or "tensorrt" in imported:
                assert file in SOURCES, file
            assert imported.get("tensorrt", "trt") == "trt", file


def test_cuda_names_exist_in_cuda_bindings():
    """Those of our source and those of its stand-in."""
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    source = (ROOT / "mdpd_deploy" / "runtimes" / "tensorrt" / "cuda.py").read_text()
    chains = [p for n in ast.walk(ast.parse(source)) if (p := chain(n)) and p[0] == "cuda"]
    assert len(chains) > 10
    for _, first, *rest in chains:
        assert hasattr(real, first), first
        assert not rest or hasattr(getattr(real, first), rest[0]), rest
    stand_in = ast.parse((ROOT / "tests/fakes/cuda/bindings/runtime.py").read_text())
    for node in stand_in.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert hasattr(real, node.name), node.name


@pytest.mark.network
@pytest.mark.parametrize("release", NAMES)
def test_the_names_are_those_of_the_real_bindings(release):
    spec = importlib.util.spec_from_file_location("trt_api", ROOT / "tests" / "trt_api.py")
    trt_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trt_api)
    real = trt_api.names_of(release)
    assert {name: sorted(members) for name, members in NAMES[release].items()} == real
    assert not missing_names(ours(), real)
