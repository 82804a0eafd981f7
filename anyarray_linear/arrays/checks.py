"""The checks at the door, and their words: every error about an array that does not belong is worded here."""

from __future__ import annotations

import numpy as np
from array_api_compat import is_cupy_array, is_jax_array, is_torch_array

from . import place
from .place import FLOAT_DTYPES, Array, Namespace, device_of, dtype_name, is_array, namespace, peculiar, peculiarity


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
    if type(x) not in place._anywhere and not is_array(x):
        if peculiar(x):
            raise TypeError(peculiarity(name, x))
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
    known = place._anywhere.get(np.ndarray)
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
