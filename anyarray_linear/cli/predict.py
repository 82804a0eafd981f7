"""The `predict` command: a model's answers for the samples of a file, as CSV."""

from __future__ import annotations

import csv
import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..arrays.selection import select_device
from ..arrays.words import printable
from ..datasets import load_features
from ..files.atomic import atomic_write
from ..files.models import load_model, read_metadata
from ..files.sealed import CheckpointError
from ..linear import Linear
from ..protocol import leaves
from ..training import predict as outputs_of
from ._data import reading_progress
from ._model_file import model_file
from ._scores import softmax
from ._streams import leads_nowhere

_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # how it begins; the last ones are the wide forms of the first
Host = np.ndarray[Any, Any]


def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model.safetensors, or the folder of a run.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="A .npz (X) or a .csv (.tsv, .gz) with the features of the training.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The .csv to write; by default, standard output.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Add a column with the probability of each class.")
    ] = False,
    no_formulas: Annotated[
        bool, typer.Option("--no-formulas", help="Write ' before names that a spreadsheet would compute, such as =1+1.")
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="SPEC", help='"auto" is the best one that works; or "cpu", "cuda", "cuda:1".')
    ] = "auto",
) -> None:
    """Write a model's predictions as CSV: a line per sample, with the class, or the number for a regression.

    A .csv with a header is read by its column names, so other columns, such as the target, may be there too. Without a
    header, the target may follow the features. Features go in as they are: the model contains their scaling.

    **Examples**

    - `anyarray-linear predict runs/first new_samples.csv`
    - `anyarray-linear predict model.safetensors new.npz --probabilities --out predictions.csv`
    """
    path = model_file(model)
    if out is not None and out.exists() and any(out.samefile(taken) for taken in (path, data) if taken.exists()):
        raise typer.BadParameter("it is one of the files that are read; give another one", param_hint="--out")
    if out is None and leads_nowhere():
        raise typer.BadParameter("standard output is closed; give a FILE", param_hint="--out")
    network = load_model(path, device=select_device(device))
    metadata = read_metadata(path)
    classes, features = (_names(path, metadata, name) for name in ("classes", "features"))
    if probabilities and classes is None:
        raise typer.BadParameter(f"{path} has no classes, it predicts numbers", param_hint="--probabilities")
    Z = outputs_of(network, _features(data, _in_features(path, network), features))
    Z = Z.reshape(len(Z), -1)
    if classes is not None and len(classes) != Z.shape[1]:
        raise CheckpointError(f"{path} names {len(classes)} classes, but its model has {Z.shape[1]} outputs")
    if classes is not None and no_formulas:
        classes = [_no_formula(name) for name in classes]
    if out is None:
        _show(Z, classes, probabilities)
    else:
        atomic_write(out, _csv(Z, classes, probabilities).encode())


def _show(Z: Host, classes: list[str] | None, probabilities: bool) -> None:
    """Write the table to standard output, which may be a terminal, or of an encoding that lacks the names of classes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if classes is not None and sys.stdout.isatty():
        classes = [printable(name) for name in classes]
    for name in classes or ():
        try:
            name.encode(encoding)
        except UnicodeEncodeError:
            raise ValueError(
                f"the class {name!r:.80} cannot be written in {encoding}, the encoding of standard output; "
                "give --out FILE, which is UTF-8, or set PYTHONIOENCODING=utf-8"
            ) from None
    sys.stdout.write(_csv(Z, classes, probabilities))


def _no_formula(name: str) -> str:
    """The name as a spreadsheet takes it for a text; a number may stay one. (OWASP, "CSV Injection".)"""
    with suppress(ValueError):
        float(name)
        return name
    return f"'{name}" if name.startswith(_FORMULA) else name


def _names(path: Path, metadata: dict[str, Any], name: str) -> list[str] | None:
    names = metadata.get(name)
    if names is not None and not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
        raise CheckpointError(f"{path} has {name} that are no list of names; train the model again")
    return names


def _features(data: Path, count: int, names: list[str] | None) -> Host:
    X: Host = load_features(data, count, features=names, progress=reading_progress(data))
    return X


def _in_features(path: Path, network: Any) -> int:
    layers = [layer for _, layer in leaves(network) if isinstance(layer, Linear)]
    if not layers:
        raise CheckpointError(f"{path} has no linear layer, so it says nothing about its features")
    return layers[0].in_features


def _csv(Z: Host, classes: list[str] | None, probabilities: bool) -> str:
    """The outputs `Z` `(N, outputs)` as a table with a header."""
    file = io.StringIO()
    # csv quotes a line feed, and a carriage return, at which readers end a line too, only together with everything else
    odd = any("\r" in name for name in classes or ())
    writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if odd else csv.QUOTE_MINIMAL)
    if classes is None:
        writer.writerow(["prediction"] if Z.shape[1] == 1 else [f"prediction_{i}" for i in range(Z.shape[1])])
        writer.writerows(Z.astype(str))  # the digits that the dtype has
        return file.getvalue()
    labels = [classes[i] for i in Z.argmax(axis=1)]
    if not probabilities:
        writer.writerow(["prediction"])
        writer.writerows([label] for label in labels)
        return file.getvalue()
    P = softmax(Z.astype(np.float64))
    writer.writerow(["prediction", *(f"probability_{name}" for name in classes)])
    writer.writerows([label, *row] for label, row in zip(labels, P.astype(Z.dtype).astype(str), strict=True))
    return file.getvalue()
