"""Many threads on one layer get what one thread gets, byte for byte."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

import anyarray_linear.lanes.numpy as lane
from anyarray_linear import Linear, ReLU, Sequential, SoftmaxCrossEntropy, Tanh


def work(model, X, y):
    """The bytes of all that a forward and a backward give."""
    loss = SoftmaxCrossEntropy()
    Z, caches = model.forward(X)
    value, cache = loss.forward(Z, y)
    dX, gradients = model.gradients(loss.backward(cache), caches)
    return b"".join(np.asarray(x).tobytes() for x in (Z, value, dX, *gradients.values()))


# what each thread's rows are, and the widths of the layers: each takes another way through the NumPy lane
SIZES = {"dot": (lambda i: 1 + i, 48, 32), "matmul": (lambda i: 200 + i, 200, 200), "blocks": (lambda i: 2100 + i, 64, 64)}


def hammer(seconds, threads, size):
    """Let `threads` threads work on one model for so long; returns how often each did, and how often it was right."""
    count, features, width = SIZES[size]
    shared = Linear(width, width, dtype="float32", seed=0)  # at two positions: its gradients are summed
    last = Linear(width, 10, dtype="float32", seed=2)
    model = Sequential(Linear(features, width, dtype="float32", seed=1), ReLU(), shared, Tanh(), shared, last)
    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal((count(i), features)).astype(np.float32), rng.integers(0, 10, count(i))) for i in range(4)]
    inputs = [batches[i % 4] for i in range(threads)]
    with lanes_taken() as taken:
        work(model, *inputs[0])
    assert taken == {size}
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


@contextmanager
def lanes_taken():
    """The ways through the NumPy lane that the layers take meanwhile, as they are told apart there; the last, narrow layer
    and the loss aside."""
    taken, block_rows, tall = set(), lane.block_rows, lane.TALL

    def watched(X, W):
        rows = block_rows(X, W)
        if W.shape[0] != 10:
            taken.add("blocks" if rows else "dot" if X.size < lane.SMALL and W.size < lane.SMALL else "matmul")
        return rows

    lane.block_rows, lane.TALL = watched, 0  # so that it is always asked
    try:
        yield taken
    finally:
        lane.block_rows, lane.TALL = block_rows, tall


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 512 rows, so that 2,100 are tall: no more work than a thread needs to meet others at."""
    monkeypatch.setattr(lane, "BLOCK_BYTES", 512 * 2 * 64 * 4)


@pytest.mark.parametrize("size", SIZES)
def test_eight_threads_on_one_model_equal_serial(size):
    counts = hammer(0.3, 8, size)
    assert all(done == right for done, right in counts), counts


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_sixteen_threads_on_one_model_for_ten_seconds_equal_serial(size):
    counts = hammer(10, 16, size)
    assert all(done == right for done, right in counts), counts
    assert all(done for done, _ in counts)
