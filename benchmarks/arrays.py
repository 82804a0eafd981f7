"""Contestants on NumPy and CuPy arrays: this package, the textbook, and the limit.

What a contestant is: `layer(X, W, b, dZ)`, `forward(X, W, b)`, `step(parameters, X, y, lr)` and `optimizer(parameters,
gradients, lr)` take NumPy arrays, put them in place and return the call to be timed; the last two also return how to read
the parameters. What it cannot do it does not have. `seconds(call, repeats)` is the time of one call. Each is written as that
library's documentation would have it done at the least cost.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np

from .cases import DIGITS, Call, Host, Parameters, digits, first_weights


class _Arrays:
    """Where NumPy arrays, or CuPy arrays on one device, are and how time passes there."""

    def __init__(self, device: str) -> None:
        from anyarray_linear import select_device

        self.device = select_device(device)
        self.library: Any = import_module("numpy" if self.device.index is None else "cupy")
        self.version = f"{self.library.__name__} {self.library.__version__}"
        if self.device.index is not None:
            self.library.cuda.Device(self.device.index).use()

    def put(self, x: Host) -> Any:
        return self.library.array(x)

    def get(self, x: Any) -> Host:
        return np.asarray(x if self.device.index is None else self.library.asnumpy(x))

    def seconds(self, call: Call, repeats: int) -> float:
        if self.device.index is None:
            return by_clock(call, repeats)
        event = self.library.cuda.Event
        return by_events(call, repeats, event(), event(), self.library.cuda.get_elapsed_time)


def by_clock(call: Call, repeats: int) -> float:
    """Seconds per call, of calls that end when their work does."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def by_events(call: Call, repeats: int, start: Any, end: Any, milliseconds: Callable[[Any, Any], float]) -> float:
    """Seconds per call on the GPU's own clock: from before the first kernel to after the last."""
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return milliseconds(start, end) / 1e3 / repeats


class _Package(_Arrays):
    """What is common to the ways in which this package is used."""

    def model(self, parameters: Parameters) -> tuple[Any, Call]:
        """A network with ReLU between its layers, and how to read its parameters."""
        from anyarray_linear import Linear, ReLU, Sequential

        layers = [Linear.from_arrays(self.put(W), self.put(b)) for W, b in parameters]
        model = Sequential(*[each for layer in layers for each in (layer, ReLU())][:-1])
        return model, lambda: [(layer.W, layer.b) for layer in layers]


class Ours(_Package):
    """This package, by its public interface; a training step is a `TrainingStep`."""

    def layer(self, X: Host, W: Host, b: Host, dZ: Host) -> Call:
        from anyarray_linear import Linear

        layer = Linear.from_arrays(self.put(W), self.put(b))
        X, dZ = self.put(X), self.put(dZ)

        def call() -> Any:
            Z, cache = layer.forward(X)
            dX = layer.backward(dZ, cache)
            return Z, dX, layer.dW, layer.db

        return call

    def forward(self, X: Host, W: Host, b: Host) -> Call:
        from anyarray_linear import Linear

        layer, X = Linear.from_arrays(self.put(W), self.put(b)), self.put(X)
        return lambda: (layer(X),)

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        from anyarray_linear import Adam, SoftmaxCrossEntropy, TrainingStep

        model, read = self.model(parameters)
        step = TrainingStep(model, SoftmaxCrossEntropy(), Adam(lr))
        X, y = self.put(X), self.put(y)
        self.how = lambda: step.how
        return lambda: step(X, y), read

    def optimizer(self, parameters: Parameters, gradients: Parameters, lr: float) -> tuple[Call, Call]:
        from anyarray_linear import Adam

        (model, read), optimizer = self.model(parameters), Adam(lr)
        each = [self.put(g) for pair in gradients for g in pair]  # dW0, db0, dW1, db1, ...
        given = dict(zip(model.parameters(), each, strict=True))
        return lambda: optimizer.step(model, given), read

    def digits(self, seed: int) -> tuple[float, float]:
        from anyarray_linear import Adam, SoftmaxCrossEntropy, evaluate, fit

        X, y, X_test, y_test = digits()
        loss = SoftmaxCrossEntropy()
        start = time.perf_counter()
        model, _ = self.model(first_weights(seed))
        chosen = {name: DIGITS[name] for name in ("epochs", "batch_size")}
        fit(model, X, y, loss=loss, optimizer=Adam(DIGITS["lr"]), seed=seed, progress=False, **chosen)
        self.device.synchronize()
        seconds = time.perf_counter() - start
        return seconds, evaluate(model, X_test, y_test, loss=loss)["accuracy"]


class ByHand(_Package):
    """This package again, its training step written out as a reader of the tutorial would."""

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        from anyarray_linear import Adam, SoftmaxCrossEntropy

        (model, read), loss, optimizer = self.model(parameters), SoftmaxCrossEntropy(), Adam(lr)
        X, y = self.put(X), self.put(y)

        def call() -> Any:
            Z, caches = model.forward(X)
            value, cache = loss.forward(Z, y)
            _, grads = model.gradients(loss.backward(cache), caches, needs_dX=False)
            optimizer.step(model, grads)
            return value

        return call, read


class Plain(_Arrays):
    """The textbook formulas, an expression each, in NumPy; on CUDA, the same in CuPy."""

    def layer(self, X: Host, W: Host, b: Host, dZ: Host) -> Call:
        X, W, b, dZ = map(self.put, (X, W, b, dZ))
        return lambda: (affine(X, W, b), *affine_gradients(dZ, X, W))

    def forward(self, X: Host, W: Host, b: Host) -> Call:
        X, W, b = map(self.put, (X, W, b))
        return lambda: (affine(X, W, b),)  # with three axes, a batched product

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        xp = self.library
        p = [self.put(x) for pair in parameters for x in pair]  # W0, b0, W1, b1, ...
        X, y, rows = self.put(X), self.put(y), xp.arange(len(X))
        update, last = _adam(xp, p, lr), len(p) - 2

        def call() -> Any:
            inputs, A = [], X
            for i in range(0, len(p), 2):
                inputs.append(A)
                Z = affine(A, p[i], p[i + 1])
                A = Z if i == last else xp.maximum(Z, 0)
            E = xp.exp(A - A.max(axis=1, keepdims=True))
            P = E / E.sum(axis=1, keepdims=True)
            loss = -xp.log(P[rows, y]).mean()
            P[rows, y] -= 1
            dZ, g = P / len(X), list(p)
            for i in range(last, -2, -2):
                dX, g[i], g[i + 1] = affine_gradients(dZ, inputs[i // 2], p[i])
                dZ = dX * (inputs[i // 2] > 0) if i else None
            update(g)
            return loss

        return call, lambda: list(zip(p[::2], p[1::2], strict=True))

    def optimizer(self, parameters: Parameters, gradients: Parameters, lr: float) -> tuple[Call, Call]:
        p, g = ([self.put(x) for pair in pairs for x in pair] for pairs in (parameters, gradients))
        update = _adam(self.library, p, lr)
        return lambda: update(g), lambda: list(zip(p[::2], p[1::2], strict=True))


def _adam(xp: Any, p: list[Any], lr: float) -> Callable[[list[Any]], None]:
    """The rule as its authors write it: an update of the list `p` by a list of gradients."""
    m, v = [xp.zeros_like(x) for x in p], [xp.zeros_like(x) for x in p]
    t = 0

    def update(g: list[Any]) -> None:
        nonlocal t
        t += 1
        for i in range(len(p)):
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2
            p[i] = p[i] - lr * (m[i] / (1 - 0.9**t)) / (xp.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)

    return update


def affine(X: Any, W: Any, b: Any) -> Any:
    return X @ W.T + b


def affine_gradients(dZ: Any, X: Any, W: Any) -> tuple[Any, Any, Any]:
    return dZ @ W, dZ.T @ X, dZ.sum(axis=0, keepdims=True)


class Limit(_Arrays):
    """Only the products, into memory that is there already, or only copies; `roofs` is what the machine can do at most."""

    def layer(self, X: Host, W: Host, b: Host, dZ: Host) -> Call:
        X, W, dZ = map(self.put, (X, W, dZ))
        Z, dW, dX = map(self.library.empty_like, (dZ, W, X))
        matmul = self.library.matmul  # NumPy's dot would fill the output with zeros first

        def call() -> None:
            matmul(X, W.T, out=Z)
            matmul(dZ, W, out=dX)
            matmul(dZ.T, X, out=dW)

        return call

    def forward(self, X: Host, W: Host, b: Host) -> Call:
        X, W = self.put(X.reshape(-1, X.shape[-1])), self.put(W)
        Z = self.library.empty((len(X), len(W)), dtype=W.dtype)
        return lambda: self.library.matmul(X, W.T, out=Z)

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        matmul, empty_like = self.library.matmul, self.library.empty_like
        weights = [self.put(W) for W, _ in parameters]
        outputs = [self.put(np.ones((len(X), len(W)), dtype=np.float32)) for W in weights]
        inputs = [self.put(X), *outputs[:-1]]
        dZs, dWs = list(map(empty_like, outputs)), list(map(empty_like, weights))
        dZs[-1][...] = 1

        def call() -> None:
            for A, W, Z in zip(inputs, weights, outputs, strict=True):
                matmul(A, W.T, out=Z)
            for i in reversed(range(len(weights))):
                matmul(dZs[i].T, inputs[i], out=dWs[i])
                if i:
                    matmul(dZs[i], weights[i], out=dZs[i - 1])

        return call, list

    def optimizer(self, parameters: Parameters, gradients: Parameters, lr: float) -> tuple[Call, Call]:
        count = sum(x.size for pair in parameters for x in pair)
        arrays = [self.library.ones(count, dtype=np.float32) for _ in range(14)]
        copies = [self._copied(*pair) for pair in zip(arrays[::2], arrays[1::2], strict=True)]
        return lambda: [copy() for copy in copies], list

    def _copied(self, target: Any, source: Any) -> Call:
        """The call that copies a large array: on all cores, or by the device."""
        if self.device.index is not None or self.cores == 1:
            return lambda: self.library.copyto(target, source)
        pairs = list(zip(np.array_split(target, self.cores), np.array_split(source, self.cores), strict=True))
        return lambda: list(self.pool.map(lambda pair: np.copyto(*pair), pairs))

    @functools.cached_property
    def cores(self) -> int:
        from anyarray_linear.arrays.cores import usable_cores

        return len(usable_cores())

    @functools.cached_property
    def pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.cores)

    def roofs(self, quick: bool) -> dict[str, float]:
        """The rate of a large product, in flop/s, and of a copy that no cache holds, in bytes/s read and written."""
        size = 512 if quick else 1024 if self.device.index is None else 8192
        A = self.library.ones((size, size), dtype=np.float32)
        C = self.library.empty_like(A)
        product = self._best(lambda: self.library.matmul(A, A, out=C), quick)
        source = self.library.ones(2**20 if quick else 2**26, dtype=np.float32)
        target = self.library.zeros_like(source)
        copy = self._best(self._copied(target, source), quick)
        return {"flops_per_second": 2 * size**3 / product, "bytes_per_second": 2 * source.nbytes / copy}

    def _best(self, call: Call, quick: bool) -> float:
        call()
        return min(self.seconds(call, 1) for _ in range(3 if quick else 10))


