"""The right device, always: whatever is current, arrays on `cuda:1` are computed on `cuda:1`, and nothing lands on `cuda:0`.

Two CUDA devices are needed for most of it; emulated ones will do, for which device is current is CuPy's own doing there too.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
from conftest import Backend, Unavailable, make_backend

from anyarray_linear import (
    GELU,
    SGD,
    Adam,
    AdamW,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
    evaluate,
    fit,
    linear_backward,
    linear_forward,
    predict,
    select_device,
)
from anyarray_linear.arrays.place import computing_on

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 6)).astype(np.float32)
CLASSES = RNG.integers(0, 3, 40)
VALUES = RNG.standard_normal((40, 3)).astype(np.float32)
LOSSES = {"cross-entropy": (SoftmaxCrossEntropy, CLASSES), "squared error": (MeanSquaredError, VALUES)}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.1, momentum=0.9, nesterov=True, clip_norm=1.0),
    "Adam": lambda: Adam(1e-2),
    "AdamW": lambda: AdamW(1e-2, clip_norm=1.0),
}


@pytest.fixture(scope="module")
def cupy() -> Any:
    """CuPy with two working devices, which may be emulated."""
    try:
        make_backend("cupy:1")
    except Unavailable as why:
        pytest.skip(str(why))
    import cupy

    return cupy


@contextmanager
def nothing_on(cupy: Any, index: int) -> Iterator[None]:
    """Asserts that the block allocates nothing on this device, and leaves the current device as it was."""
    allocated: list[int] = []

    class Watch(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "watch"

        def malloc_preprocess(self, **block: Any) -> None:
            allocated.append(cupy.cuda.runtime.getDevice())  # where it lands; CuPy's own block["device_id"] may be another

    before = cupy.cuda.runtime.getDevice()
    with Watch():
        yield
    assert cupy.cuda.runtime.getDevice() == before
    assert allocated, "the block allocated nothing at all, so it shows nothing"
    assert index not in allocated


def model(device: Any, dtype: Any = "float32") -> Sequential:
    shared = Linear(8, 8, seed=2, device=device, dtype=dtype)
    return Sequential(
        Linear(6, 8, seed=1, device=device, dtype=dtype), ReLU(), shared, Tanh(), Sequential(shared, SiLU()), GELU(),
        Sigmoid(), Linear(8, 3, seed=3, device=device, dtype=dtype),
    )  # fmt: skip


def trained(device: Any, loss: str, optimizer: str, dtype: Any = "float32") -> tuple[dict[str, np.ndarray], float]:
    """The parameters, on the host, and the validation loss after a short training on this device."""
    make_loss, y = LOSSES[loss]
    net = model(device, dtype)
    history = fit(
        net, X, y, loss=make_loss(), optimizer=OPTIMIZERS[optimizer](), epochs=2, batch_size=16, progress=False,
        validation=0.25,
    )  # fmt: skip
    host = select_device("cpu")
    return {name: host.to_numpy(p) for name, p in net.parameters().items()}, history.rows[-1]["validation_loss"]


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], strict=True)


# Follow the input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_follows_the_device_and_agrees_with_numpy(loss: str, optimizer: str, backend: Backend) -> None:
    make_loss, y = LOSSES[loss]
    net = model(backend.device, "float64")
    fit(net, X, y, loss=make_loss(), optimizer=OPTIMIZERS[optimizer](), epochs=2, batch_size=16, progress=False)
    assert all(backend.owns(p) for p in net.parameters().values())
    reference = model("cpu", "float64")
    fit(reference, X, y, loss=make_loss(), optimizer=OPTIMIZERS[optimizer](), epochs=2, batch_size=16, progress=False)
    for name, p in reference.parameters().items():
        # float64 rounds near 1e-16; six steps of Adam may enlarge that where a gradient is nearly zero
        np.testing.assert_allclose(backend.to_numpy(net.parameters()[name]), p, rtol=1e-7, atol=1e-9)


def test_construction_follows_the_device(backend: Backend) -> None:
    for dtype in (None, *backend.dtypes):
        layer = Linear(3, 2, device=backend.device, dtype=dtype, seed=0)
        assert backend.owns(layer.W)
        assert backend.owns(layer.b)
        assert layer.device == backend.device
        assert layer.dtype == backend.device.dtype(dtype)


def test_to_moves_there_and_back(backend: Backend) -> None:
    layer = Linear(3, 2, dtype="float32", seed=0)
    there = layer.to(backend.device)
    assert backend.owns(there.W)
    assert backend.owns(there.b)
    back = there.to("cpu")
    assert type(back.W) is np.ndarray
    np.testing.assert_array_equal(back.W, layer.W, strict=True)
    np.testing.assert_array_equal(back.b, layer.b, strict=True)
    again = there.to(backend.device)
    assert again is not there
    assert again.W is there.W  # not copied
    assert again.b is there.b


def test_to_moves_a_container_and_keeps_what_is_shared(backend: Backend) -> None:
    there = model("cpu").to(backend.device)
    assert all(backend.owns(p) for p in there.parameters().values())
    assert there[2] is there[4][0]
    again = there.to(backend.device)
    assert all(again.parameters()[name] is p for name, p in there.parameters().items())


# The current device does not matter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_on_cuda_1_while_0_is_current_is_training_on_cuda_0(loss: str, optimizer: str, cupy: Any) -> None:
    parameters, score = trained("cuda:0", loss, optimizer)
    with nothing_on(cupy, 0):
        parameters_1, score_1 = trained("cuda:1", loss, optimizer)
    assert_same_bits(parameters, parameters_1)
    assert score == score_1


def on_cuda_1(cupy: Any) -> dict[str, Callable[[], Any]]:
    """Public calls on arrays of `cuda:1`; what they need is made beforehand."""
    device = select_device("cuda:1")
    x, ids, values = device.asarray(X), device.asarray(CLASSES), device.asarray(VALUES)
    layer, net = Linear(6, 3, device=device, dtype="float32", seed=0), model(device)
    Z, cache = layer.forward(x)
    net_Z, caches = net.forward(x)
    calls: dict[str, Callable[[], Any]] = {
        "Linear()": lambda: Linear(6, 3, device=device).W,
        "linear_forward": lambda: linear_forward(x, layer.W, layer.b),
        "linear_backward": lambda: list(linear_backward(Z, x, layer.W)),
        "Linear.forward of 3 axes": lambda: layer.forward(cupy_reshaped(x))[0],
        "Linear.__call__": lambda: layer(x),
        "Linear.gradients": lambda: layer.gradients(Z, cache)[0],
        "Linear.backward": lambda: [layer.backward(Z, cache, accumulate=True), layer.dW, layer.db],
        "Linear.to dtype": lambda: layer.to(dtype="float64").W,
        "Linear.from_arrays": lambda: [Linear.from_arrays(layer.W, layer.b[0, :]).b, Linear(2, 2, device=device).W],
        "deepcopy": lambda: copy.deepcopy(layer).W,
        "pickle": lambda: pickle.loads(pickle.dumps(layer)).W,
        "Sequential.forward": lambda: net.forward(x)[0],
        "Sequential.gradients": lambda: list(net.gradients(net_Z, caches)[1].values()),
        "Sequential.backward": lambda: net.backward(net_Z, caches, accumulate=True),
        "Sequential.to": lambda: list(net.to(dtype="float64").parameters().values()),
        "Sequential.collapse": lambda: Sequential(layer, Linear(3, 2, device=device, dtype="float32")).collapse()[0].W,
        "predict": lambda: predict(net, x),
        "predict from the host": lambda: device.asarray(predict(net, X)),
        "Device.asarray of the host": lambda: device.asarray(X, dtype="float64"),
        "Device.asarray of another dtype": lambda: device.asarray(x, dtype="float16"),
        "Device.asarray of strided": lambda: device.asarray(x[::2, ::-1], dtype="float64"),
    }
    for activation in (ReLU(), Tanh(), Sigmoid(), SiLU(), GELU()):
        out, kept = activation.forward(x)
        calls[f"{activation}"] = lambda activation=activation: activation(x)
        calls[f"{activation}.backward"] = lambda activation=activation, kept=kept, out=out: activation.backward(out, kept)
    for loss, target in ((SoftmaxCrossEntropy(), ids), (SoftmaxCrossEntropy(), device.asarray(abs(VALUES))), (MeanSquaredError(), values)):
        kept = loss.forward(Z, target)[1]
        kind = f"{type(loss).__name__} of {target.dtype}"
        calls[kind] = lambda loss=loss, target=target: loss.forward(Z, target)[0]
        calls[f"{kind}, backward"] = lambda loss=loss, kept=kept: loss.backward(kept)
    for name, make in OPTIMIZERS.items():

        def step(make: Callable[[], Any] = make) -> Any:
            net.backward(net_Z, caches)
            optimizer = make()
            optimizer.step(net)
            return list(net.parameters().values())

        calls[f"{name}.step"] = step
    calls["evaluate"] = lambda: [evaluate(net, X, CLASSES, loss=SoftmaxCrossEntropy()), device.asarray(X)][1]
    return calls


def cupy_reshaped(x: Any) -> Any:
    with computing_on(x) as xp:
        return xp.reshape(x, (4, 10, 6))


def test_every_call_computes_where_its_arrays_are(cupy: Any) -> None:
    assert cupy.cuda.runtime.getDevice() == 0
    calls = on_cuda_1(cupy)
    for name, call in calls.items():
        try:
            with nothing_on(cupy, 0):
                result = call()
        except Exception as error:
            raise AssertionError(f"{name} fails while cuda:0 is current: {error}") from error
        for array in result if isinstance(result, list) else [result]:
            assert array.device.id == 1, name
            assert np.isfinite(cupy.asnumpy(array)).all(), name


def test_a_failing_call_restores_the_current_device_too(cupy: Any) -> None:
    layer = Linear(6, 3, device="cuda:1", dtype="float32")
    here = select_device("cuda:0").asarray(X)
    for bad in (here, select_device("cuda:1").asarray(X[:, :2]), X):
        with pytest.raises((TypeError, ValueError), match="X"):
            layer.forward(bad)
        assert cupy.cuda.runtime.getDevice() == 0
    with pytest.raises(ValueError, match=r"X is a cupy array on cuda:0 but W is a cupy array on cuda:1"):
        layer.forward(here)


def test_arrays_move_between_cards_that_cannot_reach_each_other(cupy: Any) -> None:
    zero, one = select_device("cuda:0"), select_device("cuda:1")
    for x in (X, X.T, X[::2, ::-1], X[:0], X[0, 0]):
        for dtype in (None, "float64"):
            there = one.asarray(zero.asarray(x), dtype=dtype)
            assert there.device.id == 1
            np.testing.assert_array_equal(cupy.asnumpy(there), np.asarray(x, dtype=dtype), strict=True)
    layer = Linear(6, 3, device=zero, dtype="float32", seed=0)
    moved = layer.to("cuda:1")
    assert (layer.W.device.id, moved.W.device.id, moved.b.device.id) == (0, 1, 1)
    np.testing.assert_array_equal(cupy.asnumpy(moved.W), cupy.asnumpy(layer.W))


@pytest.mark.stand_in
def test_moving_between_cards_makes_their_streams_wait_and_not_the_host(cupy: Any) -> None:
    from cupy_backends import cpu_counters as counters

    zero, one = select_device("cuda:0"), select_device("cuda:1")
    for x in (zero.asarray(X), zero.asarray(X)[:, ::2]):
        one.asarray(x)
        with counters.count() as asked:
            moved = one.asarray(x)
        assert (asked.device_to_host, asked.host_to_device, asked.synchronizations) == (0, 0, 0)
        np.testing.assert_array_equal(cupy.asnumpy(moved), cupy.asnumpy(x))


def test_moving_between_cards_is_ordered_by_events(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has no asynchrony, so what is told to the streams is written down: record, wait, copy, record, wait."""
    told: list[tuple[str, int]] = []

    class Event(cupy.cuda.Event):  # type: ignore[misc]
        def record(self, stream: Any = None) -> None:
            told.append(("record", cupy.cuda.runtime.getDevice()))
            super().record(stream)

    class Stream(cupy.cuda.Stream):  # type: ignore[misc]
        def wait_event(self, event: Any) -> None:
            told.append(("wait", cupy.cuda.runtime.getDevice()))
            super().wait_event(event)

    monkeypatch.setattr(cupy.cuda, "Event", Event)
    zero, one = select_device("cuda:0"), select_device("cuda:1")
    x = zero.asarray(X)
    with zero, Stream(non_blocking=True), one, Stream(non_blocking=True):
        one.asarray(x)
    assert told == [("record", 0), ("wait", 1), ("record", 1), ("wait", 0)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_stay_on_their_card_whatever_is_current(copied: Callable[[Any], Any], cupy: Any) -> None:
    net = model("cuda:1")
    Z, caches = net.forward(select_device("cuda:1").asarray(X))
    net.backward(Z, caches)
    with cupy.cuda.Device(0):
        other = copied(net)
    for name, p in net.parameters().items():
        q = other.parameters()[name]
        assert q.device.id == 1
        assert q is not p
        np.testing.assert_array_equal(cupy.asnumpy(q), cupy.asnumpy(p))
    assert other[0].dW.device.id == 1
    assert other[2] is other[4][0]
    assert other[0].device == net[0].device == select_device("cuda:1")


# Threads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [None, 0, 1], ids=["default", "0 current", "1 current"])
def test_two_threads_on_two_cards_at_once_get_what_serial_runs_get(outer: int | None, cupy: Any) -> None:
    serial = {spec: trained(spec, "cross-entropy", "Adam") for spec in ("cuda:0", "cuda:1")}
    at_once: dict[str, Any] = {}
    both = threading.Barrier(2, timeout=240)

    def run(spec: str) -> None:
        current: AbstractContextManager[Any] = nullcontext() if outer is None else cupy.cuda.Device(outer)
        with current:
            before = cupy.cuda.runtime.getDevice()
            both.wait()
            at_once[spec] = trained(spec, "cross-entropy", "Adam")
            both.wait()
            assert cupy.cuda.runtime.getDevice() == before
        at_once[f"{spec} is done"] = True

    threads = [threading.Thread(target=run, args=(spec,)) for spec in serial]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for spec, (parameters, score) in serial.items():
        assert at_once[f"{spec} is done"]
        assert_same_bits(parameters, at_once[spec][0])
        assert score == at_once[spec][1]


def test_one_layer_in_two_threads_with_other_current_devices(cupy: Any) -> None:
    layer = Linear(6, 3, device="cuda:1", dtype="float32", seed=0)
    x = select_device("cuda:1").asarray(X)
    expected = cupy.asnumpy(layer(x))
    results: list[np.ndarray] = []

    def run(current: int) -> None:
        cupy.cuda.runtime.setDevice(current)
        for _ in range(20):
            results.append(cupy.asnumpy(layer(x)))
        assert cupy.cuda.runtime.getDevice() == current
        results.append(expected)

    threads = [threading.Thread(target=run, args=(current,)) for current in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 42
    for result in results:
        np.testing.assert_array_equal(result, expected)
