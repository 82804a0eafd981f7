"""The place of an array: its namespace, its device and its dtype, as one object that two arrays share or do not.

Places are interned, so arrays may meet in a formula if their places are the same object, and that look costs a dictionary
access on every backend. Only when it says no is it worked out why (`checks`). A place also knows how to compute there: CuPy
computes on the *current* device, not on that of its arguments, so `place.run` and `with place.entered() as xp:` make the
place's device current first, which costs nothing where it is current already.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_jax_array
from array_api_compat import device as _device

from . import operations

Array = Any
"""An array of any Array API namespace (the standard publishes no static type for one yet)."""
Namespace = Any
"""An Array API namespace, such as `array_api_compat.numpy` or `array_api_compat.cupy`."""

_NOTHING = nullcontext()
FLOAT_DTYPES = ("float32", "float64")
"""The dtypes of every namespace; float16 joins them where products are accumulated in float32 (CuPy, torch)."""


def dtype_name(dtype: Any) -> str:
    """The name of a dtype of any namespace, without its namespace: `"float32"`."""
    if not getattr(dtype, "isnative", True):
        return str(dtype)  # NumPy's foreign byte orders are another dtype: ">f4"
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


class Place:
    """A namespace, a device of it and a dtype. Interned: equal places are one object, so compare them by `is`.

    xp: the Array API namespace. library: `"numpy"`, `"cupy"`, `"torch"`, `"jax"`, `"array_api_strict"`, or what else it is
    called; empty for what is no array. device: as the namespace states it; `None` where it cannot be read, as under
    `jax.jit`. dtype, dtype_name: the dtype, and its name without the namespace's: `"float32"`.
    computes: whether layers compute in this dtype here. integral: whether it is one of integers. reads_freely: whether
    looking at a value costs no wait for a device: NumPy, and torch on a CPU.
    """

    __slots__ = ("computes", "device", "dtype", "dtype_name", "faster", "integral", "library", "reads_freely", "xp")

    def __init__(self, xp: Namespace, library: str, device: Any, dtype: Any) -> None:
        self.xp, self.library, self.device, self.dtype = xp, library, device, dtype
        self.dtype_name = dtype_name(dtype)
        floats = (*FLOAT_DTYPES, "float16") if library in ("cupy", "torch") else FLOAT_DTYPES
        self.computes = self.dtype_name in floats
        self.integral = self.dtype_name.startswith(("int", "uint"))
        self.reads_freely = library == "numpy" or (library == "torch" and device.type == "cpu")
        self.faster: operations.Table = {} if xp is None else operations.table(xp.__name__)

    def operation(self, portable: Callable[..., Any]) -> Callable[..., Any]:
        """The function to call for `portable` here: its faster equal, where a lane has one and lanes are not off."""
        return self.faster.get(portable, portable) if operations.lanes_are_on.get() else portable

    def run(self, portable: Callable[..., Any], *arguments: Any) -> Any:
        """`portable(xp, *arguments)`, or its faster equal, on this place's device."""
        if operations.lanes_are_on.get():
            portable = self.faster.get(portable, portable)
        return portable(self.xp, *arguments)

    def entered(self) -> _Here | _OnDevice:
        """A context in which arrays of this place are computed with; entering it gives the namespace."""
        return _Here(self.xp)

    def without_graph(self) -> AbstractContextManager[Any]:
        """A context in which torch's autograd records nothing: gradients are formed by hand here, and the graph of a weight
        that requires grad would grow with every update."""
        return import_module("torch").no_grad() if self.library == "torch" else _NOTHING

    def __repr__(self) -> str:
        return f"Place({self.library} on {self.device}, {self.dtype_name})"


class _NumpyPlace(Place):
    """A place of NumPy, where a result that is too small is 0, whatever `np.errstate` says of underflow."""

    __slots__ = ()

    def run(self, portable: Callable[..., Any], *arguments: Any) -> Any:
        try:
            if operations.lanes_are_on.get():  # as above: a call less on the way of every step
                portable = self.faster.get(portable, portable)
            return portable(self.xp, *arguments)
        except FloatingPointError as error:  # costs nothing where there is none
            if "underflow" not in str(error):
                raise
        with np.errstate(under="ignore"):
            return super().run(portable, *arguments)


class _CudaPlace(Place):
    """A place of CuPy: what is run there makes its device the current one, and then the one that was."""

    __slots__ = ("_current", "_switch")

    def __init__(self, xp: Namespace, library: str, device: Any, dtype: Any) -> None:
        super().__init__(xp, library, device, dtype)
        self._current, self._switch = xp.cuda.runtime.getDevice, xp.cuda.runtime.setDevice

    def run(self, portable: Callable[..., Any], *arguments: Any) -> Any:
        if self._current() == self.device.id:
            return super().run(portable, *arguments)
        with self.entered():
            return super().run(portable, *arguments)

    def entered(self) -> _Here | _OnDevice:
        before = self._current()
        if before == self.device.id:
            return _Here(self.xp)
        return _OnDevice(self.xp, self._switch, self.device.id, before)


class _Here:
    """A context where nothing has to be done: it only hands out the namespace."""

    __slots__ = ("xp",)

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    def __enter__(self) -> Namespace:
        return self.xp

    def __exit__(self, *exc: object) -> None:
        pass


class _OnDevice:
    """A context that makes a CUDA device current, hands out the namespace, and restores the device that was."""

    __slots__ = ("before", "index", "switch", "xp")

    def __init__(self, xp: Namespace, switch: Callable[[int], None], index: int, before: int) -> None:
        self.xp, self.switch, self.index, self.before = xp, switch, index, before

    def __enter__(self) -> Namespace:
        self.switch(self.index)
        return self.xp

    def __exit__(self, *exc: object) -> None:
        self.switch(self.before)


# ----------------------------------------------------------------------------------------------------------------------
# the look

NOWHERE = Place(None, "", None, None)
"""The place of what is no array."""

_interned: dict[tuple[Namespace, str, Any], Place] = {}
_known: dict[type, dict[Any, Place]] = {}
_of_numpy: dict[Any, Place] = _known.setdefault(np.ndarray, {})
_looks: dict[type, Callable[[Any], Place]] = {}  # by array type: a function that finds the place, or raises KeyError


def place_of(x: Any) -> Place:
    """The place of the array `x`; `NOWHERE` for what is no array.

    >>> import numpy as np
    >>> place_of(np.ones(2)), place_of(np.ones(2)) is place_of(np.zeros((3, 1))), place_of([1.0]) is NOWHERE
    (Place(numpy on cpu, float64), True, True)
    """
    try:
        if type(x) is np.ndarray:  # as its look below, a call less
            return _of_numpy[x.dtype]
        return _looks[type(x)](x)
    except KeyError:  # the first of its type, or the first of its type that is there and of that dtype
        return _first_look(x)


def _first_look(x: Any) -> Place:
    """The place of an array that is the first of its kind; from then on its type's own look finds it."""
    if not _is_array(x):
        if not hasattr(type(x), "__array_namespace__"):
            _looks[type(x)] = lambda x: NOWHERE
        return NOWHERE
    xp = array_namespace(x)
    library = xp.__name__.removeprefix("array_api_compat.").partition(".")[0]
    known = _known.setdefault(type(x), {})
    kind: type[Place] = Place
    if library == "numpy":
        kind = _NumpyPlace
        look, key = lambda x: known[x.dtype], x.dtype
    elif is_cupy_array(x):
        kind = _CudaPlace
        look, key = lambda x: known[x.dtype, x.data.device_id], (x.dtype, x.data.device_id)
    elif is_jax_array(x) and hasattr(x, "sharding") and hasattr(x, "device"):  # a fifth of the time of asking for the device
        look, key = lambda x: known[x.dtype, x.sharding], (x.dtype, x.sharding)
    elif hasattr(x, "device"):
        look, key = lambda x: known[x.dtype, x.device], (x.dtype, x.device)
    else:  # None for what `jax.jit` traces
        look, key = lambda x: known[x.dtype, _device(x)], (x.dtype, _device(x))
    device = "cpu" if library == "numpy" else _device(x)
    found = _interned.get((xp, str(device), x.dtype))  # CuPy's devices do not hash
    if found is None:
        found = _interned.setdefault((xp, str(device), x.dtype), kind(xp, library, device, x.dtype))
    known[key] = found
    _looks[type(x)] = look
    return found


def _is_array(x: object) -> bool:
    """Whether `x` is an array of the standard: no list and no Python number (a NumPy scalar is a 0-d array)."""
    if (isinstance(x, (int, float, complex)) and not isinstance(x, np.generic)) or peculiar(x):
        return False
    try:
        array_namespace(x)
    except TypeError:
        return False
    return True


def is_array(x: object) -> bool:
    """Whether `x` is an array of the standard: no list and no Python number (a NumPy scalar is a 0-d array)."""
    return place_of(x) is not NOWHERE


def peculiar(x: object) -> bool:
    """Whether `x` is a NumPy array of a kind that computes otherwise than arrays do: a `matrix` or a `MaskedArray`."""
    return isinstance(x, np.ndarray) and any(
        kind.__name__ in ("matrix", "MaskedArray") and kind.__module__.startswith("numpy") for kind in type(x).__mro__
    )


def computing_on(x: Array) -> _Here | _OnDevice:
    """A context in which mathematics with `x` runs on the device of `x`; entering it gives the array namespace of `x`.

    Raises `TypeError` for what is no array.

    >>> import numpy as np
    >>> with computing_on(np.ones(2)) as xp:
    ...     print(xp.__name__)
    array_api_compat.numpy
    """
    place = place_of(x)
    if place is NOWHERE:
        raise TypeError(f"x is a {type(x).__name__}, which is no array")
    return place.entered()


def namespace(x: Array) -> Namespace:
    """The array namespace of `x`; `TypeError` for what is no array."""
    return computing_on(x).xp


def device_of(x: Array) -> Any:
    """The device of `x` as its own namespace states it; `None` where it cannot be read, as under `jax.jit`."""
    return place_of(x).device


def reading_is_free(x: Array) -> bool:
    """Whether a value of `x` can be looked at without waiting for a device: NumPy, and torch on a CPU."""
    return place_of(x).reads_freely
