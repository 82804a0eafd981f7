"""A training step captured as a CUDA graph does what the eager step does, to the bit, or is not used."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from anyarray_linear import (
    GELU,
    SGD,
    Adam,
    AdamW,
    BinaryCrossEntropy,
    Linear,
    LossScale,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
    fit,
    lanes,
)
from anyarray_linear.guard import Guard
from anyarray_linear.protocol import parameters
from anyarray_linear.schedules import cosine
from anyarray_linear.step import TrainingStep
from anyarray_linear.training.history import NonFiniteError

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.parametrize("backend", ["cupy:0", "cupy:1"], indirect=True)
try:
    from cupy_backends.cpu_counters import count
except ImportError:
    count = None
counted = pytest.mark.skipif(count is None, reason="only the CPU stand-in counts launches")


@pytest.fixture
def lane():
    return pytest.importorskip("anyarray_linear.lanes.cupy.captured")


def random(*shape, dtype="float32", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def a_model(backend, dtype="float32", activation=ReLU):
    layers = Linear(20, 33, seed=0), activation(), Linear(33, 16, seed=1, bias=False), activation(), Linear(16, 7, seed=2)
    return Sequential(*layers).to(backend.device, dtype)


def a_batch(backend, rows=24, dtype="float32", seed=0, values=False):
    X, y = random(rows, 20, dtype=dtype, seed=seed), np.random.default_rng(seed).integers(0, 7, rows)
    return backend.asarray(X), backend.asarray(random(rows, 7, dtype=dtype, seed=seed + 1) if values else y)


def bits(backend, model, optimizer):
    """Parameters and moments, as bytes."""
    moments = {(name, m): x for name, own in optimizer.moments().items() for m, x in own.items()}
    return {key: backend.to_numpy(x).tobytes() for key, x in {**parameters(model), **moments}.items()}


class Pair:
    """The same training twice: captured, and by the same lane eagerly."""

    def __init__(self, backend, monkeypatch, lane, model, optimizer, loss=None, guarded=False, scale=None):
        self.backend, self.monkeypatch, self.lane = backend, monkeypatch, lane
        self.steps = []
        for _ in range(2):
            own, loss_, rule = copy.deepcopy((model, loss or SoftmaxCrossEntropy(), optimizer))
            guard = Guard(backend.device, model.parameters()[next(iter(model.parameters()))].dtype, 2) if guarded else None
            self.steps.append(TrainingStep(own, loss_, rule, guard=guard, loss_scale=copy.deepcopy(scale)))

    def __call__(self, X, y, how="captured"):
        mine, theirs = self.steps
        value = mine(X, y)
        assert mine.how.startswith(how), mine.how
        with self.monkeypatch.context() as patch:
            patch.setattr(self.lane, "ON", False)
            expected = theirs(X, y)
        assert theirs.how.startswith("portable")
        assert self.backend.owns(value)
        assert value.shape == ()
        assert self.backend.to_numpy(value).tobytes() == self.backend.to_numpy(expected).tobytes()
        assert bits(self.backend, mine.model, mine.optimizer) == bits(self.backend, theirs.model, theirs.optimizer)
        if mine.guard is not None:
            assert mine.guard.read() == theirs.guard.read()
        if mine.loss_scale is not None:
            assert mine.loss_scale.read() == theirs.loss_scale.read()
        return value

    def warm(self, X, y):
        self(X, y, "portable: a first step")
        self(X, y)
        self(X, y)
        return self

    def each(self, change):
        """Change both in the same way."""
        for step in self.steps:
            change(step)
        return self


@pytest.fixture
def pair(backend, monkeypatch, lane):
    def make(model=None, optimizer=None, **options):
        return Pair(backend, monkeypatch, lane, a_model(backend) if model is None else model, optimizer or Adam(1e-2), **options)

    return make


OPTIMIZERS = {
    "sgd": lambda: SGD(0.1),
    "nesterov": lambda: SGD(cosine(0.1, 20), momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda: Adam(1e-2, weight_decay=0.1),
    "adamw clipped, with a schedule": lambda: AdamW(cosine(1e-2, 20, warmup=5), clip_norm=0.1),
}


# what it does


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_leaves_the_bits_of_the_eager_steps(backend, pair, dtype, guarded, name):
    steps = pair(a_model(backend, dtype), OPTIMIZERS[name](), guarded=guarded)
    for i in range(6):
        X, y = a_batch(backend, dtype=dtype, seed=i)
        steps(X, y, "portable" if i == 0 else "captured")


@pytest.mark.parametrize("activation", [ReLU, Tanh, Sigmoid, SiLU, lambda: GELU(approximate="tanh")])
@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy, MeanSquaredError, BinaryCrossEntropy])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_layer_and_loss_that_it_takes(backend, pair, activation, loss, dtype):
    shared = Linear(20, 20, seed=5)
    layers = shared, activation(), Sequential(shared, Sequential(activation()), Linear(20, 7, seed=6)), activation(), Linear(7, 7, seed=7)
    model = Sequential(*layers).to(backend.device, dtype)
    steps = pair(model, loss=loss())
    for i in range(4):
        X, y = a_batch(backend, seed=i, dtype=dtype)
        if loss is MeanSquaredError:
            y = backend.asarray(random(24, 7, seed=i + 1, dtype=dtype))
        elif loss is BinaryCrossEntropy:
            y = backend.asarray(np.eye(7, dtype=dtype)[backend.to_numpy(y)])
        steps(X, y, "portable" if i == 0 else "captured")


def test_a_bare_layer_and_more_batch_axes_and_rows_of_probabilities(backend, pair):
    layer = Linear(20, 7, seed=0).to(backend.device, "float64")
    steps = pair(layer)
    for i in range(4):
        X, T = random(3, 4, 20, dtype="float64", seed=i), np.abs(random(3, 4, 7, dtype="float64", seed=9))
        steps(backend.asarray(X), backend.asarray(T), "portable" if i == 0 else "captured")


@pytest.mark.parametrize("ids", ["int8", "uint8", "int32", "int64"])
def test_ids_of_any_integers(backend, pair, ids):
    steps = pair()
    X, y = a_batch(backend)
    steps.warm(X, backend.asarray(backend.to_numpy(y).astype(ids)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_batch_from_the_midst_of_an_array_is_aligned_for_the_eager_step_as_it_is_in_the_graph(backend, pair, lane, monkeypatch, dtype):
    seen = []
    definition = lane.training_step

    def watched(xp, step, X, y, weights):
        seen.append(X.data.ptr % 16)
        return definition(xp, step, X, y, weights)

    monkeypatch.setattr(lane, "training_step", watched)
    steps = pair(a_model(backend, dtype))
    X, y = a_batch(backend, 25, dtype)
    with backend.computing():
        whole = cupy.zeros(25 * 20 + 1, dtype)
        whole[1:] = X.reshape(-1)
        X = whole[1:].reshape(25, 20)[:24]
    assert X.data.ptr % 16
    for i in range(4):
        steps(X, y[:24], "portable" if i == 0 else "captured")
    for step in steps.steps:
        step.on_rows(X, y[:24], None, 3, 14)
    assert seen == [0] * len(seen)
    assert len(seen) >= 6


@counted
def test_a_warm_step_is_one_launch(backend, lane):
    step = TrainingStep(a_model(backend), SoftmaxCrossEntropy(), AdamW(clip_norm=1.0), guard=Guard(backend.device, np.float32, 0))
    batches = [a_batch(backend, seed=i) for i in range(4)]
    for X, y in batches:
        step(X, y)
    with count() as c:
        step(*batches[0])
    assert step.how == "captured"
    counts = vars(c)
    assert counts.pop("graph_launches") == 1
    assert counts.pop("graph_nodes") > 10
    assert counts.pop("launches") == 1
    assert set(counts.values()) == {0}, counts


def test_a_loss_that_is_kept_stays_what_it_was(backend, pair):
    X, y = a_batch(backend)
    steps = pair().warm(X, y)
    kept = [steps(X, y) for _ in range(3)]
    host = [float(backend.to_numpy(value)) for value in kept]
    assert len(set(host)) == 3
    steps(X, y)
    assert [float(backend.to_numpy(value)) for value in kept] == host


def test_rows_are_taken_inside_the_graph(backend, lane, monkeypatch):
    X, y = a_batch(backend, 100)
    order = backend.asarray(np.random.default_rng(0).permutation(100))
    steps = [TrainingStep(a_model(backend), SoftmaxCrossEntropy(), Adam(1e-2)) for _ in range(2)]
    for epoch in range(2):
        for start in range(0, 100, 24):  # the last batch has 4 rows
            stop = min(start + 24, 100)
            value = steps[0].on_rows(X, y, order, start, stop)
            captured = steps[0].how == "captured"
            assert captured == (stop - start == 24 and (epoch, start) != (0, 0))
            monkeypatch.setattr(lane, "ON", False)
            assert backend.to_numpy(value) == backend.to_numpy(steps[1].on_rows(X, y, order, start, stop))
            monkeypatch.undo()
            assert bits(backend, steps[0].model, steps[0].optimizer) == bits(backend, steps[1].model, steps[1].optimizer)
    value = steps[0].on_rows(X, y, None, 3, 27)  # rows as they come, by the same graph
    assert steps[0].how == "captured"
    steps[1](X[3:27], y[3:27])
    assert bits(backend, steps[0].model, steps[0].optimizer) == bits(backend, steps[1].model, steps[1].optimizer)


# the scale of a float16 model's loss


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9), AdamW(1e-2, clip_norm=0.5)], ids=["sgd", "adamw clipped"])
def test_the_scale_falls_and_grows_inside_the_graph(backend, pair, optimizer, guarded):
    steps = pair(a_model(backend, "float16"), optimizer, guarded=guarded, scale=LossScale(2.0**22, interval=2))
    scales = []
    for i in range(14):
        steps(*a_batch(backend, dtype="float16", seed=i % 3), "portable" if i == 0 else "captured")
        scales.append(steps.steps[0].loss_scale.read()[0])
    changes = [after / before for before, after in zip([2.0**22, *scales], scales, strict=False)]
    assert changes[:2] == [0.5, 0.5]  # one of them eagerly, one by the graph
    assert changes.count(2.0) > 0
    if guarded:  # an overflow is no bad step, and its loss counts
        assert steps.steps[0].guard.read()[1:] == (14 * 24, 0, 0)


@pytest.mark.parametrize("bad", ["the loss", "the floor"])
def test_a_bad_step_at_the_floor_or_of_the_loss_is_the_guards(backend, pair, bad):
    steps = pair(a_model(backend, "float16"), SGD(0.0), guarded=True, scale=LossScale(2.0**24, floor=2.0**22 if bad == "the floor" else 1.0))
    X, y = a_batch(backend, dtype="float16")
    for i in range(6):
        if bad == "the loss" and i == 3:
            with backend.computing():
                X[0] = np.nan
        steps(X, y, "portable" if i == 0 else "captured")
    _, _, found, fatal = steps.steps[0].guard.read()
    assert (found, fatal) == ((3, 6) if bad == "the loss" else (3, 5))


SCALES = {
    "growth": lambda s: setattr(s.loss_scale, "growth", 4.0),
    "interval": lambda s: setattr(s.loss_scale, "interval", 1),
    "backoff": lambda s: setattr(s.loss_scale, "backoff", 0.25),
    "another": lambda s: setattr(s, "loss_scale", LossScale(2.0**24)),
    "a state": lambda s: s.loss_scale.load_state_dict({"scale": 2.0**23, "good": 1}),
    "a number": lambda s: setattr(s.loss_scale, "scale", 2.0**23),
    "a master": lambda s: s.optimizer.moments()["0.W"].update(master=s.optimizer.moments()["0.W"]["master"] * 1.0001),
    "a weight": lambda s: setattr(s.model[0], "W", s.model[0].W * 2),
}


@pytest.mark.parametrize("change", SCALES)
def test_what_the_user_changes_of_a_scale_or_a_master_is_noticed(backend, pair, change):
    steps = pair(a_model(backend, "float16"), scale=LossScale(2.0**20, interval=2))
    steps.warm(*a_batch(backend, dtype="float16"))
    with backend.computing():
        steps.each(SCALES[change])
    for i in range(5):
        steps(*a_batch(backend, dtype="float16", seed=i % 2), "")
    assert steps.steps[0].how == "captured"


# what changes under it


CHANGES = {
    "the rate": lambda s: setattr(s.optimizer, "lr", 0.5),
    "a schedule": lambda s: setattr(s.optimizer, "lr", cosine(0.1, 10)),
    "betas": lambda s: setattr(s.optimizer, "betas", (0.5, 0.6)),
    "eps": lambda s: setattr(s.optimizer, "eps", 0.1),
    "weight decay": lambda s: setattr(s.optimizer, "weight_decay", 0.5),
    "a norm": lambda s: setattr(s.optimizer, "clip_norm", 1e-3),
    "steps": lambda s: setattr(s.optimizer, "steps", 1000),
    "a weight": lambda s: setattr(s.model[0], "W", s.model[0].W * 2),
    "a bias": lambda s: setattr(s.model[4], "b", s.model[4].b + 1),
    "weights swapped in place": lambda s: s.model[0].W.__setitem__(slice(None), s.model[0].W[::-1].copy()),
    "a reversed view of itself": lambda s: setattr(s.model[0], "W", s.model[0].W[::-1]),
    "a frozen layer": lambda s: setattr(s.model[2], "trainable", False),
    "another loss": lambda s: setattr(s, "loss", SoftmaxCrossEntropy()),
    "the optimizer's state": lambda s: s.optimizer.load_state_dict(s.optimizer.state_dict()),
    "another optimizer": lambda s: setattr(s, "optimizer", SGD(0.1)),
    "smoothing": lambda s: setattr(s, "loss", SoftmaxCrossEntropy(label_smoothing=0.1)),
    "an option of the loss": lambda s: setattr(s.loss, "label_smoothing", 0.1),
    "a guard": lambda s: setattr(s, "guard", Guard(s.model[0].device, np.float32, 0)),
    "a moment": lambda s: s.optimizer.moments()["0.W"].update(M=s.optimizer.moments()["0.W"]["M"] * 3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_user_changes_is_noticed(backend, pair, change):
    X, y = a_batch(backend)
    steps = pair().warm(X, y)
    with backend.computing():
        steps.each(CHANGES[change])
    for _ in range(4):
        steps(X, y, "")
    assert steps.steps[0].how.startswith("portable: Softmax" if change in ("smoothing", "an option of the loss") else "captured")


def test_a_frozen_layer_that_is_assigned_and_thawed(backend, pair):
    model = a_model(backend)
    model[2].trainable = False
    X, y = a_batch(backend)
    steps = pair(model).warm(X, y)
    with backend.computing():
        steps.each(lambda s: setattr(s.model[2], "W", s.model[2].W * 3))
    for _ in range(3):
        steps(X, y, "")
    steps.each(lambda s: setattr(s.model[2], "trainable", True))
    for _ in range(3):
        steps(X, y, "")
    assert steps.steps[0].how == "captured"


def test_a_norm_that_changes_and_goes(backend, pair):
    X, y = a_batch(backend)
    steps = pair(optimizer=SGD(0.1, clip_norm=1e-3, momentum=0.9)).warm(X, y)
    steps.each(lambda s: setattr(s.optimizer, "clip_norm", 10.0))(X, y)
    steps.each(lambda s: setattr(s.optimizer, "momentum", 0.2))(X, y)
    steps.each(lambda s: setattr(s.optimizer, "clip_norm", None))
    for _ in range(3):
        steps(X, y, "")
    assert steps.steps[0].how == "captured"


@counted
def test_lanes_off_is_noticed(backend, pair):
    X, y = a_batch(backend)
    step = pair().warm(X, y).steps[0]
    with lanes.off(), count() as c:
        step(X, y)
    assert c.graph_launches == 0
    step(X, y)
    step(X, y)
    assert step.how == "captured"


def test_batches_of_other_shapes_run_eagerly_until_they_are_the_rule(backend, pair):
    steps = pair().warm(*a_batch(backend))
    steps(*a_batch(backend, 5), "portable")
    steps(*a_batch(backend))
    steps(*a_batch(backend, 5), "portable")
    steps(*a_batch(backend, 5), "captured")
    steps(*a_batch(backend, 5), "captured")
    steps(*a_batch(backend), "portable")
    X, y = a_batch(backend, 5)
    with backend.computing():
        steps(cupy.asfortranarray(X), y, "portable: X or y is laid out with gaps")
    steps(X, y, "captured")


def test_wrong_batches_raise_what_the_portable_step_raises_and_change_nothing(backend, pair):
    X, y = a_batch(backend)
    steps = pair().warm(X, y)
    step = steps.steps[0]
    before = bits(backend, step.model, step.optimizer), step.optimizer.steps
    double = backend.asarray(backend.to_numpy(X), "float64")
    for wrong in ((X[:, :3], y), (X, y[:5]), (X[:5], y), (backend.to_numpy(X), y), (double, y), (X, backend.to_numpy(y))):
        with pytest.raises((TypeError, ValueError)):
            step(*wrong)
    assert (bits(backend, step.model, step.optimizer), step.optimizer.steps) == before
    step.model[4].b = None
    with pytest.raises(ValueError, match="make a new optimizer"):
        step(X, y)


def test_what_it_does_not_know_runs_by_the_definition_and_says_so(backend, lane):
    class Own(ReLU):
        pass

    X, y = a_batch(backend)
    for layers, loss, weights, word in (
        ((Linear(20, 7, seed=0), Own()), SoftmaxCrossEntropy(), None, "Own"),
        ((Linear(20, 7, seed=0),), type("OwnLoss", (SoftmaxCrossEntropy,), {})(), None, "OwnLoss"),
        ((Linear(20, 7, seed=0),), SoftmaxCrossEntropy(label_smoothing=0.1), None, "options"),
        ((Linear(20, 7, seed=0),), SoftmaxCrossEntropy(ignore_id=0), None, "options"),
        ((Linear(20, 7, seed=0),), SoftmaxCrossEntropy(class_weights=[1.0] * 7), None, "options"),
        ((Linear(20, 7, seed=0),), SoftmaxCrossEntropy(), backend.asarray(np.ones(24, np.float32)), "weights"),
    ):
        step = TrainingStep(Sequential(*layers).to(backend.device, "float32"), loss, SGD(0.1))
        for _ in range(3):
            step(X, y, weights)
            assert step.how.startswith("portable: ")
            assert word in step.how


# where it runs


def test_on_any_stream_and_with_another_device_current(backend, pair):
    X, y = a_batch(backend)
    steps = pair()
    with backend.computing():
        streams = [cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(), cupy.cuda.Stream.null]
    for i in range(9):
        with backend.computing(), streams[i % 3]:
            steps(X, y, "portable" if i == 0 else "captured")
            streams[i % 3].synchronize()
    steps(X, y)  # the current device is 0


@counted
def test_another_stream_waits_for_the_one_before_and_nothing_else_does(backend, lane):
    X, y = a_batch(backend)
    step = TrainingStep(a_model(backend), SoftmaxCrossEntropy(), Adam())
    for _ in range(3):
        step(X, y)
    with backend.computing(), cupy.cuda.Stream(non_blocking=True), count() as c:
        step(X, y)
    assert c.synchronizations == 0
    assert step.how == "captured"


def test_next_to_threads_that_compute(backend, lane):
    stop = threading.Event()

    def busy():
        with backend.computing():
            while not stop.is_set():
                x = cupy.ones((50, 50), "f")
                assert float((x @ x)[0, 0]) == 50
                cupy.cuda.Stream(non_blocking=True).synchronize()

    def work(number):
        step = TrainingStep(a_model(backend), SoftmaxCrossEntropy(), Adam(1e-2))
        with backend.computing(), cupy.cuda.Stream(non_blocking=True) as stream:
            X, y = a_batch(backend, 16 + number % 2)
            losses = [step(X, y) for _ in range(5)]
            stream.synchronize()
            assert step.how == "captured", step.how
            return [float(backend.to_numpy(value)) for value in losses]

    alone = [work(number) for number in range(2)]
    others = [threading.Thread(target=busy) for _ in range(2)]
    for thread in others:
        thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for number, losses in enumerate(pool.map(work, range(8))):
                assert losses == alone[number % 2]
    finally:
        stop.set()
        for thread in others:
            thread.join()


def test_memory_that_is_freed_and_handed_to_somebody_else_is_not_the_graphs(backend, pair):
    X, y = a_batch(backend)
    steps = pair(guarded=True).warm(X, y)
    with backend.computing():
        for _ in range(3):
            gc.collect()
            cupy.get_default_memory_pool().free_all_blocks()
            taken = [cupy.full(size, np.nan, "f") for size in (24 * 20, 24 * 33, 33 * 20, 128, 1, 7, 24, 4096) for _ in range(20)]
            del X, y
            X, y = a_batch(backend, seed=4)
            steps(X, y)
            del taken


# what can go wrong


def fails_at(stage, monkeypatch):
    """Make one stage of the capture fail; returns a word of the reason that has to be given."""
    from anyarray_linear.lanes.cupy import products, proof, recording

    def broken(*arguments, **options):
        raise RuntimeError(f"broken at {stage}")

    if stage == "workspace":
        monkeypatch.setattr(recording, "workspace", broken)
    elif stage == "memory":
        monkeypatch.setattr(recording, "workspace", lambda: cupy.empty(1 << 50, np.uint8))
        return "OutOfMemoryError"
    elif stage == "warm-up":
        monkeypatch.setattr(recording.Recording, "ask", broken)
    elif stage == "product":
        monkeypatch.setattr(products, "_gemm_by_address", broken)
    elif stage == "status":
        monkeypatch.setattr(products, "_gemm_by_address", lambda *a: products._checked("cublasGemmEx", 14))
        return "status 14"
    elif stage == "a wait":
        deliver = recording.kernel

        def waiting(name, *rest):
            if name == "deliver" and cupy.cuda.get_current_stream().is_capturing():
                cupy.cuda.get_current_stream().synchronize()
            return deliver(name, *rest)

        monkeypatch.setattr(recording, "kernel", waiting)
        return "CUDARuntimeError"
    elif stage == "launch":
        record = recording.Recording.record

        class Graph:
            launch = broken

        def recorded(self, step):
            left = record(self, step)
            self.graph = Graph()
            return left

        monkeypatch.setattr(recording.Recording, "record", recorded)
    elif stage == "a lost kernel":
        update = recording.update

        def lossy(*arguments):
            if not cupy.cuda.get_current_stream().is_capturing():
                update(*arguments)

        monkeypatch.setattr(recording, "update", lossy)
        return "update"
    elif stage == "a wrong gradient":
        forward = recording.forward

        def wrong(model, X):
            Z, caches = forward(model, X)
            return Z * np.float32(1.001), caches

        monkeypatch.setattr(recording, "forward", wrong)
        return "more than rounding can make it"
    assert proof
    return f"broken at {stage}"


STAGES = (
    "workspace", "memory", "warm-up", "product", "status", "a wait", "launch", "a lost kernel", "a wrong gradient",
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_capture_that_fails_keeps_the_eager_result_and_says_why(backend, pair, monkeypatch, stage):
    if stage == "a wait" and count is None:
        pytest.skip("only where a broken capture does no harm")
    word = fails_at(stage, monkeypatch)
    X, y = a_batch(backend)
    steps = pair(guarded=True)
    steps(X, y, "portable: a first step")
    with pytest.warns(RuntimeWarning, match="not captured") as told:
        steps(X, y, "portable: ")
    assert word in steps.steps[0].how
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3):
            steps(*a_batch(backend, seed=i), "portable: ")
    assert word in steps.steps[0].how
    with backend.computing():
        assert not cupy.cuda.get_current_stream().is_capturing()
        assert float((cupy.ones((2, 2)) @ cupy.ones((2, 2)))[0, 0]) == 2


@pytest.mark.parametrize("activation", [ReLU, SiLU])
@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy, MeanSquaredError, BinaryCrossEntropy])
def test_other_roundings_are_taken_for_what_they_are(backend, lane, monkeypatch, activation, loss):
    """As if cuBLAS formed the products of a capture in another order: then the last bits differ, and nothing is wrong."""
    from anyarray_linear.lanes.cupy import recording

    forward = recording.forward
    u = 2.0**-24

    def rounded(model, X):
        Z, caches = forward(model, X)
        return Z * np.float32(1 + 2 * u), caches

    monkeypatch.setattr(recording, "forward", rounded)
    step = TrainingStep(a_model(backend, activation=activation), loss(), Adam(1e-2))
    for i in range(3):
        X, y = a_batch(backend, seed=i)
        step(X, y if loss is SoftmaxCrossEntropy else backend.asarray(np.eye(7, dtype=np.float32)[backend.to_numpy(y)]))
    assert step.how == "captured"


def test_an_interrupt_in_the_proof_leaves_the_eager_result(backend, pair, monkeypatch):
    from anyarray_linear.lanes.cupy import recording

    X, y = a_batch(backend)
    steps = pair()
    steps(X, y, "portable")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recording.Recording, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            steps.steps[0](X, y)
    steps.steps[0].number += 1
    with monkeypatch.context() as patch:
        patch.setattr(steps.lane, "ON", False)
        steps.steps[1](X, y)
    assert steps.steps[0].whole
    for _ in range(3):
        steps(X, y, "")


def test_it_can_be_turned_off(backend):
    code = (
        "import cupy, anyarray_linear as a\n"
        "from anyarray_linear.step import TrainingStep\n"
        "step = TrainingStep(a.Linear(2, 2, device='cuda:0', seed=0), a.SoftmaxCrossEntropy(), a.SGD(0.1))\n"
        "for _ in range(3): step(cupy.ones((2, 2)), cupy.zeros(2, 'q'))\n"
        "print(step.how)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ANYARRAY_CAPTURE": "0"}, capture_output=True, text=True, check=True
    )
    assert run.stdout == "portable: ANYARRAY_CAPTURE=0 says so\n"


def test_copies_capture_for_themselves(backend, pair):
    X, y = a_batch(backend)
    step = pair().warm(X, y).steps[0]
    twin = copy.deepcopy(step)
    before = bits(backend, step.model, step.optimizer)
    for _ in range(4):
        twin(X, y)
    assert twin.how == "captured"
    assert bits(backend, step.model, step.optimizer) == before
    for _ in range(4):
        step(X, y)
    assert bits(backend, step.model, step.optimizer) == bits(backend, twin.model, twin.optimizer)


# inside `fit`


def trained(backend, optimizer=None, X=None, model=None, dtype="float32", **options):
    model, optimizer = model or a_model(backend, dtype), optimizer or Adam(1e-2)
    X_, y = a_batch(backend, 200, dtype)
    options = {"epochs": 3, "batch_size": 24, "progress": False, **options}
    history = fit(model, X_ if X is None else X, y, loss=SoftmaxCrossEntropy(), optimizer=optimizer, **options)
    return bits(backend, model, optimizer), history


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_fit_gives_the_same_captured_and_eagerly(backend, lane, monkeypatch, dtype):
    captured, history = trained(backend, dtype=dtype)
    monkeypatch.setattr(lane, "ON", False)
    eager, expected = trained(backend, dtype=dtype)
    assert captured == eager
    for row, other in zip(history.rows, expected.rows, strict=True):
        assert row["loss"] == other["loss"]
        assert row.get("loss_scale") == other.get("loss_scale")


@counted
def test_a_step_of_fit_is_one_launch(backend, lane):
    from cupy_backends.cpu_counters import counters

    seen = []

    class Watch:
        def is_set(self):
            seen.append(counters())
            return False

    trained(backend, stop=Watch())
    before, after = seen[10 + 3 - 1], seen[10 + 3]  # in the second epoch
    warm = {name: after[name] - before[name] for name in after}
    assert warm.pop("graph_launches") == 1
    assert warm.pop("graph_nodes") > 10
    assert warm.pop("launches") <= 3
    assert set(warm.values()) == {0}, warm


@counted
@pytest.mark.parametrize("fits", [True, False])
def test_data_of_the_host_are_moved_once_or_one_batch_ahead(backend, lane, monkeypatch, fits):
    from cupy_backends.cpu_counters import counters

    expected, _ = trained(backend)
    monkeypatch.setattr("anyarray_linear.training.moving.FRACTION", 0.25 if fits else 1e-9)
    seen = []

    class Watch:
        def is_set(self):
            seen.append(counters())
            return False

    model, optimizer = a_model(backend), Adam(1e-2)
    X, y = random(200, 20, dtype="float64"), np.random.default_rng(0).integers(0, 7, 200)
    X[:] = backend.to_numpy(a_batch(backend, 200)[0])
    options = {"loss": SoftmaxCrossEntropy(), "optimizer": optimizer, "epochs": 3, "batch_size": 24, "progress": False}
    fit(model, X, y, stop=Watch(), **options)
    assert bits(backend, model, optimizer) == expected
    before, after = seen[10 + 3 - 1], seen[10 + 3]  # in the second epoch
    warm = {name: after[name] - before[name] for name in after}
    assert warm.pop("graph_launches") == 1
    assert warm.pop("host_to_device") == (0 if fits else 2)
    assert (warm.pop("graph_nodes"), warm.pop("launches")) > (10, 0)
    assert set(warm.values()) == {0}, warm


@pytest.mark.parametrize("allowed", [0, 1])
def test_the_first_bad_step_is_named_and_undone(backend, lane, monkeypatch, allowed):
    X, _ = a_batch(backend, 200)
    with backend.computing():
        X[150] = 1e30  # finite, but its square is not
    found = []
    for on in (True, False):
        monkeypatch.setattr(lane, "ON", on)
        model, optimizer = a_model(backend), SGD(0.1)
        with pytest.raises(NonFiniteError) as error:
            trained(backend, optimizer, X, skip_nonfinite=allowed, model=model)
        losses = [row["loss"] for row in error.value.history.rows]
        found.append((error.value.step, str(error.value), losses, bits(backend, model, optimizer)))
    assert found[0] == found[1]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_resume_is_to_the_bit_across_captured_and_eager(backend, lane, monkeypatch, tmp_path, first, dtype):
    def some(epochs, **options):
        options["loss_scale"] = LossScale(2.0**20, interval=5)  # which changes all the time
        return trained(backend, epochs=epochs, dtype=dtype, **options)

    whole, _ = some(4)
    monkeypatch.setattr(lane, "ON", first)
    some(2, checkpoint=tmp_path)
    monkeypatch.setattr(lane, "ON", not first)
    resumed, _ = some(4, checkpoint=tmp_path, resume=True)
    assert resumed == whole


@counted
@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, momentum=0.9), Adam()], ids=["none", "one", "two"])
def test_memory_is_that_of_the_arrays(backend, lane, optimizer):
    sizes, rows = (1024, 1024, 1024, 256), 256
    optimizer = copy.deepcopy(optimizer)
    with backend.computing():
        gc.collect()
        default = cupy.get_default_memory_pool()
        used = default.used_bytes()
        model = Sequential(*(x for i in range(3) for x in (Linear(sizes[i], sizes[i + 1], seed=i), ReLU()))).to(backend.device, "float32")
        X, y = backend.asarray(random(rows, sizes[0])), backend.asarray(np.zeros(rows, np.int64))
        step = TrainingStep(model, SoftmaxCrossEntropy(), optimizer)
        for _ in range(3):
            step(X, y)
        assert step.how == "captured"
        pool = step.kept["captured"].recording.pool
        gc.collect()
        total = default.used_bytes() - used + pool.total_bytes()
    count_ = sum(W.size for W in model.parameters().values())
    activations = rows * (2 * sizes[0] + 2 * sum(sizes[1:]))  # the batch and its copy; each output, and its gradient
    needed = 4 * (count_ * (2 + len(optimizer.moment_names)) + activations) + step.kept["captured"].recording.workspace.nbytes
    assert total <= 1.15 * needed
