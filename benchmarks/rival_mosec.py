"""A bundle of texts behind Mosec; see `rival_model.py`."""

import sys
from typing import Any

from mosec import Server, Worker
from rival_model import open_model, read_arguments


class Texts(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.model = open_model()

    def forward(self, data: list[Any]) -> list[Any]:
        return self.model(data)


if __name__ == "__main__":
    args = read_arguments()
    words = {"port": args.port, "address": "127.0.0.1", "timeout": 30_000, "log-level": "warning"}
    sys.argv[1:] = [f"--{name}={value}" for name, value in words.items()]
    server = Server()
    server.append_worker(Texts, max_batch_size=args.max_batch, max_wait_time=1)
    server.run()
