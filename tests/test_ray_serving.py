"""The server on a Ray cluster of two nodes: replicas, batches, more under load, answers and errors.

Ray runs in a child process: importing its Serve library warns, and a cluster must end whatever
happens to the test.
"""

import json
import socket
from dataclasses import fields

import pytest

from mdpd_deploy.cli import main

pytest.importorskip("onnxruntime", reason="serves exported graphs")
pytest.importorskip("ray.cluster_utils", reason="starts a Ray cluster")
pytest.importorskip("starlette", reason="serves over HTTP")

CLUSTER = """
import concurrent.futures, json, os, re, signal, socket, subprocess, sys, time, urllib.error
import urllib.request
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from mdpd_deploy.artifacts.bundle import load_bundle
from mdpd_deploy.runtimes.base import only

bundle, log = load_bundle(sys.argv[1]), Path(sys.argv[2])
golden = bundle.golden()
one = {"num_cpus": 1, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=one)
cluster.add_node(num_cpus=1)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
words = ["serve", f"digits={bundle.path}", "--engine", "ray", "--replicas", "2"]
words += ["--port", str(port), "--max-delay-ms", "50"]
with log.open("w") as stream:
    server = subprocess.Popen(
        [sys.executable, "-m", "mdpd_deploy", *words], stdout=stream, stderr=stream,
        env={**os.environ, "RAY_ADDRESS": cluster.address},
    )
url = f"http://127.0.0.1:{port}"

def ask(path, body=None):
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, body), timeout=60) as got:
            return got.status, json.loads(got.read())
    except urllib.error.HTTPError as err:
        return err.code, json.loads(err.read())

try:
    for _ in range(600):
        if f"serving digits at {url}" in log.read_text():
            break
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    def infer(index):
        array = golden.arrays["pixel_values"][index : index + 1]
        given = {"name": "pixel_values", "datatype": "FP32", "shape": list(array.shape)}
        given["data"] = array.ravel().tolist()
        return ask("/v2/models/digits/infer", json.dumps({"inputs": [given]}).encode())
    count = len(golden.raws)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(infer, [index % count for index in range(64)]))
    off = max(
        float(abs(value - right))
        for index, (status, answer) in enumerate(answers)
        for value, right in zip(answer["outputs"][0]["data"], only(golden.outputs)[index % count])
    )
    replicas = [
        process for process in psutil.process_iter(["name", "cmdline", "ppid"])
        if "ServeReplica:mdpd" in " ".join(process.info["cmdline"] or [])
    ]
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    mine = [process for process in replicas if process.pid in ours]
    rows = []
    for _ in range(20):  # whichever replica answers tells what it has run
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as got:
            text = got.read().decode()
        for kind in ("count", "sum"):
            found = re.search(rf'^(mdpd\\w*rows_{kind})\\{{.*digits.*\\}} (\\S+)$', text, re.M)
            rows.append((kind, float(found[2]) if found else 0.0))
    def serve_too(port):
        own = [*words[:-3], str(port), *words[-2:]]
        done = subprocess.run(
            [sys.executable, "-m", "mdpd_deploy", *own], capture_output=True, text=True,
            env={**os.environ, "RAY_ADDRESS": cluster.address}, timeout=120,
        )
        return done.returncode, done.stdout, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        elsewhere = free.getsockname()[1]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answer_elsewhere, answer_beside = pool.map(serve_too, (elsewhere, port))
    print(json.dumps({
        "elsewhere": answer_elsewhere,
        "beside": answer_beside,
        "port": port,
        "statuses": sorted({status for status, _ in answers}),
        "off": off,
        "raylets": len({process.info["ppid"] for process in mine}),
        "replicas": len(mine),
        "rows": rows,
        "unknown": ask("/v2/models/other/infer", b"{}"),
        "invalid": ask("/v2/models/digits/infer", b"[]"),
        "ready": ask("/v2/health/ready"),
    }))
finally:
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
    if code:
        cluster.shutdown()
assert code == 0, log.read_text()

# Ray adds a replica under load: 16 at a time where one is aimed at.
import ray
from ray import serve
from mdpd_deploy.serve.ray_app import AppArguments, app

ray.init(cluster.address, log_to_driver=False)
try:
    few = {"min_replicas": 1, "max_replicas": 2}
    soon = {"target_ongoing_requests": 1, "upscale_delay_s": 0}
    serve.run(app(AppArguments(bundles=f"digits={bundle.path}", max_delay_ms=50, **few, **soon)))
    def count():
        made = serve.status().applications["default"].deployments["mdpd"]
        return made.replica_states.get("RUNNING", 0)
    statuses, before, end = set(), count(), time.monotonic() + 90
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        while count() < 2 and time.monotonic() < end:
            statuses |= {status for status, _ in pool.map(infer, [0] * 64)}
    print(json.dumps({"statuses": sorted(statuses), "replicas": [before, count()]}))
finally:
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiny_bundle


@pytest.mark.slow
def test_replicas_on_two_nodes_answer_alike_in_batches(bundle, tmp_path, run_python):
    done = run_python("-W", "ignore", "-c", CLUSTER, str(bundle.path), str(tmp_path / "log"))
    assert done.returncode == 0, done.stdout + done.stderr
    found, scaled = map(json.loads, done.stdout.splitlines()[-2:])
    assert found["statuses"] == [200]
    assert found["off"] < 1e-3
    assert (found["replicas"], found["raylets"]) == (2, 2)
    counts = {value for kind, value in found["rows"] if kind == "count"}
    sums = {value for kind, value in found["rows"] if kind == "sum"}
    assert max(sums) > max(counts) > 0  # fewer runs than rows: batches were formed
    assert found["ready"] == [200, {"ready": True}]
    assert found["unknown"][0] == 404
    assert found["invalid"][0] == 400
    assert isinstance(found["invalid"][1]["error"], str)
    code, out, err = found["elsewhere"]  # a port which Ray Serve would have ignored
    assert (code, out) == (2, "")
    assert "Ray Serve runs on this cluster already" in err
    assert f"--host 127.0.0.1 --port {found['port']}:" in err
    code, out, err = found["beside"]  # it would have taken the first one's place
    assert (code, out) == (2, "")
    assert "an application 'mdpd' runs on this cluster already" in err
    assert scaled == {"statuses": [200], "replicas": [1, 2]}


def test_replicas_are_asked_for_in_one_form(bundle, capsys):
    words = ["serve", str(bundle.path)]
    assert main([*words, "--engine", "rya"]) == 2
    assert "Did you mean 'ray'?" in capsys.readouterr().err
    assert main([*words, "--replicas", "2"]) == 2
    assert "--replicas belongs to --engine ray" in capsys.readouterr().err
    for given in ("two", "0", "4-2", "1-"):
        assert main([*words, "--engine", "ray", "--replicas", given]) == 2
        assert f"--replicas {given[:1]}" in capsys.readouterr().err


def test_the_port_is_known_before_it_is_announced(bundle, capsys, monkeypatch):
    words = ["serve", str(bundle.path), "--engine", "ray", "--port"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([*words, str(taken.getsockname()[1])]) == 2
    assert "is in use: choose another one" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main([*words, "0"]) == 2
    assert "--port 0: which port is free" in capsys.readouterr().err
    monkeypatch.delenv("RAY_ADDRESS")
    from mdpd_deploy.serve.ray_app import _choose_port

    with socket.create_server(("127.0.0.1", _choose_port("127.0.0.1", 0))) as free:
        assert free.getsockname()[1] > 0


def test_every_option_of_a_server_can_be_said_to_ray(bundle):
    """Those that say how many or where belong to the cluster."""
    from mdpd_deploy.serve.core.options import CoreOptions
    from mdpd_deploy.serve.ray_app import AppArguments, Scaling

    options = {field.name for field in fields(CoreOptions)} - {"limits"}
    scaling = {field.name for field in fields(Scaling)}
    assert set(AppArguments.model_fields) == {"bundles", "max_pixels", *options, *scaling}


REPLICA = """
import asyncio, sys
from mdpd_deploy.serve.ray_app import AppArguments, app

async def main():
    given = {"max_replicas": "3", "queue": "64", "max_pixels": "9"}
    made = app(AppArguments(bundles=f"digits={sys.argv[1]}", **given))
    config = made._bound_deployment._deployment_config
    print(config.autoscaling_config.max_replicas, config.max_ongoing_requests)
    plain = {"bundles": f"digits={sys.argv[1]}", "drain_s": "3"}
    made = app(AppArguments(**plain))._bound_deployment
    print(made._deployment_config.graceful_shutdown_timeout_s)
    kind = made.func_or_class
    replica = kind.__new__(kind)
    await replica.__init__()  # as Ray does it
    await replica._run_asgi_lifespan_startup()
    replica.check_health()
    replica.app.core.models["digits"].runner.failed = "the GPU is gone."
    try:
        replica.check_health()
    except Exception as err:
        print(err)
    await replica.__del__()

asyncio.run(main())
"""


def test_a_replica_takes_strings_and_is_not_healthy_once_its_model_failed(bundle, run_python):
    """`serve run mdpd_deploy.serve.ray_app:app bundles=...` and config files pass strings."""
    done = run_python("-W", "ignore", "-c", REPLICA, str(bundle.path))
    wanted = ["3 64", "3.0", "digits answers no more: the GPU is gone."]
    assert done.stdout.splitlines() == wanted, done.stderr
