"""Fast lanes: modules with faster equals of single operations that are defined portably elsewhere.

The mathematics is defined once, in Array API code. Where a backend has a better way to get the same result (fewer passes
over memory, fewer kernels), a module here states it in a table, `OPERATIONS = {portable: faster}`. An equal takes what the
portable function takes, and calls that one for arrays that it is not made for. Tests prove each equal to its portable
definition, with lanes off: `ANYARRAY_LANES=0` in the environment, or `with lanes.off():`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ..arrays import operations, tf32
from ..arrays.place import Array, place_of

LANES = {
    "array_api_compat.numpy": ("compiled", "numpy"),
    "array_api_compat.cupy": ("cupy",),
}
"""The modules with lanes for a namespace; where two have an equal of the same operation, the first one's is taken."""


def _tables(namespace: str) -> list[tuple[str, operations.Table]]:
    """Each lane of a namespace, by name, with its table; none is imported before an array of the namespace turns up."""
    return [(name, import_module(f".{name}", __name__).OPERATIONS) for name in LANES.get(namespace, ())]


def _table(namespace: str) -> operations.Table:
    found: dict[Callable[..., Any], Callable[..., Any]] = {}
    for _, table in reversed(_tables(namespace)):
        found.update(table)
    return found


operations.found_by(_table)


def of(operation: Callable[..., Any], x: Array) -> str:
    """Which lane an operation takes for arrays like `x`, and why not a faster one.

    operation: a portable function that lanes may replace, such as `linear.affine` or `step.training_step`.

    >>> import numpy as np
    >>> from anyarray_linear.linear import affine
    >>> of(affine, np.ones(3))
    'numpy'
    >>> with off():
    ...     of(affine, np.ones(3))
    'portable: lanes are switched off'
    """
    place = place_of(x)
    if not operations.lanes_are_on.get():
        return "portable: lanes are switched off"
    tables = _tables(place.xp.__name__) if place.library else []
    if not tables:
        return f"portable: there are no lanes for {place.library or 'what is no array'}"
    for name, table in tables:
        if operation in table:
            return name
    return f"portable: no lane of {place.library} has an equal of {operation.__name__}"


@contextmanager
def off() -> Iterator[None]:
    """A context without lanes, in this thread: everything runs by its portable definition.

    A `RuntimeWarning` says where a CUDA device was asked for products in TF32, or for none, and CuPy does otherwise.
    """
    token = operations.lanes_are_on.set(False)
    try:
        if unheard := tf32.unheard():
            warnings.warn(unheard, RuntimeWarning, stacklevel=3)
        yield
    finally:
        operations.lanes_are_on.reset(token)
