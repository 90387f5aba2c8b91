"""Options that several verbs have, written once; each stands for one option of the config or engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import typer

from mdpd_deploy.commands.names import METHODS, SIDES

RuntimeWord = Annotated[
    str | None,
    typer.Option(
        help="onnx, openvino, or trt: the bundle's TensorRT engine. Default: what it was proved in."
    ),
]


CpuRuntime = Literal["onnx", "openvino"]
CpuRuntimeWord = Annotated[
    CpuRuntime | None,
    typer.Option(help="onnx or openvino. Default: what it was proved in."),
]


class SharedWords(TypedDict, total=False):
    """The words of `mdpd compare` for what all its trainings share; `mdpd train` has them too."""

    recipe: Annotated[
        str | None,
        typer.Option(help="A paper's protocol, below all else that is given; `mdpd recipes`."),
        "recipe",
    ]
    data: Annotated[
        str | Path | None,
        typer.Option(help="File, folder or hub:NAME; for glue and vtab their root."),
        "data.path",
    ]
    eval_data: Annotated[
        str | Path | None, typer.Option(help="Separate evaluation data."), "data.eval_path"
    ]
    text: Annotated[
        str | Sequence[str] | None, typer.Option(help="Text column, or two: A,B."), "data.text"
    ]
    image: Annotated[str | None, typer.Option(help="Column of image paths."), "data.image"]
    label: Annotated[str | None, typer.Option(help="Label column."), "data.label"]
    backbone: Annotated[
        str | Path | None,
        typer.Option(help="timm:NAME, hf:NAME[@revision] or a local folder."),
        "backbone.name",
    ]
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of a training."), "train.steps"]
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data; default 10."), "train.epochs"
    ]
    batch: Annotated[
        str | int | None,
        typer.Option(help="Examples per step, or auto; default 32."),
        "train.batch",
    ]
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda."), "train.device"]


class TrainWords(SharedWords, total=False):
    """The words of `mdpd train`."""

    task: Annotated[
        str | None,
        typer.Option(
            help="glue/NAME, vtab/NAME, classify, regress or digits; default: classify with --data "
            "of classes, digits without --data."
        ),
        "task",
    ]
    method: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METHODS)}. Default: mdpd."),
        "method",
    ]
    side: Annotated[
        str | None, typer.Option(help=f"{', '.join(SIDES)}. Default: unipt."), "side.name"
    ]
    weights: Annotated[
        str | Path | None,
        typer.Option(help="Weights file of a timm:NAME: .safetensors, .pth, .npz."),
        "backbone.weights",
    ]
    lr: Annotated[float | None, typer.Option(help="Peak learning rate."), "optim.lr"]
    seed: Annotated[int | None, typer.Option(help="Of everything random; default 0."), "train.seed"]
    out: Annotated[
        Path | str | None, typer.Option(help="Run folder; default runs/DATE-TASK-METHOD."), "out"
    ]


class EngineWords(TypedDict, total=False):
    """The words of `mdpd build-engine`, which `mdpd export --fmt trt` has too; None = not given."""

    static_batch: Annotated[
        int | None, typer.Option(help="One batch size instead of a range; 0: the range.")
    ]
    tf32: Annotated[bool | None, typer.Option(help="TF32 in FP32 products. Default: yes.")]
    version_compatible: Annotated[
        bool | None, typer.Option(help="Run on later releases of TensorRT too; slower.")
    ]
    hardware_compatible: Annotated[
        str | None, typer.Option(help="none, ampere+ or same-compute-capability; slower.")
    ]
    refit: Annotated[bool | None, typer.Option(help="Norms and head can be exchanged.")]
    workspace: Annotated[
        int | None,
        typer.Option(help="Memory limit of the build in MiB. Default: none."),
        "workspace_mib",
    ]
