"""The `export` command: a trained model as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files.atomic import atomic_write
from ..files.models import read_metadata
from ..interop.onnx import OPSET, file_to_onnx
from ._model_file import model_file
from ._streams import tell


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.safetensors, or the folder of a run.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT.onnx", help="The file to write; by default, beside MODEL.")
    ] = None,
    softmax: Annotated[
        bool, typer.Option("--softmax", help="End with the softmax, so that a classifier gives probabilities.")
    ] = False,
    labels: Annotated[
        bool, typer.Option("--labels", help="Give the name of the likeliest class, too, as the output `label`.")
    ] = False,
    opset: Annotated[int, typer.Option(min=OPSET, help="The version of ONNX's operators.")] = OPSET,
) -> None:
    """Write a model as an ONNX file, which ONNX Runtime and many other programs run.

    The input is X, with any number of rows; the output is Z, or with --softmax the probabilities P. The names of classes and
    features are in the file's metadata, and with --labels that of the likeliest class is an output. Features go in as they
    are: the model contains their scaling.

    **Examples**

    - `anyarray-linear export runs/first`
    - `anyarray-linear export model.safetensors classifier.onnx --softmax`
    """
    path = model_file(model)
    target = path.with_suffix(".onnx") if out is None else out
    if target.exists() and path.exists() and target.samefile(path):
        raise typer.BadParameter("it is the file that is read; give another one", param_hint="OUT.onnx")
    metadata = read_metadata(path)
    for option, wanted in (("--softmax", softmax), ("--labels", labels)):
        if wanted and "classes" in metadata and metadata["classes"] is None:
            raise typer.BadParameter(f"{path} has no classes, it predicts numbers", param_hint=option)
    proto = file_to_onnx(path, softmax=softmax, labels=labels, opset=opset)
    atomic_write(target, proto.SerializeToString())
    ends = [f"{end.name} ({', '.join(d.dim_param or str(d.dim_value) for d in end.type.tensor_type.shape.dim)})"
            for end in (proto.graph.input[0], proto.graph.output[0])]  # fmt: skip
    tell(f"{target}: {' -> '.join(ends)}, opset {opset}")
