"""What does a server add to a bare call, how much load does it carry, and does it last?

    python benchmarks/serve_load.py BUNDLE --engines local,ray --out docs/results/serve-load
    python benchmarks/serve_load.py BUNDLE --soak-minutes 30 --share 0.8 --out soak
    python benchmarks/serve_load.py BUNDLE_OF_TEXTS --rivals rivals/bin/python --threads 1 --out rivals

Four parts: *overhead*, one request at a time, by clients that people use on kept connections,
against ONNX Runtime called in this process, in turn, with the processor time that each request takes;
*ramp*, open-loop Poisson load at rising rates until no server carries it (see open_loop.py), the
servers in turn at each rate, and the highest rows per second of bare runs as large as the server's
own; *near the knee*, each server at a share of what it carries; *soak*, a mix of protocol and raw
requests at that share, watching memory. Every answer is compared with the bundle's golden vectors.
The client runs on the machine that it measures, so knees are lower than a server of its own would
show. Processor time (Linux) is what other work on the machine disturbs least.

`--rivals PYTHON` puts LitServe and Mosec beside `mdpd serve`, all asked plain requests of one text;
`rival_model.py` says how to make an environment that has them.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from kept_lines import CLIENTS
from load_chart import write_charts
from load_target import (
    RIVALS,
    family,
    graph_arrays,
    memory_bytes,
    plain_requests,
    processor_ns,
    protocol_requests,
    rival,
    started,
)
from open_loop import KNEE_FACTOR, Request, apply_load, carried, find_knee, summarise

from mdpd_deploy.artifacts.bundle import Bundle, load_bundle
from mdpd_deploy.artifacts.golden import load_golden
from mdpd_deploy.machine import cpu_count, describe
from mdpd_deploy.runtimes.onnx import OnnxRunner
from mdpd_deploy.serve.latency.estimate import paired_ratio

WARM_UP = 30  # requests
_BARE = ("bare", "")
RAW = "http.client, raw input"  # beside clients that send tensors
Requests = dict[str, list[Request]]


def measure_overhead(
    urls: dict[str, str],
    processes: dict[str, Any],
    clients: Sequence[str],
    bundle: Bundle,
    raw: Requests,
    threads: int,
    rounds: int,
) -> dict[str, Any]:
    """Time a bare call and one request by each client to each server, in turn.

    Args:
        urls: Servers by name.
        processes: Their processes, where this script started them.
        clients: Of `CLIENTS`; rivals take raw inputs only.
        bundle: What is served; all ask its first golden input.
        raw: Plain requests by server.
        threads: Of the bare call.
        rounds: How many times each is asked.

    Returns:
        Times in ms with 95 % intervals, by server and by client.
    """
    task = bundle.tasks[0]
    assert task.golden is not None
    arrays = graph_arrays(bundle, task, load_golden(task.golden).raws[:1])
    runner = OnnxRunner(bundle.path / "model.onnx", threads=threads)
    calls: dict[tuple[str, str], Any] = {_BARE: lambda: runner(arrays)}
    with contextlib.ExitStack() as stack:
        for name, url in urls.items():
            asked = {RAW: (CLIENTS["http.client"], raw[name][0])}
            if name not in RIVALS:
                single = protocol_requests(raw[name][0].path.split("/")[3], bundle)[0]
                asked |= {client: (CLIENTS[client], single) for client in clients}
            for client, (open_client, request) in asked.items():
                calls[name, client], close = open_client(url, request, arrays)
                stack.callback(close)
        for _ in range(WARM_UP):  # in turn: servers end a connection that is idle for 5 s
            for call in calls.values():
                call()
        trees = {name: family(process.pid) for name, process in processes.items()}
        times, work = _time_in_turn(calls, {"bare": [psutil.Process()], **trees}, rounds)
    bare = np.array(times.pop(_BARE))
    found: dict[str, Any] = {
        "rounds": rounds,
        "bare_p50_ms": _ms(np.median(bare)),
        "bare_processor_ms": _ms(work.pop(_BARE) / rounds),
    }
    for (name, client), values in times.items():
        taken = np.array(values)
        ratio = paired_ratio(taken, bare, seed=0)
        low, middle, high = _median_interval(taken - bare)
        found.setdefault(name, {})[client] = {
            "p50_ms": _ms(np.median(taken)),
            "added_ms": _ms(middle),
            "added_ci95_ms": [_ms(low), _ms(high)],
            "ratio": round(ratio.median, 3),
            "ratio_ci95": [round(ratio.low, 3), round(ratio.high, 3)],
        }
        if name in processes:
            found[name][client]["processor_ms"] = _ms(work[name, client] / rounds)
    return found


def _time_in_turn(
    calls: dict[tuple[str, str], Any], trees: dict[str, list[psutil.Process]], rounds: int
) -> tuple[dict[tuple[str, str], list[int]], dict[tuple[str, str], int]]:
    """Return the nanoseconds of every call, and the processor time of its server over all rounds.

    What a server does after its answer counts for the call that it answered: its clock is read
    again at the end of a pause.
    """
    times: dict[tuple[str, str], list[int]] = {key: [] for key in calls}
    work = dict.fromkeys(calls, 0)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for place in rng.permutation(len(calls)):
            key = list(calls)[place]
            tree = trees.get(key[0], [])
            before = processor_ns(tree)
            begin = time.perf_counter_ns()
            calls[key]()
            times[key].append(time.perf_counter_ns() - begin)
            time.sleep(0.001)
            work[key] += processor_ns(tree) - before
    return times, work


def _median_interval(values: np.ndarray) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)
    picks = rng.integers(len(values), size=(1000, len(values)))
    medians = np.median(values[picks], axis=1)
    return float(np.quantile(medians, 0.025)), float(np.median(values)), float(
        np.quantile(medians, 0.975)
    )  # fmt: skip


def _ms(nanoseconds: float) -> float:
    return round(float(nanoseconds) / 1e6, 3)


def ramp(
    urls: dict[str, str], requests: Requests, rates: Iterable[float], seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Raise the rate until each server failed to carry two in a row; return levels by server."""
    levels: dict[str, list[dict[str, Any]]] = {name: [] for name in urls}
    active = list(urls)
    for turn, rate in enumerate(rates):
        for name in active[::-1] if turn % 2 else list(active):
            rows = _batch_rows(urls[name])
            load = apply_load(urls[name], requests[name], rate=rate, seconds=seconds, seed=turn)
            level = summarise(asyncio.run(load), rate=round(rate, 2), seconds=seconds)
            count, total = _batch_rows(urls[name]) - rows
            level["rows_per_run"] = round(total / count, 2) if count else None
            level["load_average"] = os.getloadavg()[0]
            levels[name].append(level)
            print(f"{name}: {_words(level)}", flush=True)
            failed = [not carried(each, levels[name][0]) for each in levels[name][-2:]]
            if failed == [True, True]:
                active.remove(name)
        if not active:
            break
    return levels


def _batch_rows(url: str) -> np.ndarray:
    """Return how many runs a server of ours has made, and of how many rows; zeros for another."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    except OSError:
        return np.zeros(2)
    found = [re.findall(rf"^mdpd_batch_rows_{word}\S* (\S+)", text, re.MULTILINE)
             for word in ("count", "sum")]  # fmt: skip
    return np.array([sum(map(float, values)) for values in found])


def summarise_ramp(
    levels: list[dict[str, Any]], runs_per_s: Callable[[int], float]
) -> dict[str, Any]:
    """Return the knee, the most that was answered, and what the bare runtime does of such batches."""
    found: dict[str, Any] = {"knee_per_s": find_knee(levels), "levels": levels}
    most = max(levels, key=lambda level: level["answered_per_s"])
    found["most_answered_per_s"] = most["answered_per_s"]
    if most["rows_per_run"]:
        rows = max(round(most["rows_per_run"]), 1)
        bare = rows * runs_per_s(rows)
        found["bare_rows_per_s"] = round(bare, 2)
        found["of_bare"] = round(most["answered_per_s"] / bare, 3)
    return found


def bare_runs_per_s(bundle: Bundle, threads: int, rows: int, seconds: float = 2.0) -> float:
    """Return how many runs of so many rows ONNX Runtime makes in this process."""
    task = bundle.tasks[0]
    assert task.golden is not None
    raws = load_golden(task.golden).raws
    arrays = graph_arrays(bundle, task, [raws[row % len(raws)] for row in range(rows)])
    runner = OnnxRunner(bundle.path / "model.onnx", threads=threads)
    runner(arrays)
    times = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        runner(arrays)
        times.append(time.perf_counter() - begin)
    return 1 / float(np.median(times))


def rising(first: float, step: float, most: float) -> Iterator[float]:
    """Yield first, first * step, … up to `most`."""
    while first <= most:
        yield first
        first *= step


def _words(level: dict[str, Any]) -> str:
    errors = f", errors {level['errors']}" if level["errors"] else ""
    return (
        f"{level['rate']:.0f}/s offered, {level['answered_per_s']:.0f}/s answered, p50 "
        f"{level['p50_ms']} p95 {level['p95_ms']} p99 {level['p99_ms']} ms{errors}"
    )


def soak(url: str, process: Any, requests: Sequence[Request], rate: float, minutes: float) -> dict:
    """Load for a long time; one line per half minute with memory and latency."""
    lines = []
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        seconds = min(30.0, end - time.monotonic())
        load = apply_load(url, requests, rate=rate, seconds=max(seconds, 1), seed=len(lines))
        level = summarise(asyncio.run(load), rate=rate, seconds=max(seconds, 1))
        lines.append({**level, "memory_bytes": memory_bytes(process)})
        print(f"{_words(level)}, memory {lines[-1]['memory_bytes'] / 1e6:.1f} MB", flush=True)
    sizes = np.array([line["memory_bytes"] for line in lines]) / 1e6
    half = sizes[len(sizes) // 2 :]
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) > 2 else None
    return {
        "minutes": minutes,
        "rate": rate,
        "requests": sum(line["requests"] for line in lines),
        "errors": sum(sum(line["errors"].values()) for line in lines),
        "memory_mb_first_middle_last": [
            round(float(sizes[i]), 1) for i in (0, len(sizes) // 2, -1)
        ],
        "second_half_mb_per_hour": None if slope is None else round(120 * slope, 2),
        "lines": lines,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", default="model", help="the model's name in requests")
    parser.add_argument("--url", help="a server that runs already, instead of --engines")
    parser.add_argument("--engines", default="local", help="local, ray, or both")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="inside one operator")
    parser.add_argument("--rows", type=int, default=1, help="inputs of one request")
    parser.add_argument("--clients", default=",".join(CLIENTS), help="of the overhead")
    ramp_or_not = argparse.BooleanOptionalAction
    parser.add_argument("--ramp", action=ramp_or_not, default=True, help="rising rates")
    parser.add_argument("--rounds", type=int, default=500, help="of the overhead")
    parser.add_argument("--seconds", type=float, default=15, help="of each rate")
    parser.add_argument("--first-rate", type=float, help="default: a tenth of a bare call's")
    parser.add_argument("--step", type=float, default=1.3, help="from one rate to the next")
    parser.add_argument("--max-rate", type=float, default=100_000)
    parser.add_argument("--soak-minutes", type=float, default=0)
    parser.add_argument("--share", type=float, default=0.8, help="of the knee: near it, and soak")
    parser.add_argument("--rivals", type=Path, help="interpreter that has LitServe and Mosec")
    parser.add_argument("--soak-rate", type=float, help="instead of a share; leaves the ramp out")
    parser.add_argument("--out", type=Path, default=Path("serve-load"), help="without ending")
    args = parser.parse_args()
    if args.soak_minutes and not args.ramp and args.soak_rate is None:
        parser.error("--no-ramp finds no knee to take a share of: name a rate with --soak-rate.")
    bundle = load_bundle(args.bundle)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "bundle": args.bundle.name,
        "task": bundle.manifest["task"],
        "backbone": bundle.manifest["source"]["backbone"],
        "settings": {
            "engines": [args.url] if args.url else args.engines.split(","),
            "threads": args.threads,
            "rows": args.rows,
            "seconds": args.seconds,
            "knee_factor": KNEE_FACTOR,
        },
        "machine": describe(),
        "load_average_before": os.getloadavg(),
    }
    with servers(args) as (urls, processes):
        raw = raw_requests(urls, args.name, bundle)
        protocol = protocol_requests(args.name, bundle, args.rows)
        requests = raw if args.rivals else dict.fromkeys(urls, protocol)
        if args.soak_rate is None:
            clients = args.clients.split(",")
            if unknown := set(clients) - set(CLIENTS):
                raise SystemExit(f"--clients {','.join(unknown)}: choose of {', '.join(CLIENTS)}.")
            report["overhead"] = measure_overhead(
                urls, processes, clients, bundle, raw, args.threads, args.rounds
            )
            print(json.dumps(report["overhead"], indent=2), flush=True)
        if args.soak_rate is None and args.ramp:
            bare = 1e3 / report["overhead"]["bare_p50_ms"]
            rates = rising(args.first_rate or 0.1 * bare, args.step, args.max_rate)
            levels = ramp(urls, requests, rates, args.seconds)
            runs_per_s = partial(bare_runs_per_s, bundle, args.threads)
            report["ramp"] = {
                name: summarise_ramp(rows, runs_per_s) for name, rows in levels.items()
            }
            for name, found in report["ramp"].items():
                if found["knee_per_s"]:
                    rate = args.share * found["knee_per_s"]
                    load = apply_load(
                        urls[name], requests[name], rate=rate, seconds=args.seconds, seed=99
                    )
                    level = summarise(asyncio.run(load), rate=rate, seconds=args.seconds)
                    found["near_knee"] = level
                    print(f"{name} near its knee: {_words(level)}", flush=True)
        if args.soak_minutes:
            name = next(iter(urls))
            rate = args.soak_rate or args.share * (report["ramp"][name]["knee_per_s"] or 0)
            if not rate:
                raise SystemExit("no rate was carried: name one with --soak-rate.")
            mixed = [*protocol, *raw[name]]
            report["soak"] = soak(urls[name], processes[name], mixed, rate, args.soak_minutes)
    report["load_average_after"] = os.getloadavg()
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    for path in write_charts(report, args.out):
        print(path)


@contextlib.contextmanager
def servers(args: argparse.Namespace) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Start what is to be measured; yield URLs and processes by engine."""
    if args.url:
        if args.soak_minutes:
            raise SystemExit("--soak-minutes watches a process that this script starts: no --url.")
        yield {"server": args.url}, {}
        return
    with contextlib.ExitStack() as stack:
        urls, processes = {}, {}
        for place, engine in enumerate(args.engines.split(",")):
            words = ["--threads", str(args.threads), "--port", str(18080 + place)]
            log = args.out.with_suffix(f".{engine}.log")
            found = started({args.name: args.bundle}, engine, *words, log=log)
            urls[engine], processes[engine] = stack.enter_context(found)
        for place, name in enumerate(RIVALS if args.rivals else ()):
            found = rival(
                name, args.rivals, args.bundle, plain_requests("", load_bundle(args.bundle))[0],
                port=18090 + place, words=["--threads", str(args.threads)],
                log=args.out.with_suffix(f".{name}.log"),
            )  # fmt: skip
            urls[name], processes[name] = stack.enter_context(found)
        yield urls, processes


def raw_requests(urls: Iterable[str], name: str, bundle: Bundle) -> Requests:
    """Return plain requests by server: of ours as of rivals, which are asked elsewhere."""
    plain = plain_requests(name, bundle)
    return {
        server: [replace(each, path=RIVALS.get(server, each.path)) for each in plain]
        for server in urls
    }


if __name__ == "__main__":
    main()
