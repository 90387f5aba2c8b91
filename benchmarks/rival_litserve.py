"""A bundle of texts behind LitServe; see `rival_model.py`."""

from typing import Any

import litserve
from rival_model import open_model, read_arguments


class Texts(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = open_model()

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, inputs: list[Any]) -> list[Any]:
        return self.model(inputs)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output


if __name__ == "__main__":
    args = read_arguments()
    server = litserve.LitServer(Texts(max_batch_size=args.max_batch), accelerator="cpu")
    server.run(host="127.0.0.1", port=args.port, generate_client_file=False, log_level="error")
