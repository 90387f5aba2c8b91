"""A server in a process of its own, for the scripts beside this file."""

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def start(bundles: Sequence[str], *options: object, port: int = 0) -> tuple[subprocess.Popen, int]:
    """Start `mdpd serve` and return it with its port when it answers."""
    words = [*bundles, "--port", port, *options]
    command = [sys.executable, "-m", "mdpd_deploy", "serve", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r":(\d+)$", process.stdout.readline().strip())
    if found is None:
        raise SystemExit(f"the server did not start: {' '.join(command)}")
    return process, int(found[1])


class Client:
    """Asks a server, each time over a connection of its own.

    Raises:
        OSError, http.client.HTTPException: When there is no whole answer.
    """

    def __init__(self, port: int, timeout_s: float = 60.0) -> None:
        self._port = port
        self._timeout_s = timeout_s

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Return the status and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout_s)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """Return the JSON at a path."""
        return json.loads(self.ask("GET", path)[1])
