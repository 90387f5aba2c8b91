"""Preprocessing inside Triton: the logic of the Python-backend model of a generated repository.

The repository's `model.py` is `MODEL`; it hands Triton's own module over, so that this one can be
imported anywhere. Needs no torch; `REQUIRED` is what the container must have beside mdpd-deploy.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.manifest import PREPROCESSOR
from mdpd_deploy.data.examples import Raw, refuse_empty
from mdpd_deploy.data.images import decode_image
from mdpd_deploy.data.preprocess import Preprocess, TextPreprocess, load_preprocess
from mdpd_deploy.errors import MdpdError, UserError

MODEL = '''"""Raw inputs → the graph's inputs, by the bundle's own preprocessing."""

import triton_python_backend_utils

from mdpd_deploy.export.triton.preprocess import TritonPreprocess


class TritonPythonModel(TritonPreprocess):
    triton = triton_python_backend_utils
'''
# numpy: releases of the Python backend that were built for numpy 1 (24.10 is one) hand over garbage
# under numpy 2, without a word; newer ones work with both.
REQUIRED = ("numpy<2", "omegaconf", "pillow", "pydantic", "safetensors", "tokenizers")
MAX_BYTES = {"image": 16_000_000, "text": 100_000}  # of one picture or text


class TritonPreprocess:
    """A Python-backend model: one raw input per row in, the graph's inputs out.

    All requests that Triton hands over at once are preprocessed together, so that texts come out
    padded to one length and the graph's batcher can merge them. A request with a bad input gets its
    own error; the others go on.
    """

    triton: ClassVar[Any]

    def initialize(self, args: dict[str, str]) -> None:
        """Read the preprocessing that lies beside `model.py`."""
        folder = Path(args["model_repository"], args["model_version"], PREPROCESSOR)
        self._preprocess: Preprocess = load_preprocess(folder)
        self._input = "text" if isinstance(self._preprocess, TextPreprocess) else "image"

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request, in order."""
        raws: list[Raw] = []
        answers: list[slice | MdpdError] = []
        for request in requests:
            try:
                mine = self._read(request)
            except MdpdError as err:
                answers.append(err)
                continue
            answers.append(slice(len(raws), len(raws) + len(mine)))
            raws += mine
        arrays = self._preprocess(raws) if raws else {}
        return [self._respond(answer, arrays) for answer in answers]

    def _read(self, request: Any) -> list[Raw]:
        tensor = self.triton.get_input_tensor_by_name(request, self._input)
        rows: NDArray[np.object_] = tensor.as_numpy()  # [B, 1] bytes, or [B, 2] for pairs
        return [self._decode(row) for row in rows]

    def _decode(self, row: NDArray[np.object_]) -> Raw:
        limit = MAX_BYTES[self._input]
        for value in row:
            if len(value) > limit:
                raise UserError(
                    f"{self._input} of {len(value)} bytes: at most {limit} are accepted."
                )
        if self._input == "image":
            return decode_image(io.BytesIO(row[0]), "the input")
        try:
            texts = [value.decode("utf-8") for value in row]
        except UnicodeDecodeError:
            raise UserError("the text is not UTF-8: encode it so.") from None
        raw: Raw = texts[0] if len(texts) == 1 else (texts[0], texts[1])
        refuse_empty([raw])
        return raw

    def _respond(self, answer: slice | MdpdError, arrays: dict[str, NDArray[Any]]) -> Any:
        if isinstance(answer, MdpdError):
            error = self.triton.TritonError(str(answer))
            return self.triton.InferenceResponse(output_tensors=[], error=error)
        tensors = [
            self.triton.Tensor(name, np.ascontiguousarray(array[answer]))
            for name, array in arrays.items()
        ]
        return self.triton.InferenceResponse(output_tensors=tensors)
