"""What can a stranger's slowest requests do to a server's time and memory?

    python benchmarks/hostile_requests.py TEXTS PICTURES        # two bundles

Sends pictures and texts that are as costly as the limits allow, or more, alone and beside others, and
prints how long each answer took and the most memory of the server and of its child processes.
"""

import argparse
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
from fuzz_server import many_scans, of_children, sixteen_bits
from served import Client, start

TIMEOUT_S = 120.0
Ask = Callable[[], int]  # sends one request, returns the status


class Peak:
    """The most memory of a server and of its children, in MB, since it was last read."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.most = (0.0, 0.0)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look a hundred times a second."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                now = (self.process.memory_info().rss / 1e6, of_children(self.process))
                self.most = (max(self.most[0], now[0]), max(self.most[1], now[1]))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def read(self) -> str:
        """Return both and begin anew."""
        words = "{:.0f}, {:.0f} MB".format(*self.most)
        self.most = (0.0, 0.0)
        return words


def alone(client: Client, texts: str, task: str, pictures: str) -> Iterator[tuple[str, list[Ask]]]:
    """Yield what is sent: in words, and the requests that go at the same time."""

    def picture(raw: bytes) -> Ask:
        path, headers = f"/v1/models/{pictures}/classify", {"Content-Type": "image/jpeg"}
        return lambda: client.ask("POST", path, raw, headers)[0]

    def words(inputs: list[str]) -> Ask:
        path, headers = f"/v1/models/{texts}/predict", {"Content-Type": "application/json"}
        body = json.dumps({"inputs": inputs, "task": task}).encode()
        return lambda: client.ask("POST", path, body, headers)[0]

    deep, wide = sixteen_bits(5000), sixteen_bits(6320)
    slow, scans = many_scans(100, 5000), many_scans(20_000, 1000)
    yield f"a {len(deep) // 1000} kB PNG, 16-bit grey, 25 million pixels", [picture(deep)]
    yield "two of them at once", [picture(deep)] * 2
    yield "the same with 40 million pixels", [picture(wide)]
    yield f"a JPEG of a megapixel and 20,000 scans, {len(scans) // 1000} kB", [picture(scans)]
    yield "a JPEG at both limits, 25 million pixels and 100 scans", [picture(slow)]
    for name, text in (("words", "the film was good " * 5555), ("stops", "." * 99_999)):
        yield f"ten texts of 100 kB: {name}", [words([text] * 10)]
    yield "ten texts of 100 kB: blanks and a word", [words([" " * 99_990 + "good"] * 10)]
    beside = [picture(slow)] * 4
    yield "four JPEGs at both limits and, last, a text", [*beside, words(["a film"])]
    yield (
        "four JPEGs at both limits and, last, a small picture",
        [*beside, picture(sixteen_bits(50))],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", help="a bundle that takes texts")
    parser.add_argument("pictures", help="a bundle that takes pictures")
    options = parser.parse_args()
    bundles = [f"texts={options.texts}", f"pictures={options.pictures}"]
    process, port = start(bundles)
    try:
        client = Client(port, TIMEOUT_S)
        peak = Peak(psutil.Process(process.pid))
        models = {model["name"]: model for model in client.get("/v1/models")["models"]}
        task = models["texts"]["tasks"][0]["name"]
        with peak.watched():
            time.sleep(1)
            print(f"idle: server, children at most {peak.read()}")
            for what, asks in alone(client, "texts", task, "pictures"):
                statuses, seconds = at_once(asks)
                print(f"{what}: {statuses}, the last {seconds:.2f} s, {peak.read()}", flush=True)
    finally:
        process.terminate()
        process.wait(60)


def at_once(asks: list[Ask]) -> tuple[list[int], float]:
    """Send requests, the last one a second after the others; return their statuses, its seconds."""
    with ThreadPoolExecutor(len(asks)) as threads:
        others = [threads.submit(ask) for ask in asks[:-1]]
        time.sleep(1 if len(asks) > 2 else 0)
        begun = time.monotonic()
        status = asks[-1]()
        seconds = time.monotonic() - begun
        return [*(other.result() for other in others), status], seconds


if __name__ == "__main__":
    main()
