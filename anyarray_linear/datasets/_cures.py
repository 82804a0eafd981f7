"""What to do about a cell that is no number: the words for the message, and the lines of code where these are the cure."""

from __future__ import annotations

import re
from pathlib import Path

from ._checks import IMPORTS, DataError, refusal, shown

MISSING = ("", "na", "n/a", "nan", "null", "none", "nil", "?", "-", ".")
"""How tables write that there is no value, in small letters."""
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}\b.*")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


def bad_cell(path: Path, position: str, cell: str, target: str | int | None) -> DataError:
    """The error about a feature that is `cell`, at `position`; `target` as `pipeline` takes it."""
    code = pipeline(path, target)
    if cell.lower() in MISSING:
        what = f"is {shown(cell)}, a missing value" if cell else "is empty"
        how = "fill it in or remove the line" + (f", or let scikit-learn fill in such cells ({IMPORTS}):" if code else "")
    elif _DATE.fullmatch(cell):
        how = "make numbers of it, such as its year and its month, or leave the column out (drop)"
        return refusal(path, f"{position} is {shown(cell)}, not a number but a date; {how}")
    elif _DECIMAL_COMMA.fullmatch(cell):
        line = f"pandas.read_csv({str(path)!r}, sep=None, engine='python', decimal=',').to_csv('points.csv', index=False)"
        return refusal(path, f"{position} is {shown(cell)}, not a number; write numbers as 1.5, with a point:", line)
    else:
        what = f"is {shown(cell)}, not a number"
        how = "write numbers as 1.5 or 2e-3"
        if code:
            how += "; a column of text can be what to predict (target), be left out (drop), "
            how += f"or be encoded by scikit-learn ({IMPORTS}):"
    return refusal(path, f"{position} {what}; {how}", *code)


def pipeline(path: Path, target: str | int | None) -> tuple[str, ...]:
    """The three lines that train on texts and missing values; none where there is no target, as in data to predict from.

    target: the column's name, or its index in a file without a header.
    """
    if target is None:
        return ()
    name, header = repr(target), ", header=None" if isinstance(target, int) else ""
    return (
        f"table = pandas.read_csv({path.name!r}{header})",
        "prepare = make_column_transformer((OneHotEncoder(handle_unknown='ignore', sparse_output=False), "
        "make_column_selector(dtype_exclude='number')), remainder=SimpleImputer())",
        "model = make_pipeline(prepare, StandardScaler(), LinearNetClassifier())"
        f".fit(table.drop(columns={name}), table[{name}])",
    )
