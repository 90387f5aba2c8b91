"""What LitServe and Mosec serve beside `mdpd serve`: the model of a bundle of texts.

    python -m venv rivals && rivals/bin/pip install litserve mosec onnxruntime tokenizers numpy
    rivals/bin/python benchmarks/rival_litserve.py BUNDLE --port 8000      # asked at /predict
    rivals/bin/python benchmarks/rival_mosec.py BUNDLE --port 8000         # asked at /inference

`serve_load.py --rivals rivals/bin/python` starts both. They read, tokenise, batch and answer the same
plain requests as `mdpd serve`, with the same session of ONNX Runtime: one worker, batches of as many
rows, and the least wait for company that they take (LitServe's default is 0, Mosec's least is 1 ms).
Nothing of the project is imported, which is not installed beside them.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

PLACE = "MDPD_RIVAL"  # workers are processes that begin anew and have the environment only


class Model:
    """Texts in, what `mdpd serve` answers of them out."""

    def __init__(self, bundle: Path, threads: int) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            bundle / "model.onnx", options, disabled_optimizers=["SkipLayerNormFusion"]
        )
        self.labels = json.loads((bundle / "manifest.json").read_text())["labels"]
        plain = json.loads((bundle / "preprocessor/preprocess.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(bundle / "preprocessor/tokenizer.json"))
        self.tokenizer.enable_truncation(plain["max_length"])
        self.tokenizer.enable_padding(pad_id=plain["pad_id"])
        self.names = plain["input_names"]

    def __call__(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer requests of one text each."""
        found = self.tokenizer.encode_batch([request["inputs"][0] for request in requests])
        arrays = {
            "input_ids": [each.ids for each in found],
            "attention_mask": [each.attention_mask for each in found],
            "token_type_ids": [each.type_ids for each in found],
        }
        feed = {name: np.array(arrays[name], np.int64) for name in self.names}
        return [{"predictions": [self.answer(row)]} for row in self.session.run(None, feed)[0]]

    def answer(self, row: np.ndarray) -> dict[str, Any]:
        """Return the form of one prediction."""
        if not self.labels:
            return {"score": float(row[0])}
        shares = np.exp(row - row.max())
        best = int(row.argmax())
        return {"label": self.labels[best], "probability": float(shares[best] / shares.sum())}


def read_arguments() -> argparse.Namespace:
    """Return what the command line says; `open_model` finds it in every worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="inside one operator")
    parser.add_argument("--max-batch", type=int, default=32)
    args = parser.parse_args()
    os.environ[PLACE] = json.dumps([str(args.bundle.resolve()), args.threads])
    return args


def open_model() -> Model:
    """Return the model in a worker."""
    bundle, threads = json.loads(os.environ[PLACE])
    return Model(Path(bundle), threads)
