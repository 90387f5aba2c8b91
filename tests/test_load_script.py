"""The open-loop load generator, against a small server whose behaviour is known."""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import pytest

aiohttp = pytest.importorskip("aiohttp", reason="sends the load")
from aiohttp import web

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def open_loop(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import open_loop

    yield open_loop
    names = ("open_loop", "load_target", "load_chart", "kept_lines", "serve_load", "rival_model")
    for name in names:
        sys.modules.pop(name, None)


def load(open_loop, handler, requests, **options):
    """Run a server and a load against it in one event loop."""

    async def both():
        app = web.Application()
        app.router.add_post("/{tail:.*}", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            return await open_loop.apply_load(f"http://127.0.0.1:{port}", requests, **options)
        finally:
            await runner.cleanup()

    return asyncio.run(both())


def test_arrivals_are_poisson(open_loop):
    times = open_loop.poisson_times(200, 50, np.random.default_rng(0))
    gaps = np.diff(times)
    assert abs(len(times) / 50 - 200) < 10
    assert abs(gaps.mean() * 200 - 1) < 0.05
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05  # an exponential's is 1; even arrivals have 0


def test_a_slow_server_does_not_slow_the_arrivals_and_its_queue_counts(open_loop):
    """A closed loop would see 20 ms from a server that does one request at a time in 20 ms."""
    lock = asyncio.Lock()

    async def one_at_a_time(request):
        async with lock:
            await asyncio.sleep(0.02)
        return web.Response(body=b"{}")

    requests = [open_loop.Request("/x", b"", {})]
    samples = load(open_loop, one_at_a_time, requests, rate=100, seconds=2, seed=0)
    level = open_loop.summarise(samples, rate=100, seconds=2)
    assert level["requests"] > 150
    assert level["errors"] == {}
    # twice the capacity for 2 s: the last waits for about as many as came too much
    assert level["p99_ms"] > 1000
    assert level["answered_per_s"] < 60


def test_outcomes_are_told_apart(open_loop):
    bodies = {
        "/ok": (200, b'{"x": 1}'),
        "/busy": (503, b'{"error": "too much"}'),
        "/rude": (500, b"<html>"),
    }

    async def handler(request):
        if request.path == "/gone":
            request.transport.close()
            return web.Response()
        status, body = bodies[request.path]
        return web.Response(status=status, body=body)

    def check(body, headers):
        return None if json.loads(body) == {"x": 2} else "wrong answer"

    requests = [
        open_loop.Request("/ok", b"", {}),
        open_loop.Request("/ok", b"", {}, check),
        *(open_loop.Request(path, b"", {}) for path in ("/busy", "/rude", "/gone")),
    ]
    samples = load(open_loop, handler, requests, rate=200, seconds=1, seed=1)
    errors = open_loop.summarise(samples, rate=200, seconds=1)["errors"]
    assert errors.keys() == {
        "wrong answer", "status 503", "unclean error", "ServerDisconnectedError",
    }  # fmt: skip
    assert sum(errors.values()) < len(samples)


def test_the_knee_is_where_two_rates_in_a_row_are_not_carried(open_loop):
    def level(rate, p95, **errors):
        return {
            "rate": rate,
            "p95_ms": p95,
            "errors": errors,
            "offered_per_s": rate,
            "answered_per_s": rate,
        }

    levels = [level(10, 4), level(20, 30), level(40, 6), level(80, 90), level(160, 900)]
    assert open_loop.find_knee(levels) == 40
    assert (
        open_loop.find_knee([level(10, 4), level(20, 5, refused=1), level(40, 5, refused=2)]) == 10
    )
    assert open_loop.find_knee([level(10, 4, refused=1), level(20, None)]) is None
    assert open_loop.find_knee(levels[:1]) == 10
    behind = {**level(10, 900), "answered_per_s": 6}  # saturated from the start
    assert open_loop.find_knee([behind, {**behind, "rate": 20}]) is None


def test_the_whole_script_measures_a_served_bundle(open_loop, tiny_bundle, tmp_path, monkeypatch):
    """A real server, a short ramp and a short soak: figures, pictures, no wrong answer."""
    import serve_load

    words = [
        "serve_load.py", str(tiny_bundle.path), "--rounds", "20", "--seconds", "0.5", "--threads", "1",
        "--first-rate", "20", "--step", "8", "--max-rate", "160", "--soak-minutes", "0.02",
        "--out", str(tmp_path / "load"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    serve_load.main()
    report = json.loads((tmp_path / "load.json").read_text())
    for client in ("http.client", "http.client, raw input", "httpx", "tritonclient"):
        found = report["overhead"]["local"][client]
        assert found["p50_ms"] > report["overhead"]["bare_p50_ms"]
        assert found["processor_ms"] > 0 and report["overhead"]["bare_processor_ms"] > 0
    assert report["ramp"]["local"]["bare_rows_per_s"] > report["ramp"]["local"]["knee_per_s"]
    assert report["ramp"]["local"]["near_knee"]["errors"] == {}
    levels = report["ramp"]["local"]["levels"]
    assert [round(row["rate"]) for row in levels] == [20, 160]
    assert not any("wrong" in error or "unclean" in error for r in levels for error in r["errors"])
    assert report["soak"]["errors"] == 0
    assert report["soak"]["lines"][0]["memory_bytes"] > 50e6
    assert (tmp_path / "load.svg").stat().st_size > 1000
    assert (tmp_path / "load-memory.png").stat().st_size > 1000


def test_what_rivals_serve_answers_as_the_bundle_does(open_loop, tiny_text_bundle):
    from rival_model import Model

    texts = ["a good film", "dull", "the film was not very good " * 40]
    found = Model(tiny_text_bundle.path, threads=1)([{"inputs": [text]} for text in texts])
    for answer, right in zip(found, tiny_text_bundle.predict(texts), strict=True):
        (given,) = answer["predictions"]
        assert given["label"] == right.label
        assert given["probability"] == pytest.approx(right.probability, abs=1e-5)
