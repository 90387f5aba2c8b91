"""What do clients see when the server is killed under load and started again?

    python benchmarks/kill_server.py runs/A/bundles/onnx-fp32 --kills 10 --out kill.json

Clients ask all the time for what the bundle itself has answered before. The server gets SIGKILL at
random moments and is started again on the same port, as a supervisor would do. An answer is right,
an error that the client can tell from an answer (a refused or broken connection, a 5xx), or wrong.
"""

import argparse
import http.client
import io
import itertools
import json
import random
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from served import Client, start

from mdpd_deploy import load_bundle


def make_asks(path: str, count: int) -> list[tuple[str, bytes, list[float]]]:
    """Return requests as (path, body) with the probabilities or the score that must come back."""
    bundle, rng = load_bundle(path), np.random.default_rng(0)
    asks = []
    for number in range(count):
        task = bundle.tasks[number % len(bundle.tasks)]
        if "image" in bundle.tasks[0].fields:
            pixels = rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), dtype=np.uint8)
            raw: object = Image.fromarray(pixels)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            where, body = f"classify?task={task.name}&top=1000", stream.getvalue()
        else:
            words = [
                "a good film",
                "dull and slow",
                "not very bright",
                "warm",
                "the cold was great",
            ]
            text = " ".join(rng.choice(words, rng.integers(1, 4)))
            raw = (text, text[::-1]) if len(task.fields) > 1 else text
            plain = {"inputs": [raw], "task": task.name, "top": 1000}
            where, body = "predict", json.dumps(plain).encode()
        (expected,) = bundle.predict([raw], task=task.name)
        asks.append((where, body, values(expected.to_json(1000))))
    return asks


def values(prediction: dict) -> list[float]:
    """The numbers of an answer, in the order of the class names."""
    if "score" in prediction:
        return [prediction["score"]]
    ranked = sorted(prediction["top"], key=lambda one: one["label"])
    return [one["probability"] for one in ranked]


class Load:
    """Clients that ask until they are told to stop, and what they saw."""

    def __init__(self, port: int, name: str, asks: list, clients: int) -> None:
        self.seen: Counter[str] = Counter()
        self.wrong: list[dict] = []
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._client, self._name, self._asks = Client(port, 30), name, asks
        self.threads = [threading.Thread(target=self._work, args=[n]) for n in range(clients)]
        for thread in self.threads:
            thread.start()

    def _work(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stop.is_set():
            where, body, expected = chance.choice(self._asks)
            seen, pause = self._ask(f"/v1/models/{self._name}/{where}", body, expected)
            with self._lock:
                self.seen[seen] += 1
            time.sleep(pause)

    def _ask(self, path: str, body: bytes, expected: list[float]) -> tuple[str, float]:
        try:
            status, raw = self._client.ask("POST", path, body)
        except (OSError, http.client.HTTPException) as err:
            return f"error: {type(err).__name__}", 0.05
        if status != 200:
            return f"status {status}", 0.05
        found = values(json.loads(raw)["predictions"][0])
        if len(found) == len(expected) and np.allclose(found, expected, atol=1e-5):
            return "right", 0.0
        self.wrong.append({"path": path, "found": found, "expected": expected})
        return "WRONG", 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("kill.json"))
    args = parser.parse_args()
    asks = make_asks(args.bundle, 40)
    chance = random.Random(0)
    process, port = start([f"model={args.bundle}"])
    load = Load(port, "model", asks, args.clients)
    back_s, right = [], []
    for _ in range(args.kills):
        time.sleep(chance.uniform(1.0, 4.0))
        right.append(load.seen["right"])
        process.kill()
        process.wait()
        killed = time.perf_counter()
        process, _ = start([f"model={args.bundle}"], port=port)
        back_s.append(time.perf_counter() - killed)
    time.sleep(2)
    load.stop.set()
    for thread in load.threads:
        thread.join()
    process.terminate()
    code = process.wait(60)
    result = {
        "kills": args.kills,
        "clients": args.clients,
        "seen": dict(load.seen),
        "wrong": load.wrong[:5],
        "answered_between_all_kills": all(b > a for a, b in itertools.pairwise(right)),
        "median_s_until_ready_again": round(float(np.median(back_s)), 2),
        "exit_code_of_sigterm": code,
    }
    ok = not load.wrong and result["answered_between_all_kills"] and code == 0
    args.out.write_text(json.dumps({**result, "passed": ok}, indent=2) + "\n")
    for key, value in {**result, "passed": ok}.items():
        print(f"| {key} | {value} |")
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
