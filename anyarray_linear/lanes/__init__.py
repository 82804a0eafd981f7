"""Fast lanes: one module per backend, with faster equals of single operations that are defined portably elsewhere.

The mathematics is defined once, in Array API code. Where a backend has a better way to get the same result (fewer passes
over memory, fewer kernels), its module here has a function of the operation's name, and `lane` finds it. A lane takes what
the portable function takes, and calls that one for arrays that it is not made for. Tests prove each equal to its portable
definition, with lanes off: `ANYARRAY_LANES=0` in the environment, or `with lanes.off():`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from ..arrays.place import Namespace

_MODULES = {"array_api_compat.numpy": "numpy", "array_api_compat.cupy": "cupy"}
_found: dict[tuple[Callable[..., Any], Namespace], Callable[..., Any]] = {}
_on: ContextVar[bool] = ContextVar("lanes", default=os.environ.get("ANYARRAY_LANES", "1") != "0")


def lane(portable: Callable[..., Any], xp: Namespace) -> Callable[..., Any]:
    """The faster equal of the function `portable` for arrays of the namespace `xp`; `portable` itself if there is none."""
    if not _on.get():
        return portable
    try:
        return _found[portable, xp]
    except KeyError:
        module = _MODULES.get(xp.__name__)
        name = portable.__name__.lstrip("_")
        found = None if module is None else getattr(import_module(f".{module}", __name__), name, None)
        return _found.setdefault((portable, xp), portable if found is None else found)


@contextmanager
def off() -> Iterator[None]:
    """A context without lanes, in this thread: everything runs by its portable definition."""
    token = _on.set(False)
    try:
        yield
    finally:
        _on.reset(token)
