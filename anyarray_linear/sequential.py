"""The container: it runs layers in order, catches their caches, and hands them back in reverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, overload

from .arrays.checks import check_alike, describe
from .arrays.place import Array, computing_on
from .linear import Linear
from .protocol import Layer, is_trained, join, leaves, parameters, store_gradients
from .summary import summary


class _Structure(NamedTuple):
    """Where the leaves of a container are, and what they are called."""

    positions: list[tuple[str, Any]]
    """Every position that holds a leaf, depth first, repeats included."""
    leaves: list[tuple[str, Any]]
    """Each distinct leaf once, under its first position."""
    routes: list[dict[str, str]]
    """For each layer, what the model calls the leaves that the layer calls so: `{"": "0"}` for a bare leaf."""


class Sequential:
    """Layers in a row: `Z` of one is `X` of the next. It is a layer too, so it nests.

    layers: anything with the methods of `Layer`. The same layer *object* at several positions, at any depth, is shared: its
    gradients are summed within one pass, and it has one name, that of its first position.

    Indexing gives a layer, slicing a `Sequential` of the same layers.

    Raises `TypeError` for something that is no layer.

    >>> import numpy as np
    >>> from anyarray_linear import ReLU
    >>> model = Sequential(Linear(3, 4, seed=0), ReLU(), Linear(4, 2, seed=1))
    >>> Z, caches = model.forward(np.ones((5, 3)))
    >>> dX = model.backward(np.ones((5, 2)), caches)
    >>> list(model.parameters()), dX.shape
    (['0.W', '0.b', '2.W', '2.b'], (5, 3))
    """

    def __init__(self, *layers: Layer) -> None:
        for i, layer in enumerate(layers):
            if isinstance(layer, type) or not isinstance(layer, Layer):
                what = f"the class {layer.__name__}" if isinstance(layer, type) else describe(layer)
                raise TypeError(
                    f"layer {i} is {what}, not a layer; give layer objects: Sequential(Linear(3, 4), ReLU())"
                )
        self.layers = layers
        self._structure: _Structure | None = None
        if all(isinstance(layer, Sequential) or not hasattr(layer, "leaves") for layer in layers):
            self._structure = self._look()  # a container of the user's own may change; one of ours does not

    def forward(self, X: Array) -> tuple[Array, list[Any]]:
        """`(Z, caches)`, one cache per layer."""
        caches: list[Any] = []
        try:
            for layer in self.layers:
                X, cache = layer.forward(X)
                caches.append(cache)
        except (TypeError, ValueError) as error:
            self._explain(len(caches), error)
            raise
        return X, caches

    def gradients(
        self, dZ: Array, caches: Sequence[Any], *, needs_dX: bool = True
    ) -> tuple[Array | None, dict[str, Array]]:
        """`(dX, {"0.W": ..., "0.b": ..., "2.W": ...})`, storing nothing; a shared layer's gradients are summed.

        Raises what the layers raise, and `ValueError` for caches that are not one for each layer.
        """
        if not (type(caches) is list or isinstance(caches, Sequence)) or len(caches) != len(self.layers):
            count = len(caches) if isinstance(caches, Sequence) else type(caches).__name__
            raise ValueError(
                f"caches is {count} for {len(self.layers)} layers; pass the second result of this model's forward"
            )
        # nobody asks for the gradient that would flow out of the first layer with parameters to train
        first = 0 if needs_dX else next((i for i, layer in enumerate(self.layers) if is_trained(layer)), len(caches))
        routes = self._names().routes
        total: dict[str, Array] = {}  # from the last layer to the first
        dX: Array | None = dZ
        for i in range(len(self.layers) - 1, first - 1, -1):
            dX, gradients = self.layers[i].gradients(dX, caches[i], needs_dX=needs_dX or i > first)
            if not getattr(self.layers[i], "trainable", True):
                continue  # a user's layer may form them all the same
            for path, gradient in reversed(gradients.items()):
                leaf, _, p = path.rpartition(".")
                name = f"{routes[i][leaf]}.{p}"
                if name in total:  # a shared layer's, of a later position
                    with computing_on(gradient):
                        gradient = gradient + total.pop(name)
                total[name] = gradient
        return dX if needs_dX else None, dict(reversed(total.items()))

    def backward(
        self, dZ: Array, caches: Sequence[Any], *, accumulate: bool = False, needs_dX: bool = True
    ) -> Array | None:
        """`dX`, having stored every parameter's gradient on its layer, or added to it with `accumulate`."""
        dX, gradients = self.gradients(dZ, caches, needs_dX=needs_dX)
        store_gradients(self, gradients, accumulate=accumulate)
        return dX

    def parameters(self) -> dict[str, Array]:
        """`{"0.W": W, "0.b": b, ...}`, a shared layer's once."""
        return parameters(self)

    @property
    def trainable(self) -> bool:
        """Whether any parameter in here is trained; setting it sets it for every layer."""
        return any(leaf.parameters() and getattr(leaf, "trainable", True) for _, leaf in self.leaves())

    @trainable.setter
    def trainable(self, value: bool) -> None:
        for _, leaf in self.leaves():
            if leaf.parameters():
                leaf.trainable = value

    def _names(self) -> _Structure:
        return self._structure or self._look()

    def _look(self) -> _Structure:
        inner = [layer.positions() if isinstance(layer, Sequential) else leaves(layer) for layer in self.layers]
        positions = [(join(str(i), path), leaf) for i, own in enumerate(inner) for path, leaf in own]
        first: dict[int, str] = {}  # by the object: the first position that holds it
        for path, leaf in positions:
            first.setdefault(id(leaf), path)
        own_leaves = [(path, leaf) for path, leaf in positions if first[id(leaf)] == path]
        return _Structure(positions, own_leaves, [{path: first[id(leaf)] for path, leaf in own} for own in inner])

    def positions(self) -> list[tuple[str, Any]]:
        """Every position that holds a leaf, depth first, repeats included."""
        return self._names().positions

    def leaves(self) -> list[tuple[str, Any]]:
        """`[(name, layer), ...]`: each distinct layer object once, depth first, under its first position."""
        return list(self._names().leaves)

    def summary(self) -> str:
        """A table of the layers as text: outputs, parameters, bytes and devices.

        >>> from anyarray_linear import Dropout, ReLU
        >>> first, last = Linear(64, 32, dtype="float32"), Linear(32, 10, dtype="float32")
        >>> print(Sequential(first, ReLU(), Dropout(0.2), last).summary())
        layer           output     parameters  bytes  device
        0      Linear   (..., 32)       2,080  8,320  cpu
        1      ReLU     (..., 32)
        2      Dropout  (..., 32)
        3      Linear   (..., 10)         330  1,320  cpu
        2,410 parameters; 9,640 bytes
        """
        return summary(self)

    def collapse(self) -> Sequential:
        """The same function with each run of adjacent `Linear` layers merged into one.

        A stack of linear layers is one linear layer: `(X W1^T + b1) W2^T + b2 = X (W2 W1)^T + (b1 W2^T + b2)`. Nested
        containers are opened. This model is left as it is; layers that had nobody to merge with are copies of their own.
        """
        copies: dict[int, Any] = {}
        merged: list[Any] = []
        for _, leaf in self.positions():
            if merged and type(leaf) is Linear and type(merged[-1]) is Linear:
                merged[-1] = _merge(merged[-1], leaf)
            else:
                merged.append(copies.setdefault(id(leaf), leaf.to()))
        return Sequential(*merged)

    def to(self, device: Any = None, dtype: Any = None) -> Sequential:
        """A new model on another device or in another dtype; what was shared is shared there too."""
        return self._to(device, dtype, {})

    def _to(self, device: Any, dtype: Any, moved: dict[int, Any]) -> Sequential:
        def move(layer: Any) -> Any:
            if isinstance(layer, Sequential):
                return layer._to(device, dtype, moved)
            if id(layer) not in moved:
                moved[id(layer)] = layer.to(device, dtype)
            return moved[id(layer)]

        return Sequential(*map(move, self.layers))

    def __call__(self, X: Array) -> Array:
        """`Z` for inference: no caches."""
        done = 0
        try:
            for layer in self.layers:
                X = layer(X)
                done += 1
        except (TypeError, ValueError) as error:
            self._explain(done, error)
            raise
        return X

    def _explain(self, i: int, error: Exception) -> None:
        """Raise an error like that of layer `i` about its input, which also says which layer, and what came before it."""
        is_told = hasattr(error, "layer")  # by a container inside
        if type(error) not in (TypeError, ValueError) or (i == 0 and not is_told):
            return  # of the first layer, `X` is the caller's
        before = "" if is_told else f", {self.layers[i]!r:.60}, after layer {i - 1}, {self.layers[i - 1]!r:.60}"
        new = type(error)(f"in layer {i}{before}: {error}")
        new.layer = i  # type: ignore[attr-defined]
        raise new from error

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequential:
        if isinstance(index, slice):
            return Sequential(*self.layers[index])
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"


def _merge(first: Linear, second: Linear) -> Linear:
    """One layer that does what `first` and then `second` do."""
    check_alike("the first layer's W", first.W, "the second layer's W", second.W)
    W1, b1, W2, b2 = first.W, first.b, second.W, second.b
    with computing_on(W1):
        b = b2 if b1 is None else b1 @ W2.T if b2 is None else b1 @ W2.T + b2
        return Linear.from_arrays(W2 @ W1, b)
