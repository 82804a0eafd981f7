"""What data must be to be trained on, and the one place that words why a file is refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..arrays.place import Array
from ..arrays.words import printable

Task = Literal["classification", "regression"]
IMPORTS = "docs/data.md has the imports"
"""What is said of lines of code for scikit-learn."""
TEXTS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
PANDAS = {".parquet": "read_parquet", ".feather": "read_feather", ".xlsx": "read_excel", ".xls": "read_excel"}
"""What reads the tables that are not read here."""


class DataError(ValueError):
    """A data file cannot be used; the message is one line: the file, what was wrong and where, how to fix it.

    Where code is the cure, its lines are the error's notes, which Python and the command line show below the message.
    """


class Data(NamedTuple):
    """The content of a data file: `N` samples of `D` features and their targets."""

    X: Array
    """float32 or float64, `(N, D)`, finite."""
    y: Array
    """int64 `(N,)`, ids of classes; or a regression target, float32 or float64, `(N,)` or `(N, M)`, finite."""
    classes: tuple[str, ...] | None
    """The name of each class as the file writes it, in the order of the ids, else `None`: regression."""
    features: tuple[str, ...] | None
    """The `D` column names of a `.csv` with a header, else `None`."""


def refusal(path: Path, problem: str, *code: str) -> DataError:
    """The error to raise about `path`, on one printable line whatever the file or its name holds; `code` becomes notes."""
    error = DataError(printable(f"{path}: {problem}"))
    for line in code:
        error.add_note("  " + printable(line))
    return error


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
    if not (is_npz(path) or path.name.lower().endswith(TEXTS)) or not stat.S_ISREG(status.st_mode):
        reader = PANDAS.get(path.suffix.lower())
        convert = (f"pandas.{reader}({str(path)!r}).to_csv('data.csv', index=False)",) if reader else ()
        how = "convert it to one of them" + (", by pandas:" if reader else "")
        raise refusal(path, f"is neither a .npz nor a .csv file (or .tsv, .csv.gz, .tsv.gz); {how}", *convert)
    if status.st_size == 0:
        raise refusal(path, "is empty; write it again")
    return path


def is_npz(path: Path) -> bool:
    """Whether the file is an archive of arrays, and not a text."""
    return path.suffix.lower() == ".npz"


def as_float(x: Array) -> Array:
    """`x` in float32 if that holds every value of its dtype (8- and 16-bit integers do fit), else in float64."""
    fits = np.result_type(x.dtype, np.float32) == np.float32
    with np.errstate(over="ignore"):  # a wider float may overflow; `check_finite` comes after
        return x.astype(np.float32 if fits else np.float64, copy=False)


def check_finite(path: Path, x: Array, where: Callable[..., str], code: tuple[str, ...] = ()) -> None:
    """Raise `DataError` at the first NaN or infinity; `where` words a position, given one index per axis.

    code: the lines that fill in missing values, if there are such."""
    finite = np.isfinite(x)
    if not finite.all():
        at = np.unravel_index(int(finite.argmin()), x.shape)
        code = code if np.isnan(x[at]) else ()
        cure = "remove that sample or put in a finite number"
        cure += f", or let scikit-learn fill in such cells ({IMPORTS}):" if code else ""
        raise refusal(path, f"{where(*map(int, at))} is {x[at]}; {cure}", *code)


def as_features(path: Path, X: Array, where: Callable[..., str], code: tuple[str, ...] = ()) -> Array:
    """`X` as floats `(N, D)`, if it is numbers, 2-D, not empty and finite; else `DataError`."""
    if X.dtype.kind == "U":
        raise refusal(path, "X holds text; save it as numbers, such as X.astype('float32')")
    if X.ndim != 2:
        how = "X.reshape(-1, 1)" if X.ndim < 2 else "X.reshape(X.shape[0], -1)"
        raise refusal(path, f"X has shape {X.shape} but must be (samples, features); save it as {how}")
    if 0 in X.shape:
        raise refusal(path, f"X has shape {X.shape}: no {'samples' if X.shape[0] == 0 else 'features'}; put some in")
    X = as_float(X)
    check_finite(path, X, where, code)
    return X
