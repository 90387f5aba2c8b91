"""Open-loop load: requests arrive when a Poisson process says, whether or not others were answered.

A closed loop, in which a client waits for its answer before it asks again, slows down together with
the server and so hides the queue. Here a latency counts from the moment a request was due, which
also counts the time for which a busy client held it back.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np

KNEE_FACTOR = 5.0  # a rate is carried while its p95 is at most this many times that of the lowest
KEPT_UP = 0.85  # … and this share of what was offered per second was answered per second


@dataclass(frozen=True)
class Request:
    """One request, ready to be sent.

    Attributes:
        path: Below the server's URL.
        body: As sent.
        headers: As sent.
        problem: Says what is wrong with the body of a 200, given its headers; None: nothing.
    """

    path: str
    body: bytes
    headers: dict[str, str]
    problem: Callable[[bytes, "aiohttp.typedefs.CIMultiDictProxy"], str | None] = (
        lambda body, headers: None
    )


@dataclass(frozen=True)
class Sample:
    """What became of one request.

    Attributes:
        due_s: When it was due, from the start of the load.
        late_ms: How much later the client sent it.
        latency_ms: From when it was due to the end of its answer.
        outcome: "ok", "status 503", "wrong answer", or the name of an exception.
    """

    due_s: float
    late_ms: float
    latency_ms: float
    outcome: str


def poisson_times(rate: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Return arrival times [s] of a Poisson process of `rate` per second, sorted."""
    count = rng.poisson(rate * seconds)
    return np.sort(rng.uniform(0, seconds, count))


async def apply_load(
    url: str,
    requests: Sequence[Request],
    *,
    rate: float,
    seconds: float,
    seed: int,
    timeout_s: float = 30.0,
) -> list[Sample]:
    """Send requests, chosen at random, at Poisson times; return one sample each.

    Args:
        url: The server.
        requests: What to choose from.
        rate: Mean arrivals per second.
        seconds: Length of the load; answers are awaited beyond it.
        seed: Of times and choices.
        timeout_s: After which an answer counts as an error.
    """
    rng = np.random.default_rng(seed)
    times = poisson_times(rate, seconds, rng)
    chosen = rng.integers(len(requests), size=len(times))
    samples: list[Sample] = []
    limit = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0)  # a limit would be a queue of the client's own
    async with aiohttp.ClientSession(url, connector=connector, timeout=limit) as session:
        loop = asyncio.get_running_loop()
        start = loop.time()

        async def send(due: float, request: Request) -> None:
            sent = loop.time() - start
            outcome = await _outcome(session, request)
            done = loop.time() - start
            samples.append(Sample(due, 1e3 * (sent - due), 1e3 * (done - due), outcome))

        async with asyncio.TaskGroup() as group:
            for due, index in zip(times.tolist(), chosen.tolist(), strict=True):
                wait = due - (loop.time() - start)
                if wait > 0:
                    await asyncio.sleep(wait)
                group.create_task(send(due, requests[index]))
    return sorted(samples, key=lambda sample: sample.due_s)


async def _outcome(session: aiohttp.ClientSession, request: Request) -> str:
    try:
        async with session.post(
            request.path, data=request.body, headers=request.headers
        ) as response:
            body = await response.read()
            if response.status != 200:
                return f"status {response.status}" if _is_clean(body) else "unclean error"
            return request.problem(body, response.headers) or "ok"
    except (aiohttp.ClientError, OSError, TimeoutError) as err:
        return type(err).__name__


def _is_clean(body: bytes) -> bool:
    """Whether an error has the protocol's form."""
    try:
        return isinstance(json.loads(body)["error"], str)
    except (ValueError, KeyError, TypeError):
        return False


def summarise(samples: Sequence[Sample], *, rate: float, seconds: float) -> dict:
    """Return offered and answered load, percentiles over the good answers, and errors by class."""
    good = np.array([sample.latency_ms for sample in samples if sample.outcome == "ok"])
    errors = Counter(sample.outcome for sample in samples if sample.outcome != "ok")
    late = np.array([sample.late_ms for sample in samples])
    last = max((s.due_s + s.latency_ms / 1e3 for s in samples), default=seconds)
    points = {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99}
    return {
        "rate": rate,
        "offered_per_s": round(len(samples) / seconds, 2),
        "answered_per_s": round(len(good) / max(last, seconds), 2),
        "requests": len(samples),
        **{
            name: round(float(np.percentile(good, q)), 3) if len(good) else None
            for name, q in points.items()
        },
        "client_late_p99_ms": round(float(np.percentile(late, 99)), 3) if len(late) else None,
        "errors": dict(errors),
    }


def carried(level: dict, lowest: dict, factor: float = KNEE_FACTOR) -> bool:
    """Whether a rate is carried: no error, answered as fast as offered, p95 near the lowest's."""
    if level["errors"] or level["p95_ms"] is None or lowest["p95_ms"] is None:
        return False
    if level["answered_per_s"] < KEPT_UP * level["offered_per_s"]:
        return False
    return level["p95_ms"] <= factor * lowest["p95_ms"]


def find_knee(levels: Sequence[dict], factor: float = KNEE_FACTOR) -> float | None:
    """Return the highest rate carried before two rates in a row are not; None without one.

    One rate alone may fail by a disturbance from outside; two in a row are the server.

    Args:
        levels: From `summarise`, by rising rate.
        factor: See `KNEE_FACTOR`.
    """
    knee, failed = None, 0
    for level in levels:
        failed = 0 if carried(level, levels[0], factor) else failed + 1
        if failed == 2:
            break
        if not failed:
            knee = level["rate"]
    return knee
