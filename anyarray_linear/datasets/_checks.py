"""What data must be to be trained on, and the one place that words why a file is refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..arrays.place import Array

Task = Literal["classification", "regression"]

MAX_CLASSES = 65_536
"""A class id from here on is refused: it would make an output layer that large, and is rarely a class id."""


class DataError(ValueError):
    """A data file cannot be used; the message is one line: the file, what was wrong and where, how to fix it."""


class Data(NamedTuple):
    """The content of a data file: `N` samples of `D` features and their targets."""

    X: Array
    """float32 or float64, `(N, D)`, finite."""
    y: Array
    """int64 `(N,)` class ids; or a regression target, float32 or float64, `(N,)` or `(N, M)`, finite."""
    classes: tuple[str, ...] | None
    """The name of each class in the order of the ids (`"0"`, `"1"`, ... where ids were given), else `None`: regression."""
    features: tuple[str, ...] | None
    """The `D` column names of a `.csv` with a header, else `None`."""


def refusal(path: Path, problem: str) -> DataError:
    """The error to raise about `path`, on one printable line whatever the file or its name holds."""
    text = f"{path}: {problem}"
    return DataError(text if text.isprintable() else text.encode("unicode_escape").decode())


def shown(text: str) -> str:
    """Quoted, and cut to what a message has room for."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def listed(names: Iterable[str]) -> str:
    """The first ten names, quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(map(shown, names[:10])) or "none") + more


def check_file(path: str | os.PathLike[str]) -> Path:
    """The path, if it is a file that this package might read; else `DataError`."""
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            path.open("rb").close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise refusal(path, f"cannot be read ({reason}); check the path and its permissions") from error
    if stat.S_ISDIR(status.st_mode):
        raise refusal(path, "is a folder; give the .npz or .csv file itself")
    if path.suffix.lower() == ".npy":
        raise refusal(path, "is a single array; write both with numpy.savez('data.npz', X=X, y=y)")
    if path.suffix.lower() not in (".npz", ".csv") or not stat.S_ISREG(status.st_mode):
        raise refusal(path, "is neither a .npz nor a .csv file; convert it to one of them")
    if status.st_size == 0:
        raise refusal(path, "is empty; write it again")
    return path


def as_float(x: Array) -> Array:
    """`x` in float32 if that holds every value of its dtype (8- and 16-bit integers do fit), else in float64."""
    fits = np.result_type(x.dtype, np.float32) == np.float32
    with np.errstate(over="ignore"):  # a wider float may overflow; `check_finite` comes after
        return x.astype(np.float32 if fits else np.float64, copy=False)


def check_finite(path: Path, x: Array, where: Callable[..., str]) -> None:
    """Raise `DataError` at the first NaN or infinity; `where` words a position, given one index per axis."""
    finite = np.isfinite(x)
    if not finite.all():
        at = np.unravel_index(int(finite.argmin()), x.shape)
        raise refusal(path, f"{where(*map(int, at))} is {x[at]}; remove that sample or put in a finite number")


def as_features(path: Path, X: Array, where: Callable[..., str]) -> Array:
    """`X` as floats `(N, D)`, if it is numbers, 2-D, not empty and finite; else `DataError`."""
    if X.dtype.kind == "U":
        raise refusal(path, "X holds text; save it as numbers, such as X.astype('float32')")
    if X.ndim != 2:
        how = "X.reshape(-1, 1)" if X.ndim < 2 else "X.reshape(X.shape[0], -1)"
        raise refusal(path, f"X has shape {X.shape} but must be (samples, features); save it as {how}")
    if 0 in X.shape:
        raise refusal(path, f"X has shape {X.shape}: no {'samples' if X.shape[0] == 0 else 'features'}; put some in")
    X = as_float(X)
    check_finite(path, X, where)
    return X


def as_target(path: Path, y: Array, task: Task | None, where: Callable[..., str]) -> tuple[Array, tuple[str, ...] | None]:
    """Numbers `y` as `(y, classes)` of a `Data`, if they can be; else `DataError`.

    Unless `task` says otherwise, integers are class ids, and so are floats that are exactly the ids 0 to K - 1, each
    of them more than once (many tools write every column as floats); other floats are a regression target.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in (1, 2) or 0 in y.shape:
        raise refusal(path, f"y has shape {y.shape} but must be (samples,); save it with one target per row of X")
    if task is None:
        task = "classification" if y.dtype.kind in "biu" or _are_ids(y) else "regression"
    if task == "regression":
        y = as_float(y)
        check_finite(path, y, where)
        return y, None
    if y.ndim == 2:
        raise refusal(
            path,
            f"y has shape {y.shape} but class ids have (samples,); save y.argmax(axis=1) if it is one-hot, "
            "or ask for the task 'regression'",
        )
    for what, bad in (
        ("is no class id (a whole number)", y != np.floor(y)),
        ("is negative, but class ids count from 0", y < 0),
        (f"is too large for a class id (the limit is {MAX_CLASSES - 1})", y >= MAX_CLASSES),
    ):
        if bad.any():
            row = int(bad.argmax())
            raise refusal(
                path, f"{where(row)} is {y[row]}, which {what}; renumber the classes, or ask for the task 'regression'"
            )
    y = y.astype(np.int64)
    return y, tuple(map(str, range(int(y.max()) + 1)))


def _are_ids(y: Array) -> bool:
    """Whether floats `y` are the class ids 0 to K - 1 (K > 1), each of them more than once."""
    if y.ndim != 1 or y.min() != 0 or not 1 <= y.max() < MAX_CLASSES or (y != np.floor(y)).any():
        return False
    return bool(np.bincount(y.astype(np.int64)).min() > 1)


def as_classes(
    path: Path, labels: list[str], codes: Array, task: Task | None, where: Callable[..., str]
) -> tuple[Array, tuple[str, ...]]:
    """Text labels as `(y, classes)` of a `Data`: ids in the sorted order of the names.

    `labels` are the distinct names, and `codes`, int `(N,)`, says which of them each sample has.
    """
    if task == "regression":
        raise refusal(
            path,
            f"the target is text such as {shown(labels[0])}, but regression needs numbers; "
            "correct it, or ask for the task 'classification'",
        )
    if codes.ndim != 1:
        raise refusal(path, f"the text labels have shape {codes.shape} but must be (samples,); save one for each row of X")
    if len(labels) > MAX_CLASSES:
        raise refusal(
            path,
            f"the target has {len(labels)} different texts (the limit is {MAX_CLASSES} classes); "
            "name the right target column",
        )
    for code, label in enumerate(labels):
        if label.strip().lower() in ("", "nan"):
            row = int((codes == code).argmax())
            raise refusal(path, f"{where(row)} is {shown(label)}, as missing values are; name it or remove that sample")
    order = np.array(sorted(range(len(labels)), key=labels.__getitem__))
    return np.argsort(order)[codes].astype(np.int64), tuple(labels[i] for i in order)
