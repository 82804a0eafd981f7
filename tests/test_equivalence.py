"""One code, every backend: the layer against the float64 reference, judged by the bounds of rounding-error theory."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_api_compat import array_namespace
from conftest import Unavailable, make_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anyarray_linear import SGD, Linear, MeanSquaredError, Sequential, Tanh, TrainingStep, fit
from anyarray_linear.testing import adjoint_check, assert_equivalent, compare, gamma, gradcheck, linear_error_bounds

OUTPUTS = ("Z", "dX", "dW", "db")


def random_arrays(batch, in_features, out_features, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (*batch, in_features), (out_features, in_features), (1, out_features), (*batch, out_features)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def layer_on(backend, W, b=None):
    return Linear.from_arrays(backend.asarray(W), None if b is None else backend.asarray(b))


# --- the layer, alone


@pytest.mark.parametrize("batch", [(), (1,), (9,), (2, 3), (4, 1, 2), (0,), (2, 0, 3)], ids=str)
def test_any_number_of_batch_axes_gives_the_right_outputs(backend, batch):
    for dtype in backend.dtypes:
        for in_features, out_features in ((1, 1), (5, 3), (4, 4)):
            X, W, b, dZ = random_arrays(batch, in_features, out_features, dtype)
            assert_equivalent(layer_on(backend, W, b), X, dZ, [backend.device])
            assert_equivalent(layer_on(backend, W), X, dZ, [backend.device])


@settings(max_examples=25)
@given(data=st.data())
def test_hard_limit_holds_for_any_shape_and_values(backend, data):
    # few distinct shapes, because JAX compiles anew for each
    batch = data.draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 0), (2, 1, 2), (0, 2, 2)]))
    in_features, out_features = data.draw(st.sampled_from([(1, 5), (3, 2), (6, 1)]))
    dtype = data.draw(st.sampled_from(backend.dtypes))
    bits = np.finfo(dtype).bits
    values = st.floats(allow_nan=False, allow_infinity=False, width=bits)
    X, W, b, dZ = (
        data.draw(hnp.arrays(dtype, shape, elements=values))
        for shape in ((*batch, in_features), (out_features, in_features), (1, out_features), (*batch, out_features))
    )
    with np.errstate(all="ignore"):
        assert_equivalent(layer_on(backend, W, b), X, dZ, [backend.device])


def test_strided_arrays_give_the_right_outputs(backend):
    X, W, b, dZ = random_arrays((3, 8), 10, 12)
    views = {
        "every second row": lambda x: x[:, ::2, ...],
        "first rows": lambda x: x[:, :3, ...],
        "axes exchanged": lambda x: array_namespace(x).permute_dims(x, (1, 0, 2)),
        "broadcast": lambda x: array_namespace(x).broadcast_to(x[:1, ...], x.shape),
    }
    layer = layer_on(backend, W.T[::2].T.copy(), b)  # 5 features: every second feature of X below
    for view in views.values():
        with backend.computing():
            there = [view(backend.asarray(x)) for x in (X[..., ::2], dZ)]
            narrow = view(backend.asarray(X))[..., ::2]
        assert_equivalent(layer, there[0], there[1], [backend.device])
        assert_equivalent(layer, narrow, there[1], [backend.device])


def test_weights_of_any_strides_give_the_right_outputs(backend):
    X, W, b, dZ = random_arrays((7,), 6, 6)
    with backend.computing():
        layer = Linear.from_arrays(backend.asarray(W).T, backend.asarray(np.repeat(b, 2, axis=1))[:, ::2])
    assert_equivalent(layer, X, dZ, [backend.device])


def test_no_argument_is_ever_written_to(backend):
    X, W, b, dZ = random_arrays((4,), 3, 5)
    arrays = [backend.asarray(x) for x in (X, W, b, dZ)]
    layer = Linear.from_arrays(arrays[1], arrays[2])
    _, cache = layer.forward(arrays[0])
    layer.backward(arrays[3], cache)
    layer.backward(arrays[3], cache, accumulate=True)
    for before, now in zip((X, W, b, dZ), arrays, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(now), before)


def test_every_cache_serves_its_own_forward(backend):
    (X1, W, b, dZ1), (X2, _, _, dZ2) = (random_arrays((4,), 3, 5, seed=seed) for seed in (0, 1))
    layer = layer_on(backend, W, b)
    X1, X2, dZ1, dZ2 = map(backend.asarray, (X1, X2, dZ1, dZ2))
    _, cache1 = layer.forward(X1)
    _, cache2 = layer.forward(X2)
    for X, dZ, cache in ((X1, dZ1, cache1), (X2, dZ2, cache2)):
        dW = backend.to_numpy(layer.gradients(dZ, cache)[1]["W"]).astype(np.float64)
        exact = backend.to_numpy(dZ).astype(np.float64).T @ backend.to_numpy(X).astype(np.float64)
        assert np.all(np.abs(dW - exact) <= linear_error_bounds(X, layer.W, dZ=dZ)["dW"])


def test_backward_stores_what_gradients_returns_and_accumulate_adds_it(backend):
    X, W, b, dZ = random_arrays((4,), 3, 5)
    layer = layer_on(backend, W, b)
    _, cache = layer.forward(backend.asarray(X))
    dX, gradients = layer.gradients(backend.asarray(dZ), cache)
    assert layer.dW is None
    for times in (1, 2):  # twice the same number is exact in binary
        stored_dX = layer.backward(backend.asarray(dZ), cache, accumulate=times == 2)
        np.testing.assert_array_equal(backend.to_numpy(stored_dX), backend.to_numpy(dX))
        for p in ("W", "b"):
            stored = getattr(layer, f"d{p}")
            assert backend.owns(stored)
            np.testing.assert_array_equal(backend.to_numpy(stored), times * backend.to_numpy(gradients[p]))


def test_gradients_are_those_of_the_forward_pass(backend):
    X, W, b, _ = random_arrays((3, 4), 6, 5, "float64")
    gradcheck(layer_on(backend, W, b), backend.asarray(X))


def test_backward_is_the_adjoint_of_forward(backend):
    X, W, b, _ = random_arrays((3, 4), 6, 5)
    adjoint_check(layer_on(backend, W, b), backend.asarray(X))


@pytest.mark.parametrize("backend", ["cupy:0", "cupy:1", "torch"], indirect=True)
def test_float16_bias_gradient_of_many_equal_terms_does_not_stall(backend):
    # the float16 after 2048 is 2050, so a running sum in float16 stays at 2048 for ever
    W, dZ = np.ones((1, 1), dtype=np.float16), np.ones((4096, 1), dtype=np.float16)
    assert_equivalent(layer_on(backend, W, W), dZ, dZ, [backend.device])


def test_many_threads_share_a_layer(backend):
    W, b = random_arrays((), 16, 8)[1:3]
    layer = layer_on(backend, W, b)
    all_went_forward = threading.Barrier(6)

    def outputs(seed, wait=all_went_forward.wait):
        X, _, _, dZ = random_arrays((5,), 16, 8, seed=seed)
        Z, cache = layer.forward(backend.asarray(X))
        wait(timeout=240)
        dX, gradients = layer.gradients(backend.asarray(dZ), cache)
        return [backend.to_numpy(x) for x in (Z, dX, gradients["W"], gradients["b"])]

    alone = [outputs(seed, wait=lambda timeout: None) for seed in range(24)]
    with backend.around(), ThreadPoolExecutor(6) as pool:
        together = list(pool.map(outputs, range(24)))
    for expected, found in zip(alone, together, strict=True):
        for x, y in zip(expected, found, strict=True):
            np.testing.assert_array_equal(x, y)


def test_correct_results_use_less_than_half_of_the_sharp_gate_in_1000_random_cases(backend, request):
    """In float32 and float64. Not in float16: its gate is nearly all the one rounding of a result, whose error has no others
    to cancel with and comes as near to `2^-11 |Z|` as the values allow, which for terms of one sign is the whole gate."""
    shapes = [((), 5, 3), ((1,), 1, 1), ((6,), 4, 4), ((2, 3), 12, 5), ((3,), 512, 2), ((40,), 16, 8), ((2, 2, 2), 3, 9),
              ((200,), 2, 2), ((16,), 64, 10), ((7,), 33, 65)]  # fmt: skip
    rng = np.random.default_rng(0)
    shares = {name: np.empty(1000) for name in OUTPUTS}
    for case in range(1000):
        batch, in_features, out_features = shapes[case % len(shapes)]
        dtype = ("float32", "float64")[case // len(shapes) % 2]
        draw = rng.standard_normal if case // 20 % 2 else rng.random  # of both signs, and all of one
        layer = layer_on(backend, draw((out_features, in_features)).astype(dtype), draw((1, out_features)).astype(dtype))
        found = compare(layer, draw((*batch, in_features)), draw((*batch, out_features)), backend.device, sharp=True)
        for agreement in found:
            shares[agreement.output][case] = agreement.sharp_share
    for name, values in shares.items():
        quantiles = "  ".join(f"{q}% {np.percentile(values, q):6.1%}" for q in (50, 90, 99, 100))
        request.node.user_properties.append(
            ("print", f"share of the sharp gate, {backend.name:>14} {name:>2}, 1000 cases: {quantiles}")
        )
        assert values.max() < 0.5, name


# --- arrays that do not belong together


def foreign_to(backend):
    """A backend with arrays that must not be mixed with those of `backend`."""
    others = {"strict": "strict-device1", "strictest": "strict-device1", "strict-device1": "strict", "cupy:0": "cupy:1"}
    others["cupy:1"] = "cupy:0"
    try:
        return make_backend(others.get(backend.name, "strict"))
    except Unavailable:  # one CUDA device only
        return make_backend("numpy")


def test_mixing_namespaces_or_devices_raises_at_the_door_naming_the_argument(backend):
    X, W, b, dZ = random_arrays((4,), 3, 5)
    other = foreign_to(backend)
    layer = layer_on(backend, W, b)
    with pytest.raises((TypeError, ValueError), match=r"^X is a .* but W is a .*asarray\(X\)"):
        layer.forward(other.asarray(X))
    with pytest.raises((TypeError, ValueError), match=r"^b is a .* but W is a .*asarray\(b\)"):
        Linear.from_arrays(backend.asarray(W), other.asarray(b))
    _, cache = layer.forward(backend.asarray(X))
    with pytest.raises((TypeError, ValueError), match=r"^dZ is a .* but W is a .*asarray\(dZ\)"):
        layer.backward(other.asarray(dZ), cache)
    assert layer.dW is None


def test_mixing_dtypes_raises_at_the_door_naming_the_argument(backend):
    X, W, b, dZ = random_arrays((4,), 3, 5)
    layer = layer_on(backend, W, b)
    with pytest.raises(TypeError, match=r"^X is float64 but W is float32; cast it with"):
        layer.forward(backend.asarray(X, "float64"))
    _, cache = layer.forward(backend.asarray(X))
    with pytest.raises(TypeError, match=r"^dZ is float64 but W is float32; cast it with"):
        layer.gradients(backend.asarray(dZ, "float64"), cache)


# --- seeds


@pytest.mark.parametrize("init", ["he_normal", "he_uniform", "xavier_normal", "lecun_normal", "pytorch"])
def test_one_seed_gives_bit_identical_weights_on_every_backend(backend, init):
    for dtype in backend.dtypes:
        layer = Linear(7, 4, init=init, dtype=dtype, device=backend.device, seed=3)
        drawn = Linear(7, 4, init=init, dtype="float64", seed=3)
        assert backend.owns(layer.W)
        assert backend.owns(layer.b)
        np.testing.assert_array_equal(backend.to_numpy(layer.W), drawn.W.astype(dtype))
        np.testing.assert_array_equal(backend.to_numpy(layer.b), drawn.b.astype(dtype))


class Recorder:
    """A layer that keeps the first feature of every batch it sees."""

    def __init__(self, backend):
        self.backend, self.seen = backend, []

    def forward(self, X):
        assert self.backend.owns(X)
        self.seen.append(self.backend.to_numpy(X)[:, 0].tolist())
        return X, None

    def gradients(self, dZ, cache, *, needs_dX=True):
        return dZ, {}

    def backward(self, dZ, cache, *, accumulate=False, needs_dX=True):
        return dZ

    def parameters(self):
        return {}

    def to(self, device=None, dtype=None):
        return self

    def __call__(self, X):
        return X


def batches_of_fit(place, on_device):
    """The first features of every batch that `fit` makes of 23 rows, which count from 0."""
    X, y = np.stack([np.arange(23.0), np.ones(23)], axis=1).astype(np.float32), np.zeros((23, 1), dtype=np.float32)
    recorder = Recorder(place)
    model = Sequential(recorder, Linear(2, 1, dtype="float32", device=place.device, seed=0))
    data = (place.asarray(X), place.asarray(y)) if on_device else (X, y)
    fit(model, *data, loss=MeanSquaredError(), optimizer=SGD(1e-4), epochs=2, batch_size=5, seed=7, progress=False)
    return recorder.seen


@pytest.mark.parametrize("on_device", [False, True], ids=["data on the host", "data on the device"])
def test_fit_gives_every_backend_the_same_batches(backend, on_device):
    batches = batches_of_fit(backend, on_device)
    assert batches == batches_of_fit(make_backend("numpy"), False)
    assert sorted(row for batch in batches[:5] for row in batch) == list(range(23))
    assert batches[:5] != batches[5:]


# --- a whole training run


class Interval:
    """A value, and how far its float32 computation may be off: a running error analysis (Higham 2002, section 3.3).

    Every operation adds the error of its operands, carried through it, and its own roundings.
    """

    u = 2**-24

    def __init__(self, value, error=0.0):
        self.value = np.asarray(value, dtype=np.float64)
        self.error = error + np.zeros_like(self.value)

    @property
    def size(self):
        return np.abs(self.value) + self.error

    @property
    def T(self):
        return Interval(self.value.T, self.error.T)

    def __add__(self, other):
        return Interval(self.value + other.value, self.error + other.error + self.u * (self.size + other.size))

    def __sub__(self, other):
        return self + Interval(-other.value, other.error)

    def __mul__(self, other):
        other = Interval(other, self.u * abs(other)) if isinstance(other, float) else other
        value, size = self.value * other.value, self.size * other.size
        return Interval(value, size - np.abs(value) + self.u * size)

    def __matmul__(self, other):
        size, terms = self.size @ other.size, self.value.shape[1]
        carried = size - np.abs(self.value) @ np.abs(other.value)
        return Interval(self.value @ other.value, carried + gamma(terms, self.u) * size)

    def tanh(self):
        # its slope is at most 1; libraries compute it to a few units in the last place, 16 are allowed here
        return Interval(np.tanh(self.value), self.error + 32 * self.u * np.abs(np.tanh(self.value)))


class Training:
    """Training of a small network, in any arithmetic, and how far 50 float32 steps may end from 50 exact ones.

    A step is a smooth map of the state (weights and velocities), `s' = F(s)`. Computed, it is off by at most `e_t`, which
    the running error analysis gives. To first order, later steps multiply that by their Jacobians `J`, so in the end

        |s - s_exact| <= sum_t |J_49 ... J_{t+1}| e_t

    What is of second order is a square of errors of about 1e-6, and 1 % is added for it.
    """

    lr, momentum, steps = 0.1, 0.5, 50

    def __init__(self):
        rng = np.random.default_rng(1)
        self.X, self.Y = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 6), (32, 2)))
        layers = self.model("cpu").parameters()
        self.places = [(kind + name, value.shape) for kind in ("", "velocity of ") for name, value in layers.items()]
        state = np.concatenate([*(value.ravel() for value in layers.values()), *(0 * v.ravel() for v in layers.values())])
        state = state.astype(np.float64)
        jacobians, errors, h = [], [], 1e-5
        for _ in range(self.steps):
            stepped = self.step({name: Interval(value) for name, value in self.named(state).items()}, Interval)
            errors.append(np.concatenate([stepped[name].error.ravel() for name, _ in self.places]))
            moved = [(self.flat_step(state + h * e) - self.flat_step(state - h * e)) / (2 * h) for e in np.eye(len(state))]
            jacobians.append(np.stack(moved, axis=1))
            state = self.flat_step(state)
        bound, product = np.zeros(len(state)), np.eye(len(state))
        for jacobian, error in zip(reversed(jacobians), reversed(errors), strict=True):
            bound += np.abs(product) @ error
            product = product @ jacobian
        self.exact, self.bound = self.named(state), self.named(1.01 * bound)

    @staticmethod
    def model(device):
        options = {"init": "xavier_normal", "dtype": "float32", "device": device}
        return Sequential(Linear(6, 8, seed=0, **options), Tanh(), Linear(8, 2, seed=1, **options))

    def named(self, flat):
        ends = np.cumsum([math.prod(shape) for _, shape in self.places])
        parts = np.split(flat, ends[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.places, parts, strict=True)}

    def flat_step(self, flat):
        stepped = self.step(self.named(flat), np.asarray)
        return np.concatenate([stepped[name].ravel() for name, _ in self.places])

    def step(self, s, number):
        """One step by the book, for NumPy arrays or `Interval`s."""
        X, Y, ones, one = map(number, (self.X.astype(float), self.Y.astype(float), np.ones((1, 32)), np.ones((32, 8))))
        A = X @ s["0.W"].T + s["0.b"]
        A = A.tanh() if number is Interval else np.tanh(A)
        dZ = (A @ s["2.W"].T + s["2.b"] - Y) * (2 / self.Y.size)
        dA = (dZ @ s["2.W"]) * (one - A * A)
        gradients = {"0.W": dA.T @ X, "0.b": ones @ dA, "2.W": dZ.T @ A, "2.b": ones @ dZ}
        velocity = {name: s["velocity of " + name] * self.momentum + gradient for name, gradient in gradients.items()}
        new = {name: s[name] - velocity[name] * self.lr for name in gradients}
        return new | {"velocity of " + name: v for name, v in velocity.items()}


@pytest.fixture(scope="module")
def training():
    return Training()


@pytest.mark.parametrize("taken", ["by hand", "TrainingStep"])
def test_training_for_50_steps_stays_within_the_propagated_bound(backend, training, request, taken):
    model, loss = training.model(backend.device), MeanSquaredError()
    optimizer = SGD(training.lr, momentum=training.momentum)
    X, Y = backend.asarray(training.X), backend.asarray(training.Y)
    losses, shares, step = [], [], TrainingStep(model, loss, optimizer)
    for _ in range(training.steps):
        if taken == "TrainingStep":  # captured or compiled where it can be
            losses.append(float(step(X, Y)))
            continue
        Z, caches = model.forward(X)
        value, cache = loss.forward(Z, Y)
        losses.append(float(value))
        model.backward(loss.backward(cache), caches, needs_dX=False)
        optimizer.step(model)
    assert losses[-1] < 0.7 * losses[0]
    for name, value in model.parameters().items():
        assert backend.owns(value)
        error, bound = np.abs(backend.to_numpy(value) - training.exact[name]), training.bound[name]
        assert bound.max() < 2e-4  # it says something: the weights are of size 1
        shares.append(float(np.max(error / bound)))
    request.node.user_properties.append(
        ("print", f"50 training steps {taken}, {backend.name:>14}: {max(shares):.1%} of the propagated bound")
    )
    assert max(shares) <= 1
