"""Does a server survive what strangers send? Property-based requests against a live one.

    python benchmarks/fuzz_server.py runs/A/bundles/onnx-fp32 … --requests 10000 --out fuzz.json

Half of the requests are sound ones with a few bytes or values changed, so that they get far; the
rest is made up, or large on purpose: JPEGs of many scans, 16-bit pictures and texts up to the limits
and beyond, numbers of hundreds of digits. Every answer must be a 2xx, a 4xx or, by design, a 503 or
504; the process must stay the same, within its memory, and answer sound requests at the end.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import math
import struct
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from served import Client, start

ALLOWED = {*range(200, 500), 503, 504}
# What a page of another site makes a browser send; every fiftieth request has one of these.
FOREIGN = (
    {"Host": "a.stranger"},
    {"Origin": "http://a.stranger"},
    {"Content-Type": "text/plain"},
    {"Content-Type": "multipart/form-data"},
)
BUFFERED = 200_000  # bytes of a body that a client can send before anybody reads them
SLOW_S = 60.0  # no answer in this time counts as a hang

HUGE = st.integers(1, 400).map(lambda digits: 10**digits) | st.integers(-(10**400), 10**400)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | HUGE | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=25,
)  # fmt: skip
SIZES = st.integers(-3, 40) | st.sampled_from([0, -1, 10**9, 2**63, 10**30]) | HUGE


def sound_tensors(model: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Inputs that the model accepts: short rows of small numbers."""
    rows = int(rng.integers(1, 4))
    arrays = {}
    for port in model["inputs"]:
        shape = [rows if i == 0 else 5 if n == -1 else n for i, n in enumerate(port["shape"])]
        if port["datatype"] == "FP32":
            arrays[port["name"]] = rng.normal(size=shape).astype(np.float32)
        else:
            arrays[port["name"]] = np.full(shape, int(port["name"] == "attention_mask"), np.int64)
    return arrays


def protocol_body(arrays: dict[str, np.ndarray], binary: bool) -> tuple[dict, bytes]:
    """A request of the protocol as a JSON object and the bytes behind it."""
    entries, tail = [], b""
    for name, array in arrays.items():
        kind = {"f": "FP32", "i": "INT64"}[array.dtype.kind]
        entry: dict = {"name": name, "shape": list(array.shape), "datatype": kind}
        if binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    return {"id": "x", "inputs": entries}, tail


def picture(rng: np.random.Generator) -> bytes:
    """A small picture file of a random kind."""
    pixels = rng.integers(0, 256, (*rng.integers(1, 60, 2), 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, str(rng.choice(["PNG", "JPEG", "WEBP"])))
    return stream.getvalue()


def bomb(edge: int) -> bytes:
    """A PNG that says it has edge² pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(200_000), 9))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def many_scans(count: int, edge: int) -> bytes:
    """A sound progressive JPEG of edge² pixels whose last scan comes again and again."""
    stream = io.BytesIO()
    Image.new("RGB", (edge, edge), (10, 200, 90)).save(stream, "JPEG", progressive=True)
    raw = stream.getvalue()
    scan = raw[raw.rindex(b"\xff\xda") : -2]
    return raw[:-2] + scan * (count - raw.count(b"\xff\xda")) + b"\xff\xd9"


def sixteen_bits(edge: int) -> bytes:
    """A PNG of edge² grey pixels of 16 bits, which take a thousandth of that as a file."""
    stream = io.BytesIO()
    Image.new("I;16", (edge, edge), 25_700).save(stream, "PNG")
    return stream.getvalue()


def large_picture(draw) -> bytes:
    """A picture that takes much time or memory for its bytes."""
    edge = draw(st.sampled_from([500, 1000, 2500, 5000, 6000]))
    if draw(st.booleans()):
        return sixteen_bits(edge)
    if draw(st.booleans()):
        return bomb(draw(st.sampled_from([6_000, 13_000, 60_000])))
    return many_scans(draw(st.sampled_from([20, 100, 101, 20_000])), edge)


def large_texts(draw) -> list:
    """Texts, or pairs, of up to the size that one may have, or all may have together, or more."""
    text = draw(st.sampled_from(["the film ", " ", "a", ".", "电影", "\u0301", "x" * 99 + " "]))
    size = draw(st.sampled_from([3_000, 30_000, 99_999, 100_000, 100_001]))
    one = (text * size).encode()[:size].decode(errors="ignore")
    count = draw(st.sampled_from([1, 2, 9, 10, 32]))
    return [one if draw(st.booleans()) else [one, one]] * count


@st.composite
def requests(draw, models: list[dict], plain: list[dict]) -> tuple[str, bytes, dict[str, str]]:
    """One request: path, body, headers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["binary", "binary", "json", "json", "predict", "picture", "wild"]))
    if kind == "wild":
        path = draw(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30))
        body = draw(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
        return "/" + path.lstrip("/"), body, {}
    if kind == "predict":
        model = draw(st.sampled_from(plain))
        task = draw(st.sampled_from(model["tasks"]))["name"]
        texts = draw(st.lists(st.text(max_size=60), max_size=4))
        if draw(st.integers(0, 19)) == 0:
            texts = large_texts(draw)
        body = draw(
            st.just({"inputs": texts, "task": task})
            | st.fixed_dictionaries({"inputs": JSON}, optional={"task": JSON, "top": JSON | SIZES})
        )
        return f"/v1/models/{model['name']}/predict", json.dumps(body).encode(), {}
    if kind == "picture":
        name = draw(st.sampled_from([model["name"] for model in plain]))
        body = damage(draw, picture(rng))
        if draw(st.integers(0, 19)) == 0:
            body = large_picture(draw)
        return f"/v1/models/{name}/classify", body, {}
    model = draw(st.sampled_from(models))
    head, tail = protocol_body(sound_tensors(model, rng), kind == "binary")
    change(draw, head)
    raw = json.dumps(head).encode()
    length = draw(st.just(len(raw)) | SIZES) if kind == "binary" else None
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    body = damage(draw, raw + tail) if draw(st.booleans()) else raw + tail
    return f"/v2/models/{model['name']}/infer", body, headers


def change(draw, head: dict) -> None:
    """Change a few values of a sound request in place."""
    for _ in range(draw(st.integers(0, 2))):
        entry = draw(st.sampled_from(head["inputs"]))
        field = draw(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]))
        value = {
            "shape": st.lists(SIZES, max_size=5),
            "parameters": st.fixed_dictionaries({"binary_data_size": SIZES}),
        }
        entry[field] = draw(value.get(field, JSON) | JSON)
    if draw(st.integers(0, 9)) == 0:
        head[draw(st.sampled_from(["id", "outputs", "parameters", "inputs"]))] = draw(JSON)
    if draw(st.integers(0, 19)) == 0:
        head["parameters"] = {draw(st.sampled_from(["timeout", "priority"])): draw(HUGE)}


def damage(draw, raw: bytes) -> bytes:
    """Flip, cut or add some bytes."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(0, 4))):
        if changed:
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    end = draw(st.just(len(changed)) | st.integers(0, len(changed)))
    return bytes(changed[:end]) + draw(st.just(b"") | st.binary(max_size=20))


def of_children(process: psutil.Process) -> float:
    """Memory of the processes that prepare inputs, together, in MB."""
    total = 0
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += child.memory_info().rss
    return round(total / 1e6, 1)


def fuzz(port: int, process: psutil.Process, count: int, seed: int) -> dict:
    """Send `count` requests; return what came back and what memory was used."""
    client = Client(port, SLOW_S)
    plain = client.get("/v1/models")["models"]
    models = [client.get(f"/v2/models/{model['name']}") for model in plain]
    found: dict = {"statuses": Counter(), "bad": [], "no_answer": Counter(), "slowest_s": 0.0}
    found["hung_up"] = Counter()
    found["rss_mb_peak_of_children"] = 0.0
    memory: list[int] = []

    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), derandomize=False,
    )  # fmt: skip
    @given(request=requests(models, plain))
    def send(request: tuple[str, bytes, dict[str, str]]) -> None:
        path, body, headers = request
        if len(memory) % 50 == 0:
            headers = headers | FOREIGN[len(memory) // 50 % len(FOREIGN)]
        started = time.perf_counter()
        try:
            status, _ = client.ask("POST", path, body, headers)
            found["statuses"][status] += 1
            if status not in ALLOWED and len(found["bad"]) < 20:
                raw = base64.b64encode(body[:2000]).decode()
                found["bad"].append({"status": status, "path": path, "body": raw})
        except (BrokenPipeError, ConnectionResetError) as err:
            large = len(body) > BUFFERED  # refused, and hung up on, while it was still being sent
            found["hung_up" if large else "no_answer"][type(err).__name__] += 1
        except (OSError, http.client.HTTPException) as err:
            found["no_answer"][type(err).__name__] += 1
        found["slowest_s"] = max(found["slowest_s"], time.perf_counter() - started)
        memory.append(process.memory_info().rss)
        found["rss_mb_peak_of_children"] = max(
            found["rss_mb_peak_of_children"], of_children(process)
        )

    from hypothesis import seed as fixed

    fixed(seed)(send)()
    tenth = math.ceil(len(memory) / 10)
    return {
        **found,
        "requests": len(memory),
        "rss_mb_after_a_tenth": round(memory[tenth] / 1e6, 1),
        "rss_mb_end": round(memory[-1] / 1e6, 1),
        "rss_mb_peak": round(max(memory) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz.json"))
    args = parser.parse_args()
    process, port = start(args.bundles)
    try:
        started = time.perf_counter()
        result = fuzz(port, psutil.Process(process.pid), args.requests, args.seed)
        result["seconds"] = round(time.perf_counter() - started, 1)
        result["alive"] = process.poll() is None and Client(port).get("/v2/health/ready")["ready"]
    finally:
        process.terminate()
        process.wait(60)
    ok = result["alive"] and not result["bad"] and not result["no_answer"]
    args.out.write_text(json.dumps({**result, "passed": ok}, indent=2) + "\n")
    for key, value in {**result, "passed": ok}.items():
        print(f"| {key} | {dict(value) if isinstance(value, Counter) else value} |")
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
