"""Many threads on one layer get what one thread gets, byte for byte."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from anyarray_linear import GELU, Linear, ReLU, Sequential, SoftmaxCrossEntropy


def work(model, X, y):
    """The bytes of all that a forward and a backward give."""
    loss = SoftmaxCrossEntropy()
    Z, caches = model.forward(X)
    value, cache = loss.forward(Z, y)
    dX, gradients = model.gradients(loss.backward(cache), caches)
    return b"".join(np.asarray(x).tobytes() for x in (Z, value, dX, *gradients.values()))


def hammer(seconds, threads):
    """Let `threads` threads work on one model for so long; returns how often each did, and how often it was right."""
    shared = Linear(32, 32, dtype="float32", seed=0)  # at two positions: its gradients are summed
    model = Sequential(Linear(48, 32, dtype="float32", seed=1), ReLU(), shared, GELU(), shared, Linear(32, 10, dtype="float32", seed=2))
    rng = np.random.default_rng(0)
    inputs = [(rng.standard_normal((1 + i, 48)).astype(np.float32), rng.integers(0, 10, 1 + i)) for i in range(threads)]
    serial = [work(model, *batch) for batch in inputs]
    together, end = threading.Barrier(threads), time.monotonic() + seconds
    counts = [[0, 0] for _ in range(threads)]

    def run(i):
        together.wait()
        while time.monotonic() < end or not counts[i][0]:
            counts[i][0] += 1
            counts[i][1] += work(model, *inputs[i]) == serial[i]

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return counts


def test_eight_threads_on_one_model_equal_serial():
    counts = hammer(0.3, 8)
    assert all(done == right for done, right in counts), counts


@pytest.mark.slow
def test_sixteen_threads_on_one_model_for_ten_seconds_equal_serial():
    counts = hammer(10, 16)
    assert all(done == right for done, right in counts), counts
    assert sum(done for done, _ in counts) > 1000
