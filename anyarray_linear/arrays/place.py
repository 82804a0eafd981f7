"""Arrays of any namespace: which one it is, and where.

This is the one place that knows how namespaces differ. What it answers:

- which Array API namespace an array speaks (`namespace`, `computing_on`);
- on which device it is, and how to compute there: CuPy computes on the *current* device, not on its arguments' device,
  so mathematics runs inside `with computing_on(X) as xp:`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_torch_array
from array_api_compat import device as _device

Array = Any
"""An array of any Array API namespace (the standard publishes no static type for one yet)."""
Namespace = Any
"""An Array API namespace, such as `array_api_compat.numpy` or `array_api_compat.cupy`."""

FLOAT_DTYPES = ("float32", "float64")
"""The dtypes of every namespace; float16 joins them where products are accumulated in float32 (CuPy, torch)."""


class _Anywhere:
    """A context for namespaces that compute where their arguments are: it only hands out the namespace."""

    __slots__ = ("xp",)

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    def __enter__(self) -> Namespace:
        return self.xp

    def __exit__(self, *exc: object) -> None:
        pass


class _OnCurrentDevice:
    """A context for CuPy: makes a CUDA device current, hands out the namespace, and restores the device that was."""

    __slots__ = ("device", "xp")

    def __init__(self, xp: Namespace, device: Any) -> None:
        self.xp, self.device = xp, device

    def __enter__(self) -> Namespace:
        self.device.__enter__()
        return self.xp

    def __exit__(self, *exc: object) -> None:
        self.device.__exit__(*exc)


_anywhere: dict[type, _Anywhere] = {}  # by array type, so that a look-up costs one dict access


def computing_on(x: Array) -> _Anywhere | _OnCurrentDevice:
    """A context in which mathematics with `x` runs on the device of `x`; entering it gives the array namespace of `x`.

    >>> import numpy as np
    >>> with computing_on(np.ones(2)) as xp:
    ...     print(xp.__name__)
    array_api_compat.numpy
    """
    known = _anywhere.get(type(x))
    if known is not None:
        return known
    xp = array_namespace(x)
    if is_cupy_array(x):
        return _OnCurrentDevice(xp, x.device)
    if peculiar(x):
        raise TypeError(peculiarity("x", x))
    return _anywhere.setdefault(type(x), _Anywhere(xp))


def namespace(x: Array) -> Namespace:
    """The array namespace of `x`, looked up once per array type."""
    return computing_on(x).xp


def device_of(x: Array) -> Any:
    """The device of `x` as its own namespace states it; `None` where it cannot be read, as under `jax.jit`."""
    return "cpu" if isinstance(x, np.ndarray) else _device(x)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype of any namespace, without its namespace: `"float32"`."""
    if not getattr(dtype, "isnative", True):
        return str(dtype)  # NumPy's foreign byte orders are another dtype: ">f4"
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


def peculiar(x: object) -> bool:
    """Whether `x` is a NumPy array of a kind that computes otherwise than arrays do: a `matrix` or a `MaskedArray`."""
    return isinstance(x, np.ndarray) and any(
        kind.__name__ in ("matrix", "MaskedArray") and kind.__module__.startswith("numpy") for kind in type(x).__mro__
    )


def peculiarity(name: str, x: object) -> str:
    """What to say of an array for which `peculiar` is true."""
    return (
        f"{name} is a numpy {type(x).__name__}, which computes otherwise than arrays do; make it an array "
        f"with numpy.asarray({name}), having filled what is masked: {name}.filled(0.0)"
    )


def is_array(x: object) -> bool:
    """Whether `x` is an array of the standard: no list and no Python number (a NumPy scalar is a 0-d array)."""
    if (isinstance(x, (int, float, complex)) and not isinstance(x, np.generic)) or peculiar(x):
        return False
    try:
        array_namespace(x)
    except TypeError:
        return False
    return True


def reading_is_free(x: Array) -> bool:
    """Whether a value of `x` can be looked at without waiting for a device: NumPy, and torch on a CPU."""
    return isinstance(x, (np.ndarray, np.generic)) or (is_torch_array(x) and x.device.type == "cpu")
