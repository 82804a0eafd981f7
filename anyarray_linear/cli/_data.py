"""The data of `train`: read, told about, split into parts, and scaled."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays.words import printable
from ..datasets import Data, DataError, Reading, load_digits, read_data, split
from ._common import bad
from ._streams import if_heard

Host = np.ndarray[Any, Any]

_ROWS_TOLD = 100_000  # a line about so many rows where none can be rewritten


class Scaling(NamedTuple):
    """`(x - shift) * factor` column by column, in float64."""

    shift: Host
    factor: Host

    def __call__(self, x: Host) -> Host:
        scaled: Host = (x.astype(np.float64) - self.shift) * self.factor
        return scaled


def read(options: Any, *, quiet: bool = False) -> Reading:
    """The file of `--data`, or the digits; `quiet`: without showing how far it is."""
    if options.data is None:
        for name in ("target", "task", "features", "drop"):
            if getattr(options, name) is not None:
                raise bad(name, "it is about the file of --data, and none was given")
        return Reading(Data(*load_digits(), tuple("0123456789"), None), "the digit", "10 classes", None, ())
    reading = read_data(
        options.data,
        target=options.target,
        task=options.task,
        features=_names("features", options.features),
        drop=_names("drop", options.drop) or (),
        progress=None if quiet else reading_progress(options.data),
    )
    _, y, classes, _ = reading.data
    if classes is not None and len(classes) < 2:
        raise ValueError(f"{options.data}: every sample is of the class {classes[0]!r}; give samples of two or more")
    if classes is not None and len(classes) == len(y) > 20:
        raise ValueError(
            f"{options.data}: every sample has another value in {reading.target}, so none is a class that can be learned; "
            "name the column of the target with --target"
        )
    return reading


def _names(option: str, text: str | None) -> list[str] | None:
    """The names in `a,b,"c, d"`."""
    if text is None:
        return None
    try:
        names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True, strict=True), [])]
    except csv.Error as error:
        raise bad(option, f"{text!r:.80} is no list of columns ({error}); give names such as a,b") from error
    if not names or not all(names):
        raise bad(option, f"{text!r:.80} is no list of columns; give names such as a,b")
    return names


def reading_progress(path: Path) -> Callable[[int], None]:
    """What shows on standard error how far the reading of a large file is."""

    def tell(rows: int) -> None:
        line = f"reading {printable(path.name)}: {rows:,} rows"
        with if_heard("stderr"):
            if sys.stderr.isatty():
                print(f"\r{line} ", end="", file=sys.stderr, flush=True)
            elif rows % _ROWS_TOLD == 0:
                print(line, file=sys.stderr, flush=True)

    return tell


def rows_of_parts(y: Host, options: Any) -> dict[str, Host]:
    """Which samples each part has; the test's are taken first, so they are the same whatever is used for validation."""
    parts, rows = {}, np.arange(len(y))
    for name in ("test", "validation"):
        if fraction := getattr(options, name):
            try:
                rows, _, parts[name], _ = split(rows, y[rows], test=fraction, seed=options.seed)
            except DataError as error:
                how = "give more data, or another fraction (0: none)"
                raise bad(name, f"{fraction} of {len(rows)} samples leaves one part empty; {how}") from error
    return dict(reversed({**parts, "train": rows}.items()))


def scaling_of(x: Host, options: Any, names: tuple[str, ...] | None, is_target: bool = False) -> Scaling:
    """To mean 0 and variance 1; a column that never varies goes to 0, so that the model ignores it."""

    def name(column: int) -> str:
        return f"the column {names[column]!r}" if names else "the target" if is_target else f"column {column}"

    wide = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, spread = wide.mean(axis=0), wide.std(axis=0)
    huge = ~np.isfinite(mean + spread)
    if huge.any():
        column = int(np.flatnonzero(huge)[0])
        most = np.abs(wide).max(axis=0)
        raise ValueError(
            f"{options.data}: {name(column)} has values up to {np.atleast_1d(most)[column]:.3g}, whose variance overflows; "
            "divide it by a constant"
        )
    varies = x.max(axis=0) > x.min(axis=0)
    lost = varies & (np.abs(mean) * np.finfo(options.dtype).eps > 0.01 * spread)
    if lost.any():
        column = int(np.flatnonzero(lost)[0])
        what = name(column)
        m, s = np.atleast_1d(mean)[column], np.atleast_1d(spread)[column]
        raise ValueError(
            f"{options.data}: {what} varies by {s:.2g} around {m:.6g}, too little to be seen in {options.dtype}; "
            "subtract a constant from it, or use --dtype float64"
        )
    with np.errstate(divide="ignore"):
        return Scaling(mean, np.where(varies, 1 / spread, 0.0))
