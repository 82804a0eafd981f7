"""The numbers that a user gives: sizes, counts and hyper-parameters, checked and made Python's own.

Made Python's, because a NumPy scalar beside a float32 array makes a float64 one (NumPy 2, CuPy 14).
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any


def check_number(name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` is a real number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r:.60}, a {type(value).__name__}; it must be a Python number")


def check_positive(name: str, value: Any) -> None:
    """Raise unless `value` is a real number greater than 0."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} is {value!r}; it must be greater than 0")


def real(name: str, value: Any, low: float = 0.0, below: float = math.inf) -> float:
    """`value` as a Python float in `[low, below)`; raises `TypeError` or `ValueError` for any other."""
    check_number(name, value)
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not low <= number < below:
        raise ValueError(f"{name} is {number}; it must be at least {low} and below {below}")
    return number


def whole(name: str, value: Any, low: int = 1) -> int:
    """`value` as a Python int of at least `low`; `TypeError` for what is no integer, `ValueError` for a smaller one."""
    try:
        # by name: NumPy's own truth values are integers, with a warning, in its first versions of 2
        is_bool = type(value).__name__ in ("bool", "bool_")
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} is {value!r:.60}, a {type(value).__name__}; it must be an int >= {low}")
    if number < low:
        raise ValueError(f"{name} is {number}; it must be an int >= {low}")
    return number
