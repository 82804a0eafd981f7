"""What to do about a cell that is no number: the words for the message, and the lines of code where these are the cure."""

from __future__ import annotations

import re
from pathlib import Path

from ._checks import DataError, refusal, shown

MISSING = ("", "na", "n/a", "nan", "null", "none", "nil", "?", "-", ".")
"""How tables write that there is no value, in small letters."""
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}\b.*")
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


def bad_cell(path: Path, position: str, cell: str, target: str | None) -> DataError:
    """The error about a feature that is `cell`, at `position`; `target`: the name of the target's column, if it has one."""
    if cell.lower() in MISSING:
        what = f"is {shown(cell)}, a missing value" if cell else "is empty"
        how = "fill it in or remove the line, or let scikit-learn fill in such cells:"
    elif _DATE.fullmatch(cell):
        how = "make numbers of it, such as its year and its month, or leave the column out (drop)"
        return refusal(path, f"{position} is {shown(cell)}, not a number but a date; {how}")
    elif _DECIMAL_COMMA.fullmatch(cell):
        line = f"pandas.read_csv({str(path)!r}, sep=None, engine='python', decimal=',').to_csv('points.csv', index=False)"
        return refusal(path, f"{position} is {shown(cell)}, not a number; write numbers as 1.5, with a point:", line)
    else:
        what = f"is {shown(cell)}, not a number"
        how = "write numbers as 1.5 or 2e-3; a column of text can be left out (drop), or be encoded by scikit-learn:"
    return refusal(path, f"{position} {what}; {how}", *pipeline(path, target))


def pipeline(path: Path, target: str | None) -> tuple[str, ...]:
    """The three lines that train on texts and missing values."""
    name = repr("the target" if target is None else target)
    return (
        f"table = pandas.read_csv({path.name!r})",
        "prepare = make_column_transformer((OneHotEncoder(handle_unknown='ignore', sparse_output=False), "
        "make_column_selector(dtype_exclude='number')), remainder=SimpleImputer())",
        "model = make_pipeline(prepare, StandardScaler(), LinearNetClassifier())"
        f".fit(table.drop(columns={name}), table[{name}])",
    )
