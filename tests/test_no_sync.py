"""No hidden sync: a training step on a GPU never waits for it, and copies nothing to the host.

Two witnesses: on any CuPy, every way by which Python reads a device array is blocked while a step runs; and the CPU stand-in
counts the copies and synchronisations that it is asked for.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from anyarray_linear import (
    GELU,
    SGD,
    Adam,
    AdamW,
    Linear,
    LossScale,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
    TrainingStep,
    fit,
)
from anyarray_linear.guard import Guard

READERS = ("__array__", "__bool__", "__complex__", "__float__", "__index__", "__int__", "get", "item", "tolist")

on_cuda = pytest.mark.parametrize("backend", ["cupy:0", "cupy:1"], indirect=True)
counted = pytest.mark.stand_in  # which counts copies and synchronisations
OPTIMIZERS = {
    "SGD": lambda: SGD(0.1),
    "SGD with everything": lambda: SGD(0.1, momentum=0.9, nesterov=True, weight_decay=1e-3, clip_norm=1.0),
    "Adam": lambda: Adam(weight_decay=1e-3),
    "AdamW clipped": lambda: AdamW(clip_norm=1.0),
}
LOSSES = {"class ids": SoftmaxCrossEntropy, "probabilities": SoftmaxCrossEntropy, "values": MeanSquaredError}
every_combination = pytest.mark.parametrize(
    ("target", "optimizer"),
    [*(("class ids", name) for name in OPTIMIZERS), ("probabilities", "SGD"), ("values", "SGD")],
)


class Reading(AssertionError):
    """A device array was read by the host."""


@contextlib.contextmanager
def nobody_reads():
    """A block in which reading a CuPy array raises `Reading`."""
    import cupy

    def reader(name):
        def read(self, *args, **kwargs):
            raise Reading(f"cupy.ndarray.{name} was called, which copies to the host and waits for the device")

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in READERS:
            patch.setattr(cupy.ndarray, name, reader(name), raising=False)
        yield


def training(backend, target, optimizer):
    """A function that does one training step, warm: every kernel it needs has been compiled."""
    layers = Linear(6, 8, seed=0), ReLU(), Tanh(), Sigmoid(), SiLU(), GELU(), Linear(8, 4, seed=1)
    model = Sequential(*layers).to(backend.device, "float32")
    rng = np.random.default_rng(0)
    X, values = backend.asarray(rng.standard_normal((16, 6)), "float32"), np.eye(4)[rng.integers(4, size=16)]
    y = backend.asarray(values.argmax(1)) if target == "class ids" else backend.asarray(values, "float32")
    loss, rule = LOSSES[target](), OPTIMIZERS[optimizer]()

    def step():
        Z, caches = model.forward(X)
        value, cache = loss.forward(Z, y)
        model.backward(loss.backward(cache), caches, needs_dX=False)
        rule.step(model)
        return value

    for _ in range(2):
        step()
    return step


@on_cuda
@every_combination
def test_a_training_step_reads_nothing_back(backend, target, optimizer):
    step = training(backend, target, optimizer)
    with nobody_reads():
        step()


@on_cuda
@counted
@every_combination
def test_a_training_step_copies_nothing_to_the_host_and_does_not_synchronize(backend, target, optimizer):
    from cupy_backends.cpu_counters import count

    step = training(backend, target, optimizer)
    with count() as asked:
        step()
    assert asked.launches + asked.library_calls > 0
    assert (asked.device_to_host, asked.host_to_device, asked.synchronizations) == (0, 0, 0)


def half_training(backend, by, optimizer):
    """A function that does one step with a float16 model, its masters and its loss scale, warm."""
    model = Sequential(Linear(6, 8, seed=0), ReLU(), Linear(8, 4, seed=1)).to(backend.device, "float16")
    rng = np.random.default_rng(0)
    X, y = backend.asarray(rng.standard_normal((16, 6)), "float16"), backend.asarray(rng.integers(4, size=16))
    loss, rule, scale = SoftmaxCrossEntropy(), OPTIMIZERS[optimizer](), LossScale(2.0**30)
    guard = Guard(backend.device, None, 0) if "guard" in by else None
    whole = TrainingStep(model, loss, rule, guard=guard, loss_scale=scale)

    def by_hand():
        Z, caches = model.forward(X)
        value, dZ = scale.scaled(loss, Z, y)
        _, gradients = model.gradients(dZ, caches, needs_dX=False)
        scale.step(rule, model, gradients)
        return value

    step = by_hand if by == "hand" else lambda: whole(X, y)
    for _ in range(3):
        step()
    return step


every_half_step = pytest.mark.parametrize("by", ["a training step", "a step with a guard", "hand"])


@on_cuda
@every_half_step
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_float16_step_reads_nothing_back_also_where_gradients_overflow(backend, by, optimizer):
    step = half_training(backend, by, optimizer)
    with nobody_reads():
        for _ in range(20):  # of which the first ones overflow
            step()


@on_cuda
@counted
@every_half_step
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_float16_step_copies_nothing_and_does_not_synchronize(backend, by, optimizer):
    from cupy_backends.cpu_counters import count

    step = half_training(backend, by, optimizer)
    with count() as asked:
        step()
    assert asked.launches + asked.library_calls > 0
    assert (asked.device_to_host, asked.host_to_device, asked.synchronizations) == (0, 0, 0)


@on_cuda
@counted
def test_fit_reads_back_no_more_for_more_steps(backend):
    from cupy_backends.cpu_counters import count

    def asked_for(steps_per_epoch):
        rng, rows = np.random.default_rng(0), 8 * steps_per_epoch
        X, y = backend.asarray(rng.standard_normal((rows, 5)), "float32"), backend.asarray(rng.integers(3, size=rows))
        model = Linear(5, 3, dtype="float32", device=backend.device, seed=0)
        options = {"loss": SoftmaxCrossEntropy(), "optimizer": SGD(0.1), "progress": False}
        with count() as asked:
            fit(model, X, y, epochs=2, batch_size=8, **options)
        return asked.device_to_host, asked.synchronizations

    asked_for(2)  # compiles the kernels
    few, many = asked_for(4), asked_for(20)
    assert few[0] > 0  # the loss of each epoch
    assert few == many


@on_cuda
@pytest.mark.parametrize("read", [float, int, bool, np.asarray, lambda x: x.item(), lambda x: x.get(), lambda x: x.tolist(),
                                  lambda x: __import__("cupy").asnumpy(x)])  # fmt: skip
def test_a_step_that_reads_its_loss_is_noticed(backend, read):
    step = training(backend, "class ids", "SGD")
    with nobody_reads(), pytest.raises(Reading):
        read(step())


@on_cuda
@counted
def test_a_step_that_reads_its_loss_is_counted(backend):
    from cupy_backends.cpu_counters import count

    step = training(backend, "class ids", "SGD")
    with count() as asked:
        float(step())
    assert asked.device_to_host == 1
