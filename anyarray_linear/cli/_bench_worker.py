"""One implementation in a process of its own, for `bench`: it prepares a case, hands out its results, and times bursts.

Run as `python -m anyarray_linear.cli._bench_worker NAME DEVICE`. A request is a line of JSON on standard input, and its
answer a line of JSON on standard output. Every process draws the same inputs from the same seed, so none are passed.

What an implementation is: `layer(X, W, b, dZ)`, `forward(X, W, b)` and `step(parameters, X, y, lr)` take NumPy arrays, put
them in place and return the call to be timed; `step` also returns how to read the parameters. `seconds(call, repeats)` is
the time of one call. Each is written as that library's documentation would have it done at the least cost.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np

Host = np.ndarray[Any, Any]
Call = Callable[[], Any]
Parameters = list[tuple[Host, Host]]
"""`W` and `b` of each layer."""

BURSTS = 3
"""Bursts per request, of which the fastest counts."""
LR = 1e-6
"""The learning rate of timed steps: thousands of them on one batch must not train units to death, whose moments would
decay to denormal numbers and make every implementation slow in its own way."""
CHECKED_LR, CHECKED_STEPS = 1e-3, 3
DIGITS: dict[str, Any] = {"hidden": 64, "batch_size": 64, "epochs": 20, "lr": 2e-3}


def drawn(case: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a case, float32 on the host: the arguments of the implementations' method of its kind."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> Host:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def parameters(n_in: int, n_out: int) -> tuple[Host, Host]:
        return normal(n_out, n_in, scale=math.sqrt(2 / n_in)), normal(1, n_out, scale=0.1)

    batch, sizes = case["batch"], case["sizes"]
    X = normal(*batch, sizes[0])
    if case["kind"] == "step":
        layers = [parameters(*pair) for pair in pairwise(sizes)]
        return {"parameters": layers, "X": X, "y": rng.integers(sizes[-1], size=batch)}
    W, b = parameters(*sizes)
    inputs = {"X": X, "W": W, "b": b}
    return inputs if case["kind"] == "forward" else inputs | {"dZ": normal(*batch, sizes[1])}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Arrays:
    """Where NumPy arrays, or CuPy arrays on one device, are and how time passes there."""

    def __init__(self, device: str) -> None:
        from ..arrays.selection import select_device

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
        return _by_events(call, repeats, event(), event(), self.library.cuda.get_elapsed_time)


def by_clock(call: Call, repeats: int) -> float:
    """Seconds per call, of calls that end when their work does."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _by_events(call: Call, repeats: int, start: Any, end: Any, milliseconds: Callable[[Any, Any], float]) -> float:
    """Seconds per call on the GPU's own clock: from before the first kernel to after the last."""
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return milliseconds(start, end) / 1e3 / repeats


class Ours(_Arrays):
    """This package, by its public interface."""

    def layer(self, X: Host, W: Host, b: Host, dZ: Host) -> Call:
        from ..linear import Linear

        layer = Linear.from_arrays(self.put(W), self.put(b))
        X, dZ = self.put(X), self.put(dZ)

        def call() -> Any:
            Z, cache = layer.forward(X)
            dX = layer.backward(dZ, cache)
            return Z, dX, layer.dW, layer.db

        return call

    def forward(self, X: Host, W: Host, b: Host) -> Call:
        from ..linear import Linear

        layer, X = Linear.from_arrays(self.put(W), self.put(b)), self.put(X)
        return lambda: (layer(X),)

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        from .. import Adam, Linear, ReLU, Sequential, SoftmaxCrossEntropy

        layers = [Linear.from_arrays(self.put(W), self.put(b)) for W, b in parameters]
        model = Sequential(*[each for layer in layers for each in (layer, ReLU())][:-1])
        loss, optimizer = SoftmaxCrossEntropy(), Adam(lr)
        X, y = self.put(X), self.put(y)

        def call() -> Any:
            Z, caches = model.forward(X)
            value, cache = loss.forward(Z, y)
            _, grads = model.gradients(loss.backward(cache), caches, needs_dX=False)
            optimizer.step(model, grads)
            return value

        return call, lambda: [(layer.W, layer.b) for layer in layers]

    def digits(self, seed: int) -> tuple[float, float]:
        from .. import Adam, Linear, ReLU, Sequential, SoftmaxCrossEntropy, evaluate, fit

        X, y, X_test, y_test = _digits()
        loss, rng = SoftmaxCrossEntropy(), np.random.default_rng(seed)
        options: dict[str, Any] = {"dtype": "float32", "device": self.device, "seed": rng}
        start = time.perf_counter()
        model = Sequential(Linear(64, DIGITS["hidden"], **options), ReLU(), Linear(DIGITS["hidden"], 10, **options))
        chosen = {name: DIGITS[name] for name in ("epochs", "batch_size")}
        fit(model, X, y, loss=loss, optimizer=Adam(DIGITS["lr"]), seed=seed, progress=False, **chosen)
        self.device.synchronize()
        seconds = time.perf_counter() - start
        return seconds, evaluate(model, X_test, y_test, loss=loss)["accuracy"]


class Plain(_Arrays):
    """The textbook formulas, an expression each, in NumPy; on CUDA, the same in CuPy."""

    def layer(self, X: Host, W: Host, b: Host, dZ: Host) -> Call:
        X, W, b, dZ = map(self.put, (X, W, b, dZ))
        return lambda: (_affine(X, W, b), *_affine_gradients(dZ, X, W))

    def forward(self, X: Host, W: Host, b: Host) -> Call:
        X, W, b = map(self.put, (X, W, b))
        return lambda: (_affine(X, W, b),)  # with three axes, a batched product

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        xp = self.library
        p = [self.put(x) for pair in parameters for x in pair]  # W0, b0, W1, b1, ...
        m, v = [xp.zeros_like(x) for x in p], [xp.zeros_like(x) for x in p]
        X, y, rows, t = self.put(X), self.put(y), xp.arange(len(X)), 0
        last = len(p) - 2

        def call() -> Any:
            nonlocal t
            inputs, A = [], X
            for i in range(0, len(p), 2):
                inputs.append(A)
                Z = _affine(A, p[i], p[i + 1])
                A = Z if i == last else xp.maximum(Z, 0)
            E = xp.exp(A - A.max(axis=1, keepdims=True))
            P = E / E.sum(axis=1, keepdims=True)
            loss = -xp.log(P[rows, y]).mean()
            P[rows, y] -= 1
            dZ, g = P / len(X), list(p)
            for i in range(last, -2, -2):
                dX, g[i], g[i + 1] = _affine_gradients(dZ, inputs[i // 2], p[i])
                dZ = dX * (inputs[i // 2] > 0) if i else None
            t += 1
            for i in range(len(p)):
                m[i] = 0.9 * m[i] + 0.1 * g[i]
                v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2
                p[i] = p[i] - lr * (m[i] / (1 - 0.9**t)) / (xp.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
            return loss

        return call, lambda: list(zip(p[::2], p[1::2], strict=True))


def _affine(X: Any, W: Any, b: Any) -> Any:
    return X @ W.T + b


def _affine_gradients(dZ: Any, X: Any, W: Any) -> tuple[Any, Any, Any]:
    return dZ @ W, dZ.T @ X, dZ.sum(axis=0, keepdims=True)


class Limit(_Arrays):
    """Only the products, into memory that is there already; `roofs` measures what the machine can do at most."""

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

    def roofs(self, quick: bool) -> dict[str, float]:
        """The rate of a large product, in flop/s, and of a copy that no cache holds, in bytes/s read and written."""
        size = 512 if quick else 1024 if self.device.index is None else 8192
        A = self.library.ones((size, size), dtype=np.float32)
        C = self.library.empty_like(A)
        product = self._best(lambda: self.library.matmul(A, A, out=C), quick)
        source = self.library.ones(2**20 if quick else 2**26, dtype=np.float32)
        target = self.library.zeros_like(source)
        if self.device.index is None:
            pairs = list(zip(np.array_split(target, cores()), np.array_split(source, cores()), strict=True))
            with ThreadPoolExecutor(cores()) as pool:
                copy = self._best(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)), quick)
        else:
            copy = self._best(lambda: self.library.copyto(target, source), quick)
        return {"flops_per_second": 2 * size**3 / product, "bytes_per_second": 2 * source.nbytes / copy}

    def _best(self, call: Call, quick: bool) -> float:
        call()
        return min(self.seconds(call, 1) for _ in range(3 if quick else 10))


class Torch:
    """PyTorch, eager: `nn.Linear`, `CrossEntropyLoss`, `Adam(fused=True)`."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.version = torch, f"torch {torch.__version__}"
        self.is_cuda = device.startswith("cuda")
        if self.is_cuda and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch has no usable CUDA")
        self.device = torch.device(device)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)

    def put(self, x: Host) -> Any:
        return self.torch.tensor(x, device=self.device)

    def get(self, x: Any) -> Host:
        return np.asarray(x.detach().cpu().numpy())

    def seconds(self, call: Call, repeats: int) -> float:
        if not self.is_cuda:
            return by_clock(call, repeats)
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        return _by_events(call, repeats, start, end, lambda start, end: start.elapsed_time(end))

    def _linear(self, W: Host, b: Host) -> Any:
        layer = self.torch.nn.Linear(W.shape[1], W.shape[0], device=self.device)
        layer.load_state_dict({"weight": self.put(W), "bias": self.put(b[0])})
        return layer

    def layer(self, X: Host, W: Host, b: Host, dZ: Host) -> Call:
        layer, X, dZ = self._linear(W, b), self.put(X).requires_grad_(), self.put(dZ)
        wanted = (X, layer.weight, layer.bias)

        def call() -> Any:
            Z = layer(X)
            return Z, *self.torch.autograd.grad(Z, wanted, dZ)

        return call

    def forward(self, X: Host, W: Host, b: Host) -> Call:
        layer, X = self._linear(W, b), self.put(X)

        def call() -> Any:
            with self.torch.inference_mode():
                return (layer(X),)

        return call

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        nn = self.torch.nn
        layers = [self._linear(W, b) for W, b in parameters]
        model = nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())][:-1])
        loss, optimizer = nn.CrossEntropyLoss(), self.torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        X, y = self.put(X), self.put(y)

        def call() -> Any:
            optimizer.zero_grad()
            value = loss(model(X), y)
            value.backward()
            optimizer.step()
            return value

        return call, lambda: [(layer.weight, layer.bias) for layer in layers]


class Jax:
    """JAX: forward and backward as one jitted function, and the whole step as one, whose buffers are donated.

    Steps are waited for at the end of a burst, as a training loop would: each needs the one before it, and JAX prepares the
    next while one runs. Layers, which need nothing of each other, are waited for one by one, or they would run side by side.
    """

    def __init__(self, device: str) -> None:
        import jax

        if device != "cpu":
            raise RuntimeError("JAX is compared on the CPU only")
        jax.config.update("jax_platforms", "cpu")  # or it would take most of a card's memory where it sees one
        self.jax, self.version = jax, f"jax {jax.__version__}"
        self.cpu = jax.devices("cpu")[0]

    def seconds(self, call: Call, repeats: int) -> float:
        def burst() -> None:
            for _ in range(repeats):
                last = call()
            self.jax.block_until_ready(last)

        return by_clock(burst, 1) / repeats

    def put(self, x: Any) -> Any:
        return self.jax.device_put(x, self.cpu)

    def get(self, x: Any) -> Host:
        return np.asarray(x)

    def layer(self, X: Host, W: Host, b: Host, dZ: Host) -> Call:
        @self.jax.jit  # type: ignore[untyped-decorator]
        def both(X: Any, W: Any, b: Any, dZ: Any) -> Any:
            Z, backward = self.jax.vjp(_affine, X, W, b)
            return Z, *backward(dZ)

        inputs = self.put((X, W, b, dZ))
        return lambda: self.jax.block_until_ready(both(*inputs))

    def forward(self, X: Host, W: Host, b: Host) -> Call:
        affine, inputs = self.jax.jit(_affine), self.put((X, W, b))
        return lambda: self.jax.block_until_ready((affine(*inputs),))

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        jax, jnp = self.jax, self.jax.numpy
        tree = jax.tree_util.tree_map

        def loss(parameters: Any, X: Any, y: Any) -> Any:
            for W, b in parameters[:-1]:
                X = jax.nn.relu(_affine(X, W, b))
            logits = jax.nn.log_softmax(_affine(X, *parameters[-1]))
            return -jnp.take_along_axis(logits, y[:, None], axis=1).mean()

        def update(state: Any, X: Any, y: Any) -> Any:
            p, m, v, t = state
            value, g = jax.value_and_grad(loss)(p, X, y)
            t = t + 1
            m = tree(lambda m, g: 0.9 * m + 0.1 * g, m, g)
            v = tree(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
            scale, root = 1 / (1 - 0.9**t), 1 / (1 - 0.999**t)
            p = tree(lambda p, m, v: p - lr * (m * scale) / (jnp.sqrt(v * root) + 1e-8), p, m, v)
            return value, (p, m, v, t)

        jitted = jax.jit(update, donate_argnums=0)
        p, X, y = self.put([tuple(map(np.copy, pair)) for pair in parameters]), self.put(X), self.put(y.astype(np.int32))
        state = p, tree(jnp.zeros_like, p), tree(jnp.zeros_like, p), self.put(np.float32(0))

        def call() -> Any:
            nonlocal state
            value, state = jitted(state, X, y)
            return value

        return call, lambda: state[0]


class Thinc:
    """thinc: `Linear`, and a chain of `Relu` and `Softmax` with its own loss and `Adam`.

    Its layers add to their stored gradients; in the layer cases nobody sets them back to zero.
    """

    seconds = staticmethod(by_clock)

    def __init__(self, device: str) -> None:
        if device != "cpu":
            raise RuntimeError("thinc is compared on the CPU only")
        self.api: Any = import_module("thinc.api")
        self.version = f"thinc {import_module('thinc').__version__}"

    def get(self, x: Any) -> Host:
        return np.asarray(x)

    def _filled(self, layer: Any, W: Host, b: Host) -> Any:
        layer.initialize()
        layer.set_param("W", W.copy())
        layer.set_param("b", b[0].copy())
        return layer

    def layer(self, X: Host, W: Host, b: Host, dZ: Host) -> Call:
        layer = self._filled(self.api.Linear(*W.shape), W, b)

        def call() -> Any:
            Z, backward = layer(X, is_train=True)
            return Z, backward(dZ), layer.get_grad("W"), layer.get_grad("b")

        return call

    def forward(self, X: Host, W: Host, b: Host) -> Call:
        raise RuntimeError("thinc's layers take two axes only")

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        kinds = [self.api.Relu] * (len(parameters) - 1) + [self.api.Softmax]
        layers = [self._filled(kind(*W.shape), W, b) for kind, (W, b) in zip(kinds, parameters, strict=True)]
        model = self.api.chain(*layers)
        loss = self.api.CategoricalCrossentropy()
        optimizer = self.api.Adam(lr, L2=0.0, grad_clip=0.0, use_averages=False)

        def call() -> Any:
            P, backward = model.begin_update(X)
            dZ, _ = loss(P, y)
            backward(dZ)
            model.finish_update(optimizer)
            return P

        # what it calls the loss is a sum of squares, so the cross-entropy is read off the probabilities for the check
        self.loss = lambda P: -np.log(P[np.arange(len(y)), y]).mean()
        return call, lambda: [(layer.get_param("W"), layer.get_param("b")) for layer in layers]


class Sklearn:
    """scikit-learn's `MLPClassifier`, which is a whole training and nothing smaller."""

    def __init__(self, device: str) -> None:
        if device != "cpu":
            raise RuntimeError("scikit-learn computes on the CPU only")
        import sklearn
        import sklearn.neural_network

        self.sklearn, self.version = sklearn, f"scikit-learn {sklearn.__version__}"

    def digits(self, seed: int) -> tuple[float, float]:
        X, y, X_test, y_test = _digits()
        epochs = DIGITS["epochs"]
        model = self.sklearn.neural_network.MLPClassifier(
            (DIGITS["hidden"],), alpha=0.0, batch_size=DIGITS["batch_size"], learning_rate_init=DIGITS["lr"],
            max_iter=epochs, n_iter_no_change=epochs + 1, tol=0.0, random_state=seed,
        )  # fmt: skip
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that so many epochs are not convergence
            model.fit(X, y)
        seconds = time.perf_counter() - start
        assert model.n_iter_ == epochs
        return seconds, float(model.score(X_test, y_test))


def _digits() -> tuple[Host, Host, Host, Host]:
    from ..datasets import load_digits, split

    X, y, X_test, y_test = split(*load_digits(), seed=0)
    return X, y, X_test, y_test


IMPLEMENTATIONS: dict[str, type[Any]] = {
    "ours": Ours,
    "numpy": Plain,
    "torch": Torch,
    "jax": Jax,
    "thinc": Thinc,
    "sklearn": Sklearn,
    "limit": Limit,
}


class Server:
    """Answers requests about one implementation; between `prepare` and the next one it holds one case."""

    def __init__(self, implementation: Any) -> None:
        self.implementation = implementation
        self.call: Call = list
        self.repeats = 1

    def prepare(self, case: dict[str, Any], results: str | None, burst: float | None) -> dict[str, Any]:
        """Make a case ready; save what it computes to the file `results`; find how many calls last `burst` seconds."""
        self.call = list  # lets go of the last case's memory first
        made, inputs = getattr(self.implementation, case["kind"]), drawn(case)
        if results is not None:
            computed: dict[str, Any] = self._results(case, inputs)
            np.savez(results, **computed)
        self.call = made(**inputs, lr=LR)[0] if case["kind"] == "step" else made(**inputs)
        self.call()
        if burst is None:
            return {}
        self.repeats = 1
        while (took := self._fastest(2) * self.repeats) < burst:
            self.repeats = max(self.repeats + 1, min(10 * self.repeats, math.ceil(1.2 * self.repeats * burst / took)))
        return {"repeats": self.repeats}

    def _results(self, case: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Host]:
        get = self.implementation.get
        if case["kind"] != "step":
            results = getattr(self.implementation, case["kind"])(**inputs)()
            return {name: get(x) for name, x in zip(("Z", "dX", "dW", "db"), results, strict=False)}
        step, parameters = self.implementation.step(**inputs, lr=CHECKED_LR)
        loss = getattr(self.implementation, "loss", get)
        results = {"loss": np.asarray([float(loss(step())) for _ in range(CHECKED_STEPS)])}
        for i, (before, after) in enumerate(zip(inputs["parameters"], parameters(), strict=True)):
            for name, x, now in zip("Wb", before, after, strict=True):
                results[f"change of {i}.{name}"] = get(now).reshape(x.shape) - x
        return results

    def burst(self) -> dict[str, Any]:
        """Seconds per call: of several bursts the fastest, since a disturbance only ever adds time."""
        self.implementation.seconds(self.call, math.ceil(self.repeats / 4))  # threads and caches as in the midst of work
        return {"seconds": self._fastest(BURSTS)}

    def _fastest(self, bursts: int) -> float:
        seconds: Callable[[Call, int], float] = self.implementation.seconds
        return min(seconds(self.call, self.repeats) for _ in range(bursts))

    def count(self) -> dict[str, Any]:
        """What one call asks of the emulated device; only the CPU stand-in of CuPy can count."""
        count = import_module("cupy_backends.cpu_counters").count
        self.call()
        with count() as counted:
            self.call()
        return {name: int(getattr(counted, name)) for name in COUNTED}

    def digits(self, seed: int) -> dict[str, Any]:
        """A training of the digits from its first line to its last, and the accuracy on what was kept back."""
        seconds, accuracy = self.implementation.digits(seed)
        return {"seconds": seconds, "accuracy": accuracy}

    def roofs(self, quick: bool) -> dict[str, Any]:
        """What the machine can do."""
        found: dict[str, float] = self.implementation.roofs(quick)
        return found


COUNTED = ("launches", "library_calls", "allocations", "host_to_device", "device_to_host", "synchronizations")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve standard input until it ends."""
    name, device = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command that started this
    if sys.platform == "linux":  # or a killed command would leave its stopped processes behind
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    server: Any = None
    try:
        server = Server(IMPLEMENTATIONS[name](device))
        answer: dict[str, Any] = {"version": server.implementation.version}
    except Exception as error:  # noqa: BLE001 - a library may be broken in any way; the parent says how
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
