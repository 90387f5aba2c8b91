"""`README.md` of a generated Triton repository: what is in it and how to start it."""

from collections.abc import Sequence
from typing import Any

from mdpd_deploy.export.triton.preprocess import REQUIRED

_IMAGE = "nvcr.io/nvidia/tritonserver:YY.MM-py3"

_HEAD = """# Triton model repository

Written by `mdpd triton` from verified bundles. Complete: no part of a configuration is left to
Triton's auto-completion.

| model | backend | where | batch | inputs | outputs |
|---|---|---|---|---|---|
{rows}

Shapes are those of one row; requests put the batch axis in front. -1 is any length.
"""

_START = """
## Start

Replace `YY.MM` by a release of the container{image_note}.

```
docker run --rm {gpu}--shm-size=1g -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 \\
    -v "$PWD":/models:ro {image} \\
    tritonserver --model-repository=/models --disable-auto-complete-config
curl -f localhost:8000/v2/health/ready
```
"""

_PREPROCESS = """
## Preprocessing

The `_preprocess` models run the bundle's own preprocessing in Triton's Python backend. The container
needs Python 3.11 or later, mdpd-deploy without its dependencies, and these packages (no torch; numpy
below 2, since older releases of the Python backend silently pass wrong values under numpy 2):

```
FROM {image}
COPY mdpd_deploy-*.whl /tmp/
RUN pip install {packages} \\
    && pip install --no-deps /tmp/mdpd_deploy-*.whl
```

Build it with the wheel of mdpd-deploy beside it (`pip wheel --no-deps CHECKOUT`) and start that image
instead. A request to an `_ensemble` model carries encoded pictures (JPEG, PNG, WebP) or UTF-8 texts:

```
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient("localhost:8000")
given = triton.InferInput("{raw}", {raw_shape}, "BYTES")
given.set_data_from_numpy(np.array({example}, dtype=object))
answer = client.infer("{ensemble}", [given])
print(answer.as_numpy("{output}"))
```
"""

_NOTES = """
## Notes

- Requests are merged into batches only when their shapes are equal. {text_note}
- `{output}` holds raw outputs of the graph: logits, or values in the label's unit. Where a model has a
  `labels.txt`, Triton's classification extension (`class_count`) gives class names.
- Triton accepts at most 64 MB of one HTTP request (`--http-max-input-size`).
- The files are copies of verified ones; `repository.json` holds the SHA-256 of each bundle's graph.
  `mdpd-deploy` itself checks bundles, Triton does not check this folder.
"""


def readme(models: Sequence[dict[str, Any]]) -> str:
    """Return the text."""
    image_note = _image_note(models)
    on_gpu = any(model["kind"] == "KIND_GPU" for model in models)
    parts = [
        _HEAD.format(rows="\n".join(map(_row, models))),
        _START.format(gpu="--gpus=all " if on_gpu else "", image=_IMAGE, image_note=image_note),
    ]
    ensembles = [model for model in models if model["backend"] == "ensemble"]
    if ensembles:
        parts.append(_preprocessing(ensembles[0]))
    ragged = any(-1 in port["dims"] for model in models for port in model["inputs"])
    text_note = (
        "Texts of different lengths are not, unless the client pads them; the `_preprocess` models "
        "pad what waits together to one length."
        if ragged
        else "All shapes here are fixed, so any requests are."
    )
    parts += [_tasks(model) for model in models if "tasks" in model]
    parts.append(_NOTES.format(output=models[0]["outputs"][0]["name"], text_note=text_note))
    return "".join(parts)


def _tasks(model: dict[str, Any]) -> str:
    """List what a graph of several tasks answers."""
    head = f"""
## Tasks of `{model["name"]}`

`task_id` says for each row which task it asks; of the outputs the first columns are that task's.
Inputs are preprocessed by the client, as the bundle's `tasks/NAME/preprocess.json` says.

| task_id | task | columns |
|---|---|---|
"""
    rows = (
        f"| {index} | {task['name']} | {', '.join(task['labels']) or 'the value'} |\n"
        for index, task in enumerate(model["tasks"])
    )
    return head + "".join(rows)


def _row(model: dict[str, Any]) -> str:
    cells = (
        f"`{model['name']}`",
        model["backend"],
        (model["kind"] or "–").removeprefix("KIND_"),
        f"≤ {model['max_batch_size']}",
        _ports(model["inputs"]),
        _ports(model["outputs"]),
    )
    return f"| {' | '.join(cells)} |"


def _ports(ports: Sequence[dict[str, Any]]) -> str:
    return "<br>".join(
        f"`{port['name']}` {port['data_type'].removeprefix('TYPE_')} {port['dims']}"
        for port in ports
    )


def _image_note(models: Sequence[dict[str, Any]]) -> str:
    """Say which releases of the container fit."""
    notes = []
    opsets = {model["opset"] for model in models if model["backend"] == "onnxruntime"}
    if opsets:
        notes.append(f"whose ONNX Runtime reads opset {max(opsets)} (1.18 and later do)")
    for engine in (model["engine"] for model in models if "engine" in model):
        note = (
            f"with TensorRT {engine['tensorrt']}, on a machine with {engine['gpu']} (compute "
            f"capability {engine['compute_capability']}): an engine runs nowhere else"
        )
        if note not in notes:
            notes.append(note)
    return f" {' and '.join(notes)}" if notes else ""


def _preprocessing(ensemble: dict[str, Any]) -> str:
    (raw,) = ensemble["inputs"]
    count = raw["dims"][0]
    example = 'open("a.jpg", "rb").read()' if raw["name"] == "image" else 'b"a text"'
    if count == 2:
        example = 'b"first text", b"second text"'
    return _PREPROCESS.format(
        image=_IMAGE,
        packages=" ".join(f"'{name}'" if "<" in name else name for name in REQUIRED),
        raw=raw["name"],
        raw_shape=[1, count],
        example=f"[[{example}]]",
        ensemble=ensemble["name"],
        output=ensemble["outputs"][0]["name"],
    )
