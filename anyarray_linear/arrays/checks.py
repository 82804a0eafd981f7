"""The checks at the door, and their words: every error about an array that does not belong is worded here.

Whether arrays fit is a look at their places (`place`); these functions are for the case that they do not, and for doors
where the time of a call does not count. Each names the argument, what it was, what was expected, and the line that mends
it.
"""

from __future__ import annotations

from typing import Any

from .place import FLOAT_DTYPES, NOWHERE, Array, peculiar, place_of

_UNSAID = ("builtins", "__main__", __name__.partition(".")[0])


def describe(x: object) -> str:
    """What `x` is, for an error message: `"a cupy array on cuda:1"`."""
    place = place_of(x)
    if place is NOWHERE:
        library = type(x).__module__.partition(".")[0]
        return f"a {type(x).__name__}" if library in _UNSAID else f"a {library} {type(x).__name__}"
    if place.library == "numpy":
        return f"a {type(x).__module__.partition('.')[0]} array on cpu"
    if place.device is None:
        return f"a {place.library} array being traced"
    return f"a {place.library} array on {f'cuda:{place.device.id}' if place.library == 'cupy' else place.device}"


def check_array(name: str, x: object) -> None:
    """Raise `TypeError` unless `x` is an array of the standard."""
    if place_of(x) is not NOWHERE:
        return
    if peculiar(x):
        raise TypeError(
            f"{name} is a numpy {type(x).__name__}, which computes otherwise than arrays do; make it an array "
            f"with numpy.asarray({name}), having filled what is masked: {name}.filled(0.0)"
        )
    raise TypeError(
        f"{name} is {describe(x)}, not an array; make it one with numpy.asarray({name}, dtype=...) "
        "or the asarray of the library and device that you compute with"
    )


def check_object(name: str, value: Any, methods: tuple[str, ...], example: str) -> None:
    """Raise `TypeError` unless `value` is an object with these methods, and no class."""
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        what = f"the class {value.__name__}" if isinstance(value, type) else describe(value)
        raise TypeError(f"{name} is {what}; give an object such as {example}")


def check_float(name: str, x: Array) -> None:
    """Raise `TypeError` unless `x` is an array of a dtype that layers compute in."""
    place = place_of(x)
    if place.computes:
        return
    check_array(name, x)
    if place.dtype_name == "float16":
        raise TypeError(
            f"{name} is float16, which {place.library} does not multiply with float32 accumulation; "
            f'cast it with xp.astype({name}, xp.float32) (float16 is for CuPy and torch)'
        )
    raise TypeError(
        f"{name} is {place.dtype_name}, but layers compute in {' or '.join(FLOAT_DTYPES)}; "
        f"cast it with xp.astype({name}, xp.float32) or xp.float64"
    )


def check_place(reference: str, expected: Array, name: str, x: Array) -> None:
    """Raise unless `x` has the namespace and device of `expected`, which the message calls `reference`.

    A device that cannot be read (`None`: an array traced by `jax.jit`) is not compared.
    """
    here, there = place_of(x), place_of(expected)
    if here.xp is not there.xp:
        error: type[Exception] = TypeError
    elif here.device is None or there.device is None or here.device == there.device:
        return
    else:
        error = ValueError
    line = f"Device.of({reference}).asarray({name})" if _can_be_typed(reference, name) else "Device.of(one).asarray(other)"
    raise error(
        f"{name} is {describe(x)} but {reference} is {describe(expected)}; move one to the other, for example with {line}"
    )


def check_alike(reference: str, expected: Array, name: str, x: Array) -> None:
    """Raise unless `x` has the place of `expected`, its namespace, device and dtype; the message calls that `reference`."""
    here, there = place_of(x), place_of(expected)
    if here is there is not NOWHERE:
        return
    check_array(name, x)
    check_place(reference, expected, name, x)
    if here.dtype != there.dtype:
        other = f', or build the layer with dtype="{here.dtype_name}"' if here.dtype_name.startswith("float") else ""
        line = (
            f"xp.astype({name}, {reference}.dtype)"
            if _can_be_typed(reference, name)
            else f"xp.astype(..., xp.{there.dtype_name})"
        )
        raise TypeError(f"{name} is {here.dtype_name} but {reference} is {there.dtype_name}; cast it with {line}{other}")


def check_shape(name: str, x: Array, expected: tuple[int, ...], why: str) -> None:
    """Raise `ValueError` unless `x` has the shape `expected`; `why` says where that shape comes from."""
    if x.shape != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)} but must have {expected}, {why}")


def _can_be_typed(*names: str) -> bool:
    """Whether these names of arguments, such as `W` or `the gradient of 0.W`, can stand in a line of code."""
    return all(name.isidentifier() for name in names)
