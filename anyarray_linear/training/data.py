"""The data of a training: the batches that the model takes, in which order, and which rows are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.fingerprint import fingerprint
from ..arrays.memory import explained_memory
from ..arrays.place import Array, computing_on, dtype_name, namespace, place_of
from ..distributed.group import Group
from ..protocol import leaves, parameters
from .moving import moved, moved_once

_ORDERS = int.from_bytes(b"fit")  # the child of the seed whose children give the orders; a layer of that seed has others


@dataclass
class Data:
    """`X` and `y` wherever they are, or the given `rows` of them, and where batches should go.

    weights: one per row, or none. takes_ids: whether the model takes integers: an `X` of them is not cast.
    """

    X: Array
    y: Array
    device: Device
    dtype: Any
    rows: np.ndarray[Any, Any] | None = None
    weights: Array | None = None
    takes_ids: bool = False

    def __post_init__(self) -> None:
        self.X, self.y = _fit_for_batches(self.X, self.dtype), _fit_for_batches(self.y, "int64")

    def __len__(self) -> int:
        return int(self.X.shape[0]) if self.rows is None else len(self.rows)

    def batches(
        self, order: np.ndarray[Any, Any] | None, batch_size: int, start: int = 0, group: Group | None = None
    ) -> Iterator[tuple[Array, Array, Array | None]]:
        """Batches `(X, y, weights)` from row `start` on, in `order` (host indices) or as rows come; the last may be smaller.

        group: if given, this rank's share of each batch, which may be empty.
        """
        order = self.rows if order is None else order
        takes = [row_taker(x, order) for x in self.arrays]
        count = len(self) if order is None else len(order)

        def batch(i: int) -> tuple[Array, ...]:
            rows = i, min(i + batch_size, count)
            return tuple(take(*(rows if group is None else group.share(*rows))) for take in takes)

        for X, y, *weights in moved(map(batch, range(start, count, batch_size)), self.device, self.dtypes):
            yield X, y, weights[0] if weights else None

    @property
    def arrays(self) -> tuple[Array, ...]:
        """`X`, `y`, and the weights if there are any."""
        return (self.X, self.y) if self.weights is None else (self.X, self.y, self.weights)

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """What each of them is cast to; `None` for ids, which stay what they are."""
        X = None if self.takes_ids and place_of(self.X).integral else self.dtype
        exact = loss_dtype(self.device, self.dtype)
        y = exact if is_float(self.y) else None
        return (X, y) if self.weights is None else (X, y, exact)

    def move(self) -> None:
        """Have the data where the model is from now on, if they are on the host and fit on the model's card."""
        self.X, self.y, *weights = moved_once(self.arrays, self.device, self.dtypes)
        self.weights = weights[0] if weights else None

    @property
    def is_in_place(self) -> bool:
        """Whether `X` and `y` are where the model is, and in its dtype, so that batches need not be moved or cast."""
        there = all(Device.of(x) == self.device for x in self.arrays)
        return there and all(dtype is None or x.dtype == dtype for x, dtype in zip(self.arrays, self.dtypes, strict=True))

    def fingerprints(self, numbers: int | None = None) -> dict[str, str]:
        """Of `X` and of `y` as training sees them; see `arrays.fingerprint` for `numbers`."""
        floating = dtype_name(self.dtype)
        exact = dtype_name(loss_dtype(self.device, self.dtype))
        dtypes = {"X": floating if self.dtypes[0] is not None else "int64", "y": exact if is_float(self.y) else "int64"}
        if self.weights is not None:
            dtypes["weights"] = exact
        return {name: fingerprint(getattr(self, name), dtypes[name], self.rows, numbers=numbers)[:16] for name in dtypes}


def loss_dtype(device: Device, dtype: Any) -> Any:
    """In what the loss of a model of this dtype is computed: float32 for float16."""
    if dtype_name(dtype) != "float16":
        return dtype
    exact = device.dtype("float32")
    return np.dtype(exact) if isinstance(exact, type) else exact  # NumPy's and CuPy's is a type, which has no name


def is_float(x: Array) -> bool:
    return bool(namespace(x).isdtype(x.dtype, "real floating"))


def _fit_for_batches(x: Array, dtype: Any) -> Array:
    """`x`; a torch tensor without its graph, and one of wide unsigned integers, which torch neither takes rows of nor
    compares, in `dtype`."""
    there = Device.of(x)
    if there.kind != "torch":
        return x
    return there.asarray(x, dtype=dtype if dtype_name(x.dtype) in ("uint16", "uint32", "uint64") else None)


def row_taker(x: Array, order: np.ndarray[Any, Any] | None) -> Callable[[int, int], Array]:
    """`(start, stop) -> rows`, where `x` is. The order is transferred once, not once per batch."""
    if order is None:
        return lambda start, stop: x[start:stop, ...]
    if isinstance(x, np.ndarray):
        return lambda start, stop: x[order[start:stop]]
    index = Device.of(x).asarray(order)

    def take(start: int, stop: int) -> Array:
        with computing_on(x) as xp:
            return xp.take(x, index[start:stop], axis=0)

    return take


def takes_ids(model: Any) -> bool:
    """Whether the first layer of `model` takes integers."""
    first = next((layer for _, layer in leaves(model)), model)
    return getattr(first, "takes", None) == "ids"


def model_place(model: Any, X: Array) -> tuple[Device, Any]:
    """Where the model computes and in what dtype: where its parameters are, or for want of any, where `X` is."""
    first = next(iter(parameters(model).values()), X)
    return Device.of(first), first.dtype


def count_of_held(fraction: float, count: int) -> int:
    """How many of `count` rows the fraction for validation is."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation is {fraction}; give (X, y), or a fraction between 0 and 1")
    held = round(float(fraction) * count)
    if not 0 < held < count:
        raise ValueError(f"validation is {fraction} of {count} rows, which leaves nothing on one side")
    return held


def split_rows(held: int, count: int, seed: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Row numbers for training and validation, drawn from a stream of their own."""
    order = epoch_order(seed, -1, count)
    return np.sort(order[held:]), np.sort(order[:held])


def epoch_order(seed: Any, epoch: int, count: int) -> np.ndarray[Any, Any]:
    """The permutation of epoch `epoch`, from its own child of the seed: no state to carry from epoch to epoch."""
    child = type(seed)(entropy=seed.entropy, spawn_key=(*seed.spawn_key, _ORDERS, epoch + 1))
    return np.random.default_rng(child).permutation(count)


def memory_advice(device: Device, batch_size: int) -> AbstractContextManager[None]:
    """A context in which running out of memory says what to change."""
    advice = f"use a smaller batch_size than {batch_size}, a smaller dtype (float32, not float64) or another device"
    return explained_memory(device, advice)
