"""Arrays of any namespace: which one, where it is, and the checks at the door.

This is the one place that knows how namespaces differ, and the one place that words the errors for arrays that do not
belong together. What it answers:

- which Array API namespace an array speaks (`namespace`, `computing_on`);
- on which device it is, and how to compute there: CuPy computes on the *current* device, not on its arguments' device,
  so mathematics runs inside `with computing_on(X) as xp:`;
- whether two arrays may meet in one formula (`check_float`, `check_alike`, `check_shape`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_jax_array, is_torch_array
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
        check_array("x", x)
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


def describe(x: object) -> str:
    """What `x` is, for an error message: `"a cupy array on cuda:1"`."""
    if not is_array(x):
        return f"a {type(x).__name__}"
    name = "torch" if is_torch_array(x) else "jax" if is_jax_array(x) else type(x).__module__.partition(".")[0]
    device = device_of(x)
    if device is None:
        return f"a {name} array being traced"
    if name == "cupy":
        return f"a cupy array on cuda:{device.id}"
    return f"a {name} array on {device}"


def check_array(name: str, x: object) -> None:
    """Raise `TypeError` unless `x` is an array of the standard."""
    if type(x) not in _anywhere and not is_array(x):
        if peculiar(x):
            raise TypeError(
                f"{name} is a numpy {type(x).__name__}, which computes otherwise than arrays do; make it an array "
                f"with numpy.asarray({name}), having filled what is masked: {name}.filled(0.0)"
            )
        raise TypeError(
            f"{name} is {describe(x)}, not an array; make it one with numpy.asarray({name}, dtype=...) "
            "or the asarray of the library and device that you compute with"
        )


def check_float(name: str, x: Array) -> None:
    """Raise `TypeError` unless `x` is an array of a dtype that layers compute in."""
    if type(x) is np.ndarray and x.dtype.char in "fd" and x.dtype.isnative:
        return
    check_array(name, x)
    dtype = dtype_name(x.dtype)
    if dtype in FLOAT_DTYPES or (dtype == "float16" and (is_cupy_array(x) or is_torch_array(x))):
        return
    if dtype == "float16":
        raise TypeError(
            f"{name} is float16, which {describe(x).split()[1]} does not multiply with float32 accumulation; "
            f'cast it with xp.astype({name}, xp.float32) (float16 is for CuPy and torch)'
        )
    raise TypeError(
        f"{name} is {dtype}, but layers compute in float32 or float64; "
        f"cast it with xp.astype({name}, xp.float32) or xp.float64"
    )


def check_place(reference: str, expected: Array, name: str, x: Array) -> None:
    """Raise unless `x` has the namespace and device of `expected`, which the message calls `reference`.

    A device that cannot be read (`None`: an array traced by `jax.jit`) is not compared.
    """
    if type(x) is not type(expected) and namespace(x) is not namespace(expected):
        error: type[Exception] = TypeError
    else:
        here, there = device_of(x), device_of(expected)
        if here is None or there is None or here == there:
            return
        error = ValueError
    line = f"Device.of({reference}).asarray({name})" if _can_be_typed(reference, name) else "Device.of(one).asarray(other)"
    raise error(
        f"{name} is {describe(x)} but {reference} is {describe(expected)}; move one to the other, for example with {line}"
    )


def _can_be_typed(*names: str) -> bool:
    """Whether these names of arguments, such as `W` or `the gradient of 0.W`, can stand in a line of code."""
    return all(name.isidentifier() for name in names)


def surely_alike(x: Array, y: Array) -> bool:
    """Whether a glance tells that two arrays are alike: NumPy's, of one dtype. Others need `check_alike`."""
    return type(x) is np.ndarray and type(y) is np.ndarray and x.dtype == y.dtype


def surely_ids(Z: Array, target: Array) -> bool:
    """Whether a glance tells that `target` holds an integer for each row of `Z`: NumPy's."""
    return (
        type(target) is np.ndarray and type(Z) is np.ndarray and target.dtype.kind in "iu" and target.shape == Z.shape[:-1]
    )


_NATIVE = np.dtype("float32"), np.dtype("float64")


def at_a_glance(X: Array, W: Array, b: Array | None = None) -> Namespace | None:
    """NumPy's namespace, if a glance tells that `X` is rows that `W` and `b` take; `None` says nothing yet.

    On small layers the full checks are dearer than the product itself; a glance takes a third of their time.
    """
    if type(X) is not np.ndarray or type(W) is not np.ndarray:
        return None
    dtype = W.dtype
    if X.dtype is not dtype or dtype not in _NATIVE or not X.ndim == W.ndim == 2 or X.shape[1] != W.shape[1] or not W.size:
        return None
    if b is not None and (type(b) is not np.ndarray or b.dtype is not dtype or b.shape != (1, W.shape[0])):
        return None
    known = _anywhere.get(np.ndarray)
    return namespace(X) if known is None else known.xp


def check_alike(reference: str, expected: Array, name: str, x: Array) -> None:
    """Raise unless `x` has the namespace, device and dtype of `expected`, which the message calls `reference`."""
    if surely_alike(x, expected):
        return
    check_array(name, x)
    check_place(reference, expected, name, x)
    if x.dtype != expected.dtype:
        dtype = dtype_name(x.dtype)
        other = f', or build the layer with dtype="{dtype}"' if dtype.startswith("float") else ""
        wanted = dtype_name(expected.dtype)
        line = f"xp.astype({name}, {reference}.dtype)" if _can_be_typed(reference, name) else f"xp.astype(..., xp.{wanted})"
        raise TypeError(f"{name} is {dtype} but {reference} is {wanted}; cast it with {line}{other}")


def check_shape(name: str, x: Array, expected: tuple[int, ...], why: str) -> None:
    """Raise `ValueError` unless `x` has the shape `expected`; `why` says where that shape comes from."""
    if x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)} but must have {expected}, {why}")
