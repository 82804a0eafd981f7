"""The host's time on the CuPy path: what a warm step costs before the device has anything to do, on the CPU stand-in, dry.

A dry run computes nothing, and everything else happens as always; a small step on a GPU waits for exactly that. The figure
is a ratio to what asking CuPy for the same 11 products and 10 kernels costs with nothing around them ("bare"), measured in
turns in the same process. How long a device would take it does not say.

Run as `python -m benchmarks.host`, it measures once and prints JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from .cases import LR, Call, Parameters, drawn
from .race import summary

SIZES, BATCH, STEPS = (64, 128, 64, 10), 64, 50
"""The model, and how many steps one epoch of `fit` has."""
WHAT = {
    "bare": "11 products and 10 kernels, nothing around them",
    "hand": "training step by hand",
    "step": "TrainingStep",
    "fit": "a step inside fit, data on the device",
}
ROUNDS, CALLS = 5, 100

_KERNEL = 'extern "C" __global__ void nothing(float* x, int n) { }'


def measure() -> dict[str, Any]:
    """Seconds of each of `WHAT`, and their ratios to bare."""
    import cupy

    from .worker import CONTESTANTS

    case = {"kind": "step", "batch": [BATCH], "sizes": list(SIZES)}
    inputs = drawn(case)
    calls: dict[str, Callable[[], float]] = {"bare": _by_call(_bare(cupy, **inputs))}
    left_out: dict[str, str] = {}
    for name, contestant in (("hand", "hand"), ("step", "ours")):
        try:
            calls[name] = _by_call(CONTESTANTS[contestant]("cuda:0").step(**inputs, lr=LR)[0])
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are measured
            left_out[name] = f"{type(error).__name__}: {error}"
    calls["fit"] = _fit(CONTESTANTS["ours"]("cuda:0"), inputs["parameters"])
    for call in calls.values():
        call()
    rounds = [{name: call() for name, call in calls.items()} for _ in range(ROUNDS)]
    seconds = {name: summary([each[name] for each in rounds]) for name in calls}
    ratio = {name: summary([each[name] / each["bare"] for each in rounds])["median"] for name in calls}
    return {"seconds": {name: each["median"] for name, each in seconds.items()}, "ratios": ratio, "left_out": left_out}


def _by_call(call: Call) -> Callable[[], float]:
    """The seconds of one call: the lower quartile of many, since a disturbance only ever adds time."""
    from cupy_backends.cpu_counters import dry

    def seconds() -> float:
        times = []
        for _ in range(3):
            call()
        with dry():
            for _ in range(CALLS):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        return float(np.quantile(times, 0.25))

    return seconds


def _bare(cupy: Any, parameters: Parameters, X: Any, y: Any) -> Call:
    """For each layer `Z`, `dW` and `db`, for all but the first `dX`; ten kernels for what is between them."""
    weights = [cupy.asarray(W) for W, _ in parameters]
    outputs = [cupy.zeros((BATCH, len(W)), dtype="float32") for W in weights]
    inputs = [cupy.asarray(X), *outputs[:-1]]
    ones = cupy.ones((1, BATCH), dtype="float32")
    products = [(A, W.T) for A, W in zip(inputs, weights, strict=True)]
    products += [(dZ.T, A) for dZ, A in zip(outputs, inputs, strict=True)]
    products += [(ones, dZ) for dZ in outputs]
    products += [(dZ, W) for dZ, W in zip(outputs[1:], weights[1:], strict=True)]
    kernel, Z = cupy.RawKernel(_KERNEL, "nothing"), outputs[0]
    grid, block, arguments = (64,), (128,), (Z, np.int32(Z.size))

    def call() -> None:
        for A, W in products:
            A @ W
        for _ in range(10):
            kernel(grid, block, arguments)

    assert len(products) == 11
    return call


class _Watch:
    """The stop flag of a `fit`, which asks it after each step: from the third step of an epoch to its last but
    one it is dry.

    `fit` looks at its data before it begins, and at losses and weights after each epoch: these are computed.
    """

    def __init__(self) -> None:
        self.step, self.stack, self.seconds = 0, ExitStack(), []

    def is_set(self) -> bool:
        """Never."""
        from cupy_backends.cpu_counters import dry

        self.step += 1
        if self.step == 3:  # the first two steps of a training may compare what they compute
            self.stack.enter_context(dry())
            self.start = time.perf_counter()
        elif self.step == STEPS - 1:
            self.seconds.append((time.perf_counter() - self.start) / (STEPS - 4))
            self.stack.close()
        return False

    def next_epoch(self, model: Any, row: Any) -> None:
        """A callback: counts from the start again."""
        self.step = 0


def _fit(ours: Any, parameters: Parameters) -> Callable[[], float]:
    """The seconds of a step in a warm epoch."""
    from anyarray_linear import Adam, SoftmaxCrossEntropy, fit

    rng, rows = np.random.default_rng(0), BATCH * STEPS
    X = ours.put(rng.standard_normal((rows, SIZES[0]), dtype=np.float32))
    y = ours.put(rng.integers(SIZES[-1], size=rows))

    def seconds() -> float:
        (model, _), watch = ours.model(parameters), _Watch()
        fit(
            model, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(LR), epochs=4, batch_size=BATCH, progress=False,
            callbacks=[watch.next_epoch], stop=watch,
        )  # fmt: skip
        return min(watch.seconds)

    return seconds


if __name__ == "__main__":
    print(json.dumps(measure()))
