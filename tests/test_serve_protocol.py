"""The protocol's bodies: what is read, what is refused and in which words, and nothing else."""

import json
import tracemalloc

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mdpd_deploy.serve.core.json_body import read_json_body, texts_limit
from mdpd_deploy.serve.core.protocol import check_encoding, decode_request, encode_reply
from mdpd_deploy.serve.core.refusal import Refusal, shown
from mdpd_deploy.serve.core.tensors import (
    DATATYPES,
    Axis,
    TensorSpec,
    read_specs,
    read_value_ranges,
)

BATCH, LENGTH = Axis("batch", 1, 4), Axis("sequence", 1, 8)
IDS = TensorSpec("ids", "INT64", (BATCH, LENGTH), (0, 99))
PIXELS = TensorSpec("pixels", "FP32", (BATCH, Axis(None, 2, 2), Axis(None, 3, 3)))
LOGITS = TensorSpec("logits", "FP32", (BATCH, Axis(None, 2, 2)))
INPUTS = (IDS, PIXELS)
VALUES = {
    "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
    "pixels": np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 2, 3),
}


def entry(name, array=None, **changes):
    """One input in JSON form."""
    array = VALUES[name] if array is None else array
    datatype = next(key for key, dtype in DATATYPES.items() if dtype == array.dtype)
    plain = {"name": name, "shape": list(array.shape), "datatype": datatype}
    return {**plain, "data": array.ravel().tolist(), **changes}


def binary(name, array=None, **changes):
    """One input in binary form, and its bytes."""
    array = VALUES[name] if array is None else array
    plain = entry(name, array, **changes)
    del plain["data"]
    plain.setdefault("parameters", {"binary_data_size": array.nbytes})
    return plain, array.tobytes()


def decode(inputs, tail=b"", *, length=None, specs=INPUTS, **top):
    head = json.dumps({"inputs": inputs, **top}).encode()
    if tail and length is None:
        length = len(head)
    return decode_request(head + tail, length, specs, [LOGITS], most_tensors=8)


def refused(inputs, tail=b"", **options):
    with pytest.raises(Refusal) as stop:
        decode(inputs, tail, **options)
    assert stop.value.status == 400
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 300
    return str(stop.value)


def both(ids=None, **changes):
    """Sound JSON inputs, but for the changes of `ids`."""
    return [entry("ids", ids, **changes), entry("pixels")]


def assert_values(request):
    for name, array in VALUES.items():
        np.testing.assert_array_equal(request.arrays[name], array)
        assert request.arrays[name].dtype == array.dtype


def test_json_flat_and_nested():
    assert_values(decode([entry(name) for name in VALUES], id="7"))
    nested = [entry(name, data=array.tolist()) for name, array in VALUES.items()]
    request = decode(nested, id="7")
    assert_values(request)
    assert (request.id, request.outputs, request.timeout_s) == ("7", {"logits": False}, None)


def test_binary_in_the_order_of_the_inputs_and_mixed_with_json():
    (first, head), (second, tail) = binary("pixels"), binary("ids")
    assert_values(decode([first, second], head + tail))
    assert_values(decode([entry("pixels"), second], tail))


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_in_binary(datatype):
    spec = TensorSpec("x", datatype, (BATCH,))
    array = np.array([0, 1, 1], dtype=DATATYPES[datatype])
    plain, tail = binary("x", array)
    assert plain["datatype"] == datatype
    found = decode([plain], tail, specs=(spec,)).arrays["x"]
    np.testing.assert_array_equal(found, array)
    if datatype == "FP16":
        assert "FP16 cannot be sent as JSON" in refused([entry("x", array)], specs=(spec,))
    else:
        found = decode([entry("x", array)], specs=(spec,)).arrays["x"]
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (both()[:1], "input 'pixels' is missing"),
        ([*both(), entry("ids")], "input 'ids' is given twice"),
        ([*both(), {**entry("ids"), "name": "mask"}], "unknown input 'mask': the model takes ids, pixels"),
        ([*both(), 3], "inputs[2] must be an object"),
        (both(datatype="INT32"), "datatype must be INT64, not 'INT32'"),
        (both(datatype="BYTES", data=["a"]), "datatype must be INT64, not 'BYTES'"),
        (both(datatype="BF16"), "datatype must be INT64, not 'BF16'"),
        (both(datatype=None), "datatype must be INT64, not None"),
        (both(shape=[2, -3]), "dimension 1 (sequence) must be 1 to 8, not -3"),
        (both(shape=[0, 3], data=[]), "dimension 0 (batch) must be 1 to 4, not 0"),
        (both(shape=[5, 1]), "dimension 0 (batch) must be 1 to 4, not 5"),
        (both(shape=[10**40, 3]), "dimension 0 (batch) must be 1 to 4, not 1000"),
        (both(shape=[2, 3, 1]), "has 2 dimensions [-1, -1]: the request gives it 3"),
        (both(shape=[1] * 4000), "the request gives it 4000"),
        (both(shape=[2, 3.0]), "holds 3.0, which is no whole number"),
        (both(shape=[2, True]), "holds True, which is no whole number"),
        (both(shape="2,3"), "'shape' must be a list of whole numbers"),
        (both(data=[1, 2, 3, 4, 5]), "'data' has 5 entries, and the shape [2, 3] takes 6"),
        (both(data=[[1, 2, 3], [4, 5]]), "'data' does not have the shape [2, 3]"),
        (both(data=[[1, 2, 3], 4]), "'data' does not have the shape [2, 3]"),
        (both(data=[[1, 2, [3]], [4, 5, 6]]), "'data' holds list, which is no INT64"),
        (both(data=[1, 2, 3, 4, 5, "6"]), "'data' holds str, which is no INT64"),
        (both(data=[1, 2, 3, 4, 5, 6.5]), "'data' holds float, which is no INT64"),
        (both(data=[1, 2, 3, 4, 5, True]), "'data' holds bool, which is no INT64"),
        (both(data=[1, 2, 3, 4, 5, None]), "'data' holds NoneType, which is no INT64"),
        (both(data=[1, 2, 3, 4, 5, 2**70]), "holds a number that INT64 cannot"),
        (both(data="123456"), "'data' must be a list"),
        (both(data=None), "'data' must be a list"),
        (both(data=[1, 2, 3, 4, 5, 100]), "100 is not one of 0 to 99"),
        (both(data=[1, 2, 3, 4, 5, -1]), "-1 is not one of 0 to 99"),
        ([entry("ids"), entry("pixels", data=[1e300] * 12)], "values that are not finite"),
        ([entry("ids"), entry("pixels", data=[float("nan")] * 12)], "values that are not finite"),
        (both(data=[float("inf")] * 6), "'data' holds float, which is no INT64"),
        (both(parameters=[1]), "'parameters' must be an object"),
        (both(parameters={"shared_memory_region": "x"}), "'shared_memory_region' is not supported"),
        (both(parameters={"binary_data_size": -1}), "not negative: given -1"),
        (both(parameters={"binary_data_size": 48}), "either 'data' or binary_data_size"),
        ([entry("ids")] * 9, "'inputs' has 9 entries: at most 8 are accepted"),
        ({}, "'inputs' must be a list"),
        (None, "input 'ids' is missing"),
    ],
)  # fmt: skip
def test_wrong_inputs(inputs, words):
    assert words in refused(inputs)


def test_wrong_binary_sizes():
    (first, head), (second, tail) = binary("ids"), binary("pixels")
    whole = head + tail
    assert "needs 48 bytes after the JSON, and 47 are there" in refused([second, first], whole[:-1])
    assert "1 bytes follow the last tensor" in refused([first, second], whole + b"x")
    assert "1 bytes follow the last tensor" in refused(both(), b"x")
    lie = {**first, "parameters": {"binary_data_size": 47}}
    assert "binary_data_size is 47, but INT64 [2, 3] takes 48 bytes" in refused([lie], whole)
    huge = {**first, "shape": [10**9, 10**9], "parameters": {"binary_data_size": 8 * 10**18}}
    assert "dimension 0 (batch) must be 1 to 4" in refused([huge], whole)
    inf = VALUES["pixels"].copy()
    inf[0, 0, 0] = np.inf
    plain, rest = binary("pixels", inf)
    assert "values that are not finite" in refused([first, plain], head + rest)


@pytest.mark.parametrize("length", [10**6, -1])
def test_a_json_length_that_the_body_does_not_have(length):
    assert "Inference-Header-Content-Length is" in refused(both(), b"x", length=length)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", b"[" * 4000,
        b'{"a":' * 4000, b'{"inputs": "\\ud800"}', b"9" * 60_000,
    ],
)  # fmt: skip
def test_what_is_no_json_object(body):
    with pytest.raises(Refusal, match="the body") as stop:
        decode_request(body, None, INPUTS, [LOGITS], most_tensors=8)
    assert stop.value.status == 400 and len(str(stop.value)) < 200


WIDE = TensorSpec("wide", "FP32", (BATCH, Axis(None, 3, 3), Axis(None, 64, 64), Axis(None, 64, 64)))


def test_the_largest_request_of_a_model_is_read():
    array = np.full((4, 3, 64, 64), -1.1754943508222875e-38, np.float32)
    plain = {**entry("wide", array), "data": array.tolist()}
    body = json.dumps({"inputs": [plain], "id": 'a "quoted, [name]'}, indent=1).encode()
    found = decode_request(body, None, [WIDE], [LOGITS], most_tensors=8)
    np.testing.assert_array_equal(found.arrays["wide"], array)


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[' + b"[]," * 400_000 + b"[]]}",
        b'{"inputs":[' + b"0," * 400_000 + b"0]}",
        b'{"inputs":[' + b'"",' * 400_000 + b'""]}',
        b'{"inputs":[' + b'"\\\\",[],' * 150_000 + b"0]}",
        b'{"inputs":' + b'{"a":{},"b":' * 100_000,
        b"[" * 2_000_000,
    ],
)
def test_json_that_no_request_of_the_model_has_is_refused_before_it_is_made(body):
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match="no request of this model has") as stop:
            decode_request(body, None, [WIDE], [LOGITS], most_tensors=8)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()
    assert stop.value.status == 413


def test_what_a_text_holds_is_not_counted():
    limit = texts_limit(max_batch=2, text_bytes=50_000, texts_bytes=1_000_000)
    text = ',[{"\\' * 10_000
    for escaped in (True, False):
        body = json.dumps({"inputs": [[text, text]] * 2}, ensure_ascii=escaped).encode()
        assert read_json_body(body, limit)["inputs"] == [[text, text]] * 2
    worst = json.dumps({"inputs": [["\0" * 50_000] * 2] * 2}).encode()
    assert len(read_json_body(worst, limit)["inputs"]) == 2


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ({"id": 7}, "'id' must be a string"),
        ({"parameters": {"sequence_id": 4}}, "'sequence_id' is not supported"),
        ({"parameters": {"priority": 1}}, "'priority' is not supported"),
        ({"parameters": {"timeout": -5}}, "'timeout' must be a whole number"),
        ({"parameters": {"timeout": 2**63}}, "'timeout' must be a whole number below 2"),
        ({"parameters": {"timeout": 10**400}}, "'timeout' must be a whole number below 2"),
        ({"parameters": {"binary_data_output": 1}}, "must be true or false"),
        ({"outputs": [{"name": "hidden"}]}, "unknown output 'hidden': the model gives logits"),
        ({"outputs": [{"name": "logits"}] * 2}, "output 'logits' is asked for twice"),
        ({"outputs": ["logits"]}, r"outputs\[0\] must be an object"),
        (
            {"outputs": [{"name": "logits", "parameters": {"classification": 2}}]},
            "'classification' is not supported",
        ),
    ],
)
def test_wrong_parameters_and_outputs(top, words):
    with pytest.raises(Refusal, match=words):
        decode(both(), **top)


def test_what_is_asked_of_the_outputs():
    assert decode(both(), parameters={"binary_data_output": True}).outputs == {"logits": True}
    own = [{"name": "logits", "parameters": {"binary_data": False}}]
    asked = decode(both(), parameters={"binary_data_output": True}, outputs=own)
    assert asked.outputs == {"logits": False}
    assert decode(both(), parameters={"timeout": 1_500_000}).timeout_s == 1.5
    most = 2**63 - 1
    assert decode(both(), parameters={"timeout": most}).timeout_s == pytest.approx(most / 1e6)


def test_a_reply_in_both_forms():
    logits = np.array([[0.25, -3]], dtype=np.float32)
    request = decode(both(), id="a")
    reply = encode_reply(request, "m", "1", {"logits": logits})
    assert reply.json_length is None
    plain = json.loads(reply.body)
    assert plain["model_name"] == "m" and plain["id"] == "a"
    assert plain["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [1, 2], "data": [0.25, -3.0]}
    ]
    request = decode(both(), parameters={"binary_data_output": True})
    reply = encode_reply(request, "m", "1", {"logits": logits})
    plain = json.loads(reply.body[: reply.json_length])
    assert "id" not in plain
    assert plain["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert reply.body[reply.json_length :] == logits.astype("<f4").tobytes()


def test_compressed_bodies_are_refused():
    check_encoding(None)
    check_encoding("identity")
    with pytest.raises(Refusal, match="Content-Encoding 'gzip' is not accepted") as stop:
        check_encoding("gzip")
    assert stop.value.status == 415


def test_specs_of_a_manifest():
    ports = [{"name": "ids", "dtype": "int64", "shape": ["batch", "sequence", 3]}]
    ranges = {"batch": {"min": 1, "opt": 2, "max": 4}, "sequence": {"min": 2, "opt": 4, "max": 8}}
    (spec,) = read_specs(ports, ranges, {"ids": (0, 5)})
    assert (spec.datatype, spec.shape, spec.values) == ("INT64", [-1, -1, 3], (0, 5))
    assert spec.axes[1] == Axis("sequence", 2, 8)


def test_ranges_of_values_come_from_the_tables_that_are_indexed(tmp_path):
    def table(name, rows):
        return numpy_helper.from_array(np.zeros((rows, 4), np.float32), name)

    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["a"]),
        helper.make_node("Gather", ["types", "ids"], ["b"], axis=0),
        helper.make_node("Gather", ["wide", "other"], ["c"], axis=1),
        helper.make_node("Gather", ["a", "inner"], ["d"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, [None])
        for name in ("ids", "other", "inner", "attention_mask")
    ]
    tables = [table("words", 50), table("types", 7), table("wide", 9)]
    graph = helper.make_graph(nodes, "g", inputs, [], tables)
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    assert read_value_ranges(tmp_path / "g.onnx") == {"ids": (0, 6), "attention_mask": (0, 1)}


def test_a_strangers_value_is_shown_short_and_on_one_line():
    assert shown("a\nb\x00é") == r"'a\nb\x00\xe9'"
    assert len(shown("x" * 10**6)) == 60 and len(shown(list(range(1000)))) == 60


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
SHAPE = st.lists(st.integers(-2, 9) | st.integers(), max_size=4) | JSON
INPUT = st.fixed_dictionaries(
    {"name": st.sampled_from(["ids", "pixels"]) | st.text(max_size=4)},
    optional={
        "shape": SHAPE,
        "datatype": st.sampled_from([*DATATYPES, "BYTES"]) | JSON,
        "data": JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 200) | JSON})
        | JSON,
    },
)
BODY = st.fixed_dictionaries(
    {"inputs": st.lists(INPUT, max_size=4) | JSON},
    optional={"id": JSON, "outputs": JSON, "parameters": JSON},
)


@settings(max_examples=100, deadline=None)
@given(plain=BODY, tail=st.binary(max_size=120), length=st.none() | st.integers(-5, 400))
@example(plain={"inputs": []}, tail=b"", length=0)
def test_any_request_is_read_or_refused(plain, tail, length):
    body = json.dumps(plain).encode() + tail
    try:
        request = decode_request(body, length, INPUTS, [LOGITS], most_tensors=8)
    except Refusal as stop:
        assert stop.status == 400 and len(str(stop)) < 400
    else:
        assert set(request.arrays) == {"ids", "pixels"}


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255))))
def test_a_damaged_binary_request_is_read_or_refused(cut, flips):
    (first, head), (second, tail) = binary("ids"), binary("pixels")
    plain = json.dumps({"inputs": [first, second]}).encode()
    raw = bytearray(plain + head + tail)
    for place, value in flips:
        if place < len(raw):
            raw[place] = value
    try:
        decode_request(
            bytes(raw[:cut] + raw[cut + 1 :]), len(plain), INPUTS, [LOGITS], most_tensors=8
        )
    except Refusal as stop:
        assert stop.status == 400
