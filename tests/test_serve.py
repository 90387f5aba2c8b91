"""A real server in a process of its own: standard clients, strangers, a browser, its end."""

import asyncio
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save

from mdpd_deploy import build_engine, fit, load_bundle, sign_bundle
from mdpd_deploy.cli import main
from mdpd_deploy.commands.export import export_runs
from mdpd_deploy.commands.serve import name_bundles
from mdpd_deploy.errors import UserError
from mdpd_deploy.runtimes.base import only
from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.core.refusal import Refusal
from mdpd_deploy.serve.core.request_core import RequestCore

pytest.importorskip("starlette", reason="serves over HTTP")
pytest.importorskip("onnxruntime", reason="runs exported graphs")

MB = 1_000_000
WORDS = ["the", "a", "film", "was", "good", "bad", "great", "dull", "not", "very", "unheard-of"]


@pytest.fixture(scope="module")
def bundles(tiny_bundle, tiny_text_run, tiny_bert, many, tmp_path_factory):
    """`digits`: pictures; `texts`: a bundle of two tasks, of classes and of scores."""
    root = tmp_path_factory.mktemp("served")
    scores = fit(
        task="regress", data=many / "scores", text="sentence", backbone=tiny_bert, method="norms",
        steps=4, batch=8, set=["data.max_length=24"], out=root / "run", quiet=True,
    )  # fmt: skip
    runs = [tiny_text_run.path, scores.path]
    return {
        "digits": tiny_bundle.path,
        "texts": export_runs(runs, names=["mood", "warmth"], out=root / "texts").path,
    }


class Server:
    """A running `mdpd serve`, or a program that runs one."""

    def __init__(self, *words, program=None, **environment):
        command = ["-m", "mdpd_deploy", "serve", "--port", "0"]
        if program is not None:
            command = ["-c", program]
        self.process = subprocess.Popen(
            [sys.executable, *command, *map(str, words)], text=True, env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        line = self.process.stdout.readline()
        found = re.search(r"at (http://[\d.]+:(\d+))$", line.strip())
        assert found, (line, self.process.stderr.read())
        self.url, self.port = found[1], int(found[2])

    def ask(self, method, path, body=None, headers=(), chunked=False):
        """Return status, headers and body; JSON is parsed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers), encode_chunked=chunked)
            reply = connection.getresponse()
            raw = reply.read()
        finally:
            connection.close()
        if reply.headers.get_content_type() == "application/json":
            return reply.status, reply.headers, json.loads(raw)
        return reply.status, reply.headers, raw

    def post(self, path, plain):
        body = plain if isinstance(plain, bytes) else json.dumps(plain)
        return self.ask("POST", path, body)

    def stop(self, how=signal.SIGTERM):
        """Send a signal; return the exit code and what was said on stderr."""
        self.process.send_signal(how)
        return self.end()

    def end(self):
        """Wait for the end; return the exit code and what was said on stderr."""
        try:
            _, errors = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def server(bundles):
    running = Server(bundles["texts"], f"digits={bundles['digits']}")
    yield running
    code, errors = running.stop()
    assert (code, errors) == (0, "")  # whatever the tests sent left no word on stderr


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 20))) for _ in range(count)]


def picture_bytes(size=(20, 24), kind="PNG", **options):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def text_inputs(bundle, texts, task):
    """The graph's inputs for texts, as a client with its own tokenizer makes them."""
    arrays = bundle.task(task).preprocess(texts)
    arrays["task_id"] = np.full(len(texts), bundle.task(task).index)
    return arrays


def as_json(arrays, **changes):
    inputs = [
        {
            "name": name, "shape": list(array.shape), "data": array.ravel().tolist(),
            "datatype": {"i": "INT64", "f": "FP32"}[array.dtype.kind],
        }
        for name, array in arrays.items()
    ]  # fmt: skip
    return {"inputs": inputs, **changes}


# What it says of itself


def test_health_and_metadata_follow_the_manifest(server, bundles):
    assert server.ask("GET", "/v2/health/live")[0] == 200
    assert server.ask("GET", "/v2/health/ready")[::2] == (200, {"ready": True})
    assert server.ask("GET", "/v2")[2]["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/models/digits", "/v2/models/digits/versions/1"):
        status, _, plain = server.ask("GET", path)
        ports = load_bundle(bundles["digits"]).graph()["inputs"]
        assert status == 200 and plain["versions"] == ["1"]
        assert [port["name"] for port in plain["inputs"]] == [port["name"] for port in ports]
        assert plain["inputs"][0] | {} == {
            "name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, 16, 16]
        }  # fmt: skip
        assert server.ask("GET", f"{path}/ready")[0] == 200
    texts = server.ask("GET", "/v1/models/texts")[2]
    assert [(task["name"], task["kind"]) for task in texts["tasks"]] == [
        ("mood", "classify"),
        ("warmth", "regress"),
    ]


# The protocol, by a standard client


@pytest.mark.parametrize("as_binary", [True, False])
@pytest.mark.parametrize("task", ["mood", "warmth"])
def test_a_standard_client_gets_what_the_bundle_says(server, bundles, as_binary, task):
    client = pytest.importorskip("tritonclient.http", reason="a client of the protocol")
    bundle = load_bundle(bundles["texts"])
    arrays = text_inputs(bundle, sentences(5), task)
    inputs = []
    for name, array in arrays.items():
        inputs.append(client.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array, binary_data=as_binary)
    expected = only(bundle.runner()(arrays))
    (output,) = bundle.output_names
    with client.InferenceServerClient(f"127.0.0.1:{server.port}") as session:
        assert session.is_server_ready() and session.is_model_ready("texts", "1")
        assert session.get_model_metadata("texts")["name"] == "texts"
        for outputs in (None, [client.InferRequestedOutput(output, binary_data=not as_binary)]):
            answer = session.infer("texts", inputs, outputs=outputs, request_id="seven")
            np.testing.assert_allclose(answer.as_numpy(output), expected, atol=1e-5)
            assert answer.get_response()["id"] == "seven"
        with pytest.raises(Exception, match="is missing: the model takes"):
            session.infer("texts", inputs[:-1])


def test_pictures_as_tensors(server, bundles):
    bundle = load_bundle(bundles["digits"])
    arrays = bundle.preprocess([Image.open(io.BytesIO(picture_bytes()))])
    status, _, plain = server.post("/v2/models/digits/versions/1/infer", as_json(arrays))
    assert status == 200
    np.testing.assert_allclose(
        plain["outputs"][0]["data"], only(bundle.runner()(arrays))[0], atol=1e-5
    )


# Raw inputs


def test_texts_of_two_tasks_get_what_the_bundle_says(server, bundles):
    bundle = load_bundle(bundles["texts"])
    texts = sentences(6)
    for task in ("mood", "warmth"):
        expected = bundle.predict(texts, task=task)
        status, _, plain = server.post(
            "/v1/models/texts/predict", {"inputs": texts, "task": task, "top": 2}
        )
        assert (status, plain["task"]) == (200, task)
        assert plain["queue_ms"] >= 0 and plain["compute_ms"] > 0 and plain["batch_rows"] >= 6
        for found, prediction in zip(plain["predictions"], expected, strict=True):
            if task == "warmth":
                assert found["score"] == pytest.approx(prediction.score, abs=1e-5)
            else:
                assert found["label"] == prediction.label
                assert [one["label"] for one in found["top"]] == list(prediction.probabilities)
                assert found["probability"] == pytest.approx(prediction.probability, abs=1e-5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_in_every_format(server, bundles, kind):
    raw = picture_bytes(kind=kind)
    (expected,) = load_bundle(bundles["digits"]).predict([Image.open(io.BytesIO(raw))])
    headers = {"Content-Type": f"image/{kind.lower()}"}
    status, _, plain = server.ask("POST", "/v1/models/digits/classify?top=1", raw, headers)
    assert status == 200
    (found,) = plain["predictions"]
    assert found["label"] == expected.label and len(found["top"]) == 1
    assert found["probability"] == pytest.approx(expected.probability, abs=1e-5)


def test_a_picture_is_turned_as_its_camera_says(server, bundles):
    picture = Image.open(io.BytesIO(picture_bytes()))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = io.BytesIO()
    picture.save(turned, "PNG", exif=exif)
    (expected,) = load_bundle(bundles["digits"]).predict(
        [picture.transpose(Image.Transpose.ROTATE_270)]
    )
    plain = server.ask("POST", "/v1/models/digits/classify", turned.getvalue())[2]
    assert plain["predictions"][0]["probability"] == pytest.approx(expected.probability, abs=1e-5)


def test_many_clients_at_once_each_get_their_own_answer(server, bundles):
    bundle = load_bundle(bundles["texts"])
    asks = [(task, text) for text in sentences(20, seed=1) for task in ("mood", "warmth")]
    expected = bundle.run_mixed(asks)

    def ask(item):
        task, text = item
        plain = {"inputs": [text], "task": task}
        return server.post("/v1/models/texts/predict", plain)[2]["predictions"][0]

    with ThreadPoolExecutor(8) as clients:
        for found, prediction in zip(clients.map(ask, asks), expected, strict=True):
            key = "score" if prediction.score is not None else "probability"
            assert found[key] == pytest.approx(getattr(prediction, key), abs=1e-5)
            assert found.get("label") == prediction.label


# Refusals: one sentence each


def bomb():
    """A PNG of 169 million pixels in a few hundred bytes of header and data."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def many_scans(count):
    """A JPEG of a megapixel whose last scan comes again and again: a minute of work in 240 kB."""
    stream = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(stream, "JPEG", progressive=True)
    raw = stream.getvalue()
    start = raw.rindex(b"\xff\xda")
    return raw[:-2] + raw[start:-2] * count + b"\xff\xd9"


def changed(arrays, name, **changes):
    plain = as_json(arrays)
    next(entry for entry in plain["inputs"] if entry["name"] == name).update(changes)
    return plain


INFER, PREDICT, CLASSIFY = (
    "/v2/models/texts/infer",
    "/v1/models/texts/predict",
    "/v1/models/digits/classify",
)
IDS = {
    "input_ids": np.array([[2, 5, 3]]), "attention_mask": np.ones((1, 3), int),
    "token_type_ids": np.zeros((1, 3), int), "task_id": np.array([0]),
}  # fmt: skip
PIXELS = np.zeros((1, 3, 16, 16), np.float32)
REFUSED = {
    "unknown model": ("/v2/models/nope/infer", {}, 404, "unknown model 'nope': served are texts, digits"),
    "unknown version": ("/v2/models/texts/versions/2/infer", {}, 404, "no version '2', only '1'"),
    "unknown path": ("/v3", {}, 404, "there is nothing at this path"),
    "wrong method": ("/v2", {}, 405, "takes another method"),
    "no JSON": (INFER, b"\x00", 400, "not valid JSON"),
    "deep JSON": (PREDICT, b'{"inputs":' + b"[" * 1000, 400, "not valid JSON"),
    "a million empty lists": (PREDICT, b'{"inputs":[' + b"[]," * 10**6 + b"[]]}", 413, "values: no request of this model has"),
    "a huge dimension": (INFER, changed(IDS, "input_ids", shape=[1, 10**18]), 400, "(sequence) must be 1 to 24"),
    "a negative size": (INFER, changed(IDS, "input_ids", shape=[1, -3]), 400, "must be 1 to 24, not -3"),
    "another datatype": (INFER, changed(IDS, "input_ids", datatype="FP32"), 400, "must be INT64, not 'FP32'"),
    "a token that is not in the vocabulary": (INFER, changed(IDS, "input_ids", data=[2, 4000, 3]), 400, "4000 is not one of 0 to 21"),
    "an unknown task_id": (INFER, changed(IDS, "task_id", data=[2]), 400, "2 is not one of 0 to 1"),
    "a row without a token": (INFER, changed(IDS, "attention_mask", data=[0, 0, 0]), 400, "a row of zeros"),
    "inputs that disagree": (INFER, changed(IDS, "task_id", shape=[2], data=[0, 0]), 400, "has 2 for batch, another input 1"),
    "wrong binary sizes": (INFER, changed(IDS, "input_ids", data=None, parameters={"binary_data_size": 24}), 400, "needs 24 bytes after the JSON, and 0 are there"),
    "not finite": ("/v2/models/digits/infer", changed({"pixel_values": PIXELS}, "pixel_values", data=[1e39] * 768), 400, "not finite"),
    "no task": (PREDICT, {"inputs": ["a"]}, 400, "answers several tasks: name one of mood, warmth"),
    "unknown task": (PREDICT, {"inputs": ["a"], "task": "b"}, 404, "unknown task 'b': texts answers mood, warmth"),
    "no input": (PREDICT, {"task": "mood"}, 400, "holds no input"),
    "too many inputs": (PREDICT, {"inputs": ["a"] * 33, "task": "mood"}, 400, "at most 32"),
    "a pair for a single text": (PREDICT, {"inputs": [["a", "b"]], "task": "mood"}, 400, "takes single texts"),
    "no text": (PREDICT, {"inputs": [3], "task": "mood"}, 400, "a text or a list of two texts: given 3"),
    "an overlong text": (PREDICT, {"inputs": ["a" * 100_001], "task": "mood"}, 413, "more than 100000 bytes"),
    "text for pictures": ("/v1/models/digits/predict", {"inputs": ["a"]}, 400, "takes pictures, not text"),
    "a picture for texts": ("/v1/models/texts/classify", b"x", 400, "takes text, not pictures"),
    "no picture": (CLASSIFY, b"", 400, "the body is empty"),
    "a text as a picture": (CLASSIFY, b"GIF89a" + bytes(50), 400, "not a readable JPEG, PNG or WebP"),
    "half a picture": (CLASSIFY, picture_bytes()[:-300], 400, "damaged or truncated"),
    "a decompression bomb": (CLASSIFY, bomb(), 413, "more than 25 million pixels"),
    "a JPEG of many scans": (CLASSIFY, many_scans(20_000), 413, "a JPEG of more than 100 scans"),
    "too much text": (PREDICT, {"inputs": ["a" * 40_000] * 26, "task": "mood"}, 413, "more than 1000000 bytes together"),
    "a bad top": (f"{CLASSIFY}?top=-1", picture_bytes(), 400, "top must be a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_sentence(server, name):
    path, body, status, words = REFUSED[name]
    found, headers, plain = server.post(path, body)
    assert (found, list(plain)) == (status, ["error"]), plain
    assert words in plain["error"] and "\n" not in plain["error"]
    assert len(plain["error"]) < 300 and "/" not in plain["error"].replace("/v2", "")
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    ("path", "most"),
    # JSON of texts: 3 inputs [32, 24] and task_id [32]
    [(CLASSIFY, 16_000_000), (INFER, 65_536 + 32 * (3 * 32 * 24 + 32))],
)
def test_a_body_that_is_too_large_is_refused_before_it_is_read(server, path, most, chunked):
    body = iter([bytes(MB)] * 17) if chunked else bytes(17 * MB)
    headers = {"Transfer-Encoding": "chunked"} if chunked else {}
    try:
        status, _, plain = server.ask("POST", path, body, headers, chunked=chunked)
    except (BrokenPipeError, ConnectionResetError):
        return  # the server hung up while this client was still sending
    assert (status, plain) == (413, {"error": f"the body has more than {most} bytes."})


def test_long_headers_and_compressed_bodies_and_forms_are_refused(server):
    status, _, plain = server.ask("GET", "/v2", headers={"x-long": "a" * 17_000})
    assert (status, plain["error"][:15]) == (431, "the headers hav")
    status, _, plain = server.ask("POST", PREDICT, b"x", {"Content-Encoding": "gzip"})
    assert status == 415 and "'gzip' is not accepted" in plain["error"]
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, _, plain = server.ask("POST", CLASSIFY, b"--x--", headers)
    assert status == 415 and "not as a form" in plain["error"]
    status, _, plain = server.ask("POST", INFER, b"{}", {"Inference-Header-Content-Length": "-1"})
    assert status == 400 and "is no length" in plain["error"]


PATHS = st.sampled_from([INFER, PREDICT, CLASSIFY, "/v2/models/digits/infer"]) | st.text(
    st.characters(min_codepoint=33, max_codepoint=126), max_size=20
).map("/".__add__)
BODIES = st.binary(max_size=200) | st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(["mood", "input_ids"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["inputs", "task", "name", "shape", "data"]), inner)
    ),
    max_leaves=8,
).map(lambda plain: json.dumps(plain).encode())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(path=PATHS, body=BODIES, length=st.none() | st.integers(-9, 99))
def test_whatever_is_sent_is_answered_or_refused(server, path, body, length):
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    status, _, plain = server.ask("POST", path, body, headers)
    assert 200 <= status < 500 and (status == 200 or list(plain) == ["error"]), plain


def test_metrics_count_what_happened(server):
    before = read_metrics(server)
    server.post(PREDICT, {"inputs": ["a film", "good"], "task": "mood"})
    server.post("/v2/models/nope/infer", {})
    after = read_metrics(server)
    ok = 'mdpd_requests_total{route="/v1/models/{model}/predict",status="200"}'
    assert after[ok] == before[ok] + 1
    key = 'mdpd_errors_total{kind="not_found"}'
    assert after[key] == before[key] + 1
    for name, grown in (("batch_rows", 2), ("compute_seconds", 0), ("queue_seconds", 0)):
        key = f'mdpd_{name}_sum{{model="texts"}}'
        assert after[key] > before[key] + grown - 1e-9 or after[key] == before[key] + grown
    assert after['mdpd_queue_rows{model="texts"}'] == 0
    assert not [key for key in after if "nope" in key]  # no stranger makes a new series


def test_a_client_that_leaves_within_its_body_is_no_error_of_ours(server):
    before = read_metrics(server)
    gone, internal = (f'mdpd_errors_total{{kind="{kind}"}}' for kind in ("gone", "internal"))
    counted = 'mdpd_requests_total{route="/v1/models/{model}/predict",status="400"}'
    for half_closed in (True, False):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{"
            client.sendall(head.encode())
            if half_closed:
                client.shutdown(socket.SHUT_WR)
                assert client.recv(1000) == b""
    end = time.monotonic() + 20
    while (after := read_metrics(server)).get(gone, 0) < before.get(gone, 0) + 2:
        assert time.monotonic() < end, after
    assert after[counted] == before.get(counted, 0) + 2
    assert after.get(internal) == before.get(internal)
    # that stderr holds no traceback is what the fixture `server` asserts


def test_work_for_clients_that_have_left_is_dropped(bundles):
    running = Server(bundles["texts"], "--max-delay-ms", 25_000, "--max-batch", 32, "--queue", 32)
    plain = {"inputs": ["a good film"], "task": "mood"}
    body = json.dumps(plain).encode()
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    try:
        clients = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(30)]
        for client in clients:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        waits = 'mdpd_queue_rows{model="texts"}'
        end = time.monotonic() + 15
        while read_metrics(running)[waits] < 30:
            assert time.monotonic() < end
        for client in clients:
            client.close()
        while read_metrics(running)[waits] > 0:
            assert time.monotonic() < end
        assert read_metrics(running)['mdpd_errors_total{kind="gone"}'] == 30
    finally:
        assert running.stop() == (0, "")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_children_end_with_the_server(bundles, how):
    running = Server(f"digits={bundles['digits']}")
    assert running.post(CLASSIFY, picture_bytes())[0] == 200
    children = psutil.Process(running.process.pid).children(recursive=True)
    assert len(children) >= 2
    running.stop(how)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_hostile_json_of_many_clients_holds_nobody_up(server):
    body = b'{"inputs":[' + b"[]," * 1_900_000 + b"[]]}"
    process = psutil.Process(server.process.pid)
    before, most, slowest = process.memory_info().rss, 0, 0.0
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(server.post, PREDICT, body) for _ in range(8)]
        while not all(future.done() for future in asked):
            started = time.monotonic()
            assert server.ask("GET", "/v2/health/ready")[0] == 200
            slowest = max(slowest, time.monotonic() - started)
            most = max(most, process.memory_info().rss)
    assert {future.result()[0] for future in asked} == {413}
    assert slowest < 5
    assert most - before < 250 * MB  # the bodies alone are 46 MB; as objects, 8 times 190 MB


def read_metrics(server):
    text = server.ask("GET", "/metrics")[2].decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {key: float(value) for key, _, value in lines}


# Without HTTP: what is certain only inside of one loop


def core_of(bundles, work, name="texts", **options):
    async def run():
        core = RequestCore.open({name: bundles[name]}, CoreOptions(**options))
        await core.start()
        try:
            return await work(core)
        finally:
            await core.close()

    return asyncio.run(run())


def test_rows_of_both_tasks_share_a_run_and_a_tensor_request_too(bundles):
    bundle = load_bundle(bundles["texts"])
    texts = sentences(4, seed=2)
    arrays = text_inputs(bundle, texts[:1], "warmth")

    async def work(core):
        return await asyncio.gather(
            *(core.predict("texts", [text], task="mood") for text in texts),
            core.predict("texts", texts, task="warmth"),
            core.infer("texts", json.dumps(as_json(arrays)).encode()),
        )

    *moods, scores, infer = core_of(bundles, work, max_delay_ms=2000.0, max_batch=9)
    assert {answer.batch_rows for answer in (*moods, scores, infer)} == {9}
    for answer, expected in zip(moods, bundle.predict(texts, task="mood"), strict=True):
        assert answer.predictions[0].probability == pytest.approx(expected.probability, abs=1e-5)
    for found, expected in zip(
        scores.predictions, bundle.predict(texts, task="warmth"), strict=True
    ):
        assert found.score == pytest.approx(expected.score, abs=1e-5)
    data = json.loads(infer.reply.body)["outputs"][0]["data"]
    np.testing.assert_allclose(data, only(bundle.runner()(arrays))[0], atol=1e-5)


def test_a_full_queue_and_a_deadline(bundles):
    async def work(core):
        waits = asyncio.create_task(core.predict("texts", ["a film"], task="mood"))
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match=r"queue of texts is full \(2 rows\)") as full:
            await core.predict("texts", ["a", "b"], task="mood")
        assert full.value.status == 503 and full.value.retry_after_s == 1
        with pytest.raises(Refusal, match="not ready in time") as late:
            await waits
        assert late.value.status == 504
        assert core.queued() == {"texts": 0}

    core_of(bundles, work, max_batch=2, queue=2, max_delay_ms=20_000.0, timeout_s=0.5)


def test_a_clients_own_limit_is_kept(bundles):
    body = json.dumps(as_json(IDS, parameters={"timeout": 50_000})).encode()

    async def work(core):
        with pytest.raises(Refusal) as late:
            await core.infer("texts", body)
        assert late.value.status == 504

    core_of(bundles, work, max_delay_ms=20_000.0)


# What fails

BREAKABLE = """
import signal, sys, tensorrt
from mdpd_deploy.cli import main
signal.signal(signal.SIGUSR1, lambda number, frame: tensorrt._faults.update(execute=True))
sys.exit(main(["serve", "--port", "0", *sys.argv[1:]]))
"""
FAKES = Path(__file__).parent / "fakes"


@pytest.fixture
def engine_bundle(tiny_trt_bundle, stand_in, tmp_path):
    stand_in()
    bundle = shutil.copytree(tiny_trt_bundle, tmp_path / "films")
    build_engine(bundle)
    return bundle


def test_a_failed_engine_ends_the_server(engine_bundle):
    paths = [str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]
    running = Server(
        engine_bundle, "--runtime", "trt", program=BREAKABLE, PYTHONPATH=os.pathsep.join(paths)
    )
    path, plain = "/v1/models/films/predict", {"inputs": ["a good film"]}
    assert running.post(path, plain)[0] == 200
    assert running.ask("GET", "/v2/health/ready")[0] == 200
    running.process.send_signal(signal.SIGUSR1)
    assert running.post(path, plain)[0] == 500
    code, errors = running.end()
    assert code == 1 and "Traceback" not in errors
    assert "error: films answers no more: TensorRT refused the run" in errors
    assert "Start the server again." in errors


def test_a_failed_engine_is_not_ready(engine_bundle, stand_in):
    trt, _ = stand_in()

    async def work(core):
        assert core.ready and core.failed is None
        trt._faults["execute"] = True
        with pytest.raises(Refusal) as first:
            await core.predict("films", ["a good film"])
        with pytest.raises(Refusal, match="shutting down") as second:
            await core.predict("films", ["a good film"])
        assert (first.value.status, second.value.status) == (500, 503)
        assert not core.ready and "TensorRT refused the run" in core.failed

    core_of({"films": engine_bundle}, work, name="films", runtime="trt", device="cuda")


def test_batches_that_ended_are_not_ready(bundles):
    async def work(core):
        core._batchers["texts"]._loop.cancel()
        await asyncio.sleep(0.01)
        assert not core.ready and "its batches have ended" in core.failed
        with pytest.raises(Refusal) as stop:
            await core.predict("texts", ["a"], task="mood")
        assert stop.value.status == 503

    core_of(bundles, work)


def test_what_escapes_a_route_is_counted_and_framed(bundles, caplog):
    import uvicorn

    from mdpd_deploy.serve.web.app import App
    from mdpd_deploy.serve.web.metrics import Metrics

    metrics = Metrics()
    core = RequestCore.open({"digits": bundles["digits"]}, CoreOptions())
    core.describe = lambda: 1 / 0
    config = uvicorn.Config(App(core, metrics), log_config=None, access_log=False)
    served = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as place:
        thread = threading.Thread(target=served.run, kwargs={"sockets": [place]})
        thread.start()
        connection = http.client.HTTPConnection(*place.getsockname(), timeout=20)
        connection.request("GET", "/v2")
        reply = connection.getresponse()
        assert (reply.status, list(json.loads(reply.read()))) == (500, ["error"])
        connection.close()
        served.should_exit = True
        thread.join(20)
    assert core.join(20)
    assert reply.headers["x-content-type-options"] == "nosniff"
    text = metrics.text()[0].decode()
    assert 'mdpd_requests_total{route="/v2",status="500"} 1.0' in text
    assert 'mdpd_errors_total{kind="internal"} 1.0' in text
    assert caplog.text.count("ZeroDivisionError") == 1


HANGING = """
import sys, time
from pathlib import Path
from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.web.run import serve_bundles
from mdpd_deploy.serve.core.model import open_runner

class Runner:
    hangs = False
    def __init__(self, *asked):
        self.inner = open_runner(*asked)
    def __getattr__(self, name):
        return getattr(self.inner, name)
    def __call__(self, arrays):
        time.sleep(1000 * self.hangs)
        return self.inner(arrays)

def begin(url):
    Runner.hangs = True
    print("at", url, flush=True)

served = {"texts": Path(sys.argv[1])}
options = CoreOptions(drain_s=1)
serve_bundles(served, options, host="127.0.0.1", port=0, on_ready=begin, make_runner=Runner)
"""


def test_a_run_that_hangs_does_not_outlive_the_drain(bundles):
    running = Server(bundles["texts"], program=HANGING)
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(running.post, PREDICT, {"inputs": ["a"], "task": "mood"})
        while read_metrics(running)['mdpd_queue_rows{model="texts"}'] < 1:
            assert not asked.done()
        code, errors = running.stop()
    assert code == 1 and "a model is still busy after the drain" in errors
    assert "Traceback" not in errors
    assert asked.result()[::2] == (503, {"error": "the server is shutting down."})


# Start and end


def test_serving_loads_no_torch(bundles, run_python):
    code = f"""
import json, os, signal, sys, threading, urllib.request
from pathlib import Path
from mdpd_deploy.commands.serve import name_bundles
from mdpd_deploy.serve.core.options import CoreOptions
from mdpd_deploy.serve.web.run import serve_bundles
def ask(url):
    body = json.dumps({{"inputs": ["a film"], "task": "mood"}}).encode()
    print(json.load(urllib.request.urlopen(url + "/v1/models/texts/predict", body))["task"])
    urllib.request.urlopen(url + "/metrics"); urllib.request.urlopen(url)
    os.kill(os.getpid(), signal.SIGTERM)
start = lambda url: threading.Thread(target=ask, args=[url]).start()
named = name_bundles([{str(bundles["texts"])!r}])
serve_bundles(named, CoreOptions(), host="127.0.0.1", port=0, on_ready=start)
assert "torch" not in sys.modules
"""
    done = run_python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "mood\n", "")


def test_sigterm_answers_what_was_taken_and_a_kill_leaves_nothing_behind(bundles):
    words = (bundles["texts"], "--max-delay-ms", 1500, "--max-batch", 8)
    running = Server(*words)
    with ThreadPoolExecutor(3) as clients:
        plain = {"inputs": ["a good film"], "task": "mood"}
        waiting = [clients.submit(running.post, PREDICT, plain) for _ in range(3)]
        while read_metrics(running)['mdpd_queue_rows{model="texts"}'] < 3:
            assert not any(future.done() for future in waiting)
        code, errors = running.stop()
        assert (code, errors) == (0, "")
        assert [future.result()[0] for future in waiting] == [200] * 3
    with pytest.raises(ConnectionRefusedError):
        running.ask("GET", "/v2")
    again = Server(*words, "--port", running.port)
    assert again.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    third = Server(*words, "--port", running.port)
    assert third.post(PREDICT, plain)[0] == 200
    assert third.stop(signal.SIGINT) == (130, "interrupted\n")


def run_cli(capsys, *words):
    code = main(["serve", *map(str, words)])
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return code, said.err


def test_what_cannot_be_served_is_said_in_one_sentence(bundles, tmp_path, capsys):
    digits = bundles["digits"]
    assert run_cli(capsys, tmp_path)[0] == 2
    code, words = run_cli(capsys, digits, "--device", "tpu")
    assert code == 2 and "--device tpu: choose one of cpu, cuda" in words
    code, words = run_cli(capsys, digits, "--max-batch", 64)
    assert code == 2 and "--max-batch 64" in words and "batches of up to 32" in words
    code, words = run_cli(capsys, digits, "--queue", 8, "--port", 0)
    assert code == 2 and "--queue 8 has no place for a request of 32 rows" in words
    code, words = run_cli(capsys, digits, "--threads", 2, "--runtime", "trt")
    assert code == 2 and "--threads belongs to --runtime onnx" in words
    code, words = run_cli(capsys, digits, f"{digits}")
    assert code == 2 and "two bundles would be served as 'digits'" in words
    code, words = run_cli(capsys, digits, "--host", "no.such.host.invalid")
    assert code == 2 and "is no address of this machine" in words
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, words = run_cli(capsys, digits, "--port", taken.getsockname()[1])
    assert code == 2 and "is in use: choose another one" in words


def test_only_bundles_of_the_key_are_served(bundles, keys, tmp_path, capsys):
    copy = shutil.copytree(bundles["digits"], tmp_path / "digits")
    public = keys / "public.pem"
    code, words = run_cli(capsys, copy, "--port", 0, "--key", public)
    assert code == 1 and "is not signed" in words
    sign_bundle(copy, key=keys / "private.pem")
    core = RequestCore.open({"digits": copy}, CoreOptions(key=public))
    assert list(core.models) == ["digits"]
    code, words = run_cli(capsys, copy, "--port", 0, "--key", keys / "other-public.pem")
    assert code == 1 and "does not fit bundle" in words
    (copy / "manifest.json").write_bytes(b"{")  # not even parsed
    code, words = run_cli(capsys, copy, "--port", 0, "--key", public)
    assert code == 1 and "does not fit bundle" in words


def test_a_bundle_whose_golden_vectors_do_not_come_out_is_not_served(bundles, tmp_path, capsys):
    import hashlib

    copy = shutil.copytree(bundles["digits"], tmp_path / "digits")
    tensors = load_file(copy / "golden.safetensors")
    tensors["output"] = tensors["output"][::-1].copy()
    raw = save(tensors)
    (copy / "golden.safetensors").write_bytes(raw)
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    manifest["files"]["golden.safetensors"] = entry
    (copy / "manifest.json").write_text(json.dumps(manifest))
    code, words = run_cli(capsys, copy, "--port", 0)
    assert code == 1 and "the golden vectors come out wrong on this device" in words


def test_names_of_models(tmp_path):
    (tmp_path / "a b").mkdir()
    assert name_bundles(["x/sst2", "y=x/sst2/"]) == {"sst2": Path("x/sst2"), "y": Path("x/sst2/")}
    for word in (str(tmp_path / "a b"), "=x", "../up=x", "-a=x"):
        with pytest.raises(UserError, match="cannot name a model in a URL"):
            name_bundles([word])


def test_bundles_are_named_by_their_runs():
    first, second = "runs/1-sst2-mdpd/bundles", "runs/2-sst2-mdpd/bundles"
    named = name_bundles([f"{first}/onnx-fp32", f"{second}/onnx-fp32/", "glue", f"x={first}/trt"])
    assert list(named) == ["1-sst2-mdpd", "2-sst2-mdpd", "glue", "x"]
    assert named["2-sst2-mdpd"] == Path(second, "onnx-fp32")
    of_one = name_bundles([f"{first}/onnx-fp32", f"{first}/onnx-int8-cpu", f"{second}/onnx-fp32"])
    assert list(of_one) == ["1-sst2-mdpd-onnx-fp32", "1-sst2-mdpd-onnx-int8-cpu", "2-sst2-mdpd"]
    with pytest.raises(UserError, match="two bundles would be served as '1-sst2-mdpd-onnx-fp32'"):
        name_bundles([f"{first}/onnx-fp32"] * 2)


# The page


def test_the_page_needs_nothing_from_elsewhere(server):
    status, headers, raw = server.ask("GET", "/")
    page = raw.decode()
    assert status == 200 and headers.get_content_type() == "text/html"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.findall(r"(?:https?:)?//\w", page.replace("// ", ""))
    assert "innerHTML" not in page  # labels and texts go in as text


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="drives a browser")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "chromedriver" if chromium else "chromium"
        pytest.skip(f"{missing} is not installed: the page is not tried in a browser")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(word)
    running = webdriver.Chrome(options=options, service=Service(driver))
    running.implicitly_wait(10)
    yield running
    running.quit()


def test_a_person_types_a_text_and_drops_a_picture(server, bundles, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def element(name):
        return browser.find_element(By.ID, name)

    def wait(condition):
        WebDriverWait(browser, 20).until(lambda _: condition())

    texts, digits = load_bundle(bundles["texts"]), load_bundle(bundles["digits"])
    browser.get(f"{server.url}/")
    wait(lambda: element("state").text == "ready")
    assert not element("send").is_enabled()
    element("text").send_keys("a good <b>film</b>")
    element("send").click()
    (expected,) = texts.predict(["a good <b>film</b>"], task="mood")
    wait(lambda: element("label").text == expected.label)
    assert f"{100 * expected.probability:.1f} %" in element("share").text
    assert element("bars").text.split("\n")[::2] == list(expected.probabilities)
    assert element("t-work").text.endswith("ms") and element("t-rows").text == "1"

    Select(element("task")).select_by_visible_text("warmth")
    element("send").click()
    (score,) = texts.predict(["a good <b>film</b>"], task="warmth")
    wait(lambda: element("label").text == f"{score.score:.3f}")

    Select(element("model")).select_by_visible_text("digits")
    (tmp_path / "a.png").write_bytes(picture_bytes())
    element("file").send_keys(str(tmp_path / "a.png"))
    (expected,) = digits.predict([tmp_path / "a.png"])
    wait(lambda: element("label").text == expected.label)
    (tmp_path / "b.png").write_bytes(b"no picture")
    element("file").send_keys(str(tmp_path / "b.png"))
    wait(lambda: "not a readable JPEG" in element("error").text)
    assert [
        entry
        for entry in browser.get_log("browser")
        if "favicon" not in entry["message"] and "400" not in entry["message"]
    ] == []
