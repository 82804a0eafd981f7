"""Where the mathematics gets at lanes: the one place that knows of both.

The mathematics asks for an operation by the portable function itself. Lanes, which stand above the mathematics, state their
faster equals in tables, `{portable: faster}`, and hand this module, below both, the function that finds the tables of a
namespace. So no arrow points up, and a name that a lane has wrong is an error when the lane is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

Table = Mapping[Callable[..., Any], Callable[..., Any]]

lanes_are_on: ContextVar[bool] = ContextVar("lanes_are_on", default=os.environ.get("ANYARRAY_LANES", "1") != "0")
"""Whether faster equals are taken, in this thread; `ANYARRAY_LANES=0` in the environment says no from the start."""

_find: Callable[[str], Table] | None = None


def table(namespace: str) -> Table:
    """The faster equals for arrays of the namespace of that name, by the portable functions that they replace."""
    return {} if _find is None else _find(namespace)


def found_by(find: Callable[[str], Table]) -> None:
    """From now on `find` gives the table of a namespace."""
    global _find
    _find = find
