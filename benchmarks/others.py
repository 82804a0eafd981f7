"""Contestants that are libraries of others: PyTorch, JAX, thinc, scikit-learn. `arrays.py` says what a contestant is."""

from __future__ import annotations

import time
import warnings
from importlib import import_module
from typing import Any

import numpy as np

from .arrays import affine, by_clock, by_events
from .cases import DIGITS, Call, Host, Parameters, digits


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
        return by_events(call, repeats, start, end, lambda start, end: start.elapsed_time(end))

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

    def optimizer(self, parameters: Parameters, gradients: Parameters, lr: float) -> tuple[Call, Call]:
        layers = [self._linear(W, b) for W, b in parameters]
        for layer, (dW, db) in zip(layers, gradients, strict=True):
            layer.weight.grad, layer.bias.grad = self.put(dW), self.put(db[0])
        each = [p for layer in layers for p in layer.parameters()]
        return self.torch.optim.Adam(each, lr=lr, fused=True).step, lambda: [(layer.weight, layer.bias) for layer in layers]


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
        self.place = jax.devices("cpu")[0]

    def seconds(self, call: Call, repeats: int) -> float:
        def burst() -> None:
            for _ in range(repeats):
                last = call()
            self.jax.block_until_ready(last)

        return by_clock(burst, 1) / repeats

    def put(self, x: Any) -> Any:
        return self.jax.device_put(x, self.place)

    def get(self, x: Any) -> Host:
        return np.asarray(x)

    def layer(self, X: Host, W: Host, b: Host, dZ: Host) -> Call:
        @self.jax.jit
        def both(X: Any, W: Any, b: Any, dZ: Any) -> Any:
            Z, backward = self.jax.vjp(affine, X, W, b)
            return Z, *backward(dZ)

        inputs = self.put((X, W, b, dZ))
        return lambda: self.jax.block_until_ready(both(*inputs))

    def forward(self, X: Host, W: Host, b: Host) -> Call:
        jitted, inputs = self.jax.jit(affine), self.put((X, W, b))
        return lambda: self.jax.block_until_ready((jitted(*inputs),))

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        jax, jnp = self.jax, self.jax.numpy

        def loss(parameters: Any, X: Any, y: Any) -> Any:
            for W, b in parameters[:-1]:
                X = jax.nn.relu(affine(X, W, b))
            logits = jax.nn.log_softmax(affine(X, *parameters[-1]))
            return -jnp.take_along_axis(logits, y[:, None], axis=1).mean()

        def update(state: Any, X: Any, y: Any) -> Any:
            value, g = jax.value_and_grad(loss)(state[0], X, y)
            return value, self._adam(state, g, lr)

        jitted = jax.jit(update, donate_argnums=0)
        state, X, y = self._start(parameters), self.put(X), self.put(y.astype(np.int32))

        def call() -> Any:
            nonlocal state
            value, state = jitted(state, X, y)
            return value

        return call, lambda: state[0]

    def optimizer(self, parameters: Parameters, gradients: Parameters, lr: float) -> tuple[Call, Call]:
        jitted = self.jax.jit(lambda state, g: self._adam(state, g, lr), donate_argnums=0)
        state, g = self._start(parameters), self.put(gradients)

        def call() -> Any:
            nonlocal state
            state = jitted(state, g)
            return state

        return call, lambda: state[0]

    def _start(self, parameters: Parameters) -> Any:
        """Parameters, two moments and the number of steps, of our own: they are donated."""
        p = self.put([tuple(map(np.copy, pair)) for pair in parameters])
        zeros = self.jax.tree_util.tree_map(self.jax.numpy.zeros_like, (p, p))
        return p, *zeros, self.put(np.float32(0))

    def _adam(self, state: Any, g: Any, lr: float) -> Any:
        jnp, tree = self.jax.numpy, self.jax.tree_util.tree_map
        p, m, v, t = state
        t = t + 1
        m = tree(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = tree(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
        scale, root = 1 / (1 - 0.9**t), 1 / (1 - 0.999**t)
        p = tree(lambda p, m, v: p - lr * (m * scale) / (jnp.sqrt(v * root) + 1e-8), p, m, v)
        return p, m, v, t


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
        X, y, X_test, y_test = digits()
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


