"""LayerNorm: against PyTorch and against the bounds of rounding; its gradients by differences; what it refuses."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from anyarray_linear import Adam, Layer, LayerNorm, Linear, Sequential
from anyarray_linear.testing import gamma, gradcheck, unit_roundoff


def random(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def layer_on(backend, features, dtype, eps=1e-5):
    layer = LayerNorm(features, eps, dtype=dtype, device=backend.device)
    layer.W, layer.b = (backend.asarray(1 + 0.3 * random(features, seed=seed), dtype) for seed in (1, 2))
    return layer


def reference(x, w, b, dz, eps, wide=np.longdouble):
    """Everything in extended precision, by the definition; the gradient of `x` by the whole Jacobian, row by row."""
    x, w, b, dz = (a.astype(wide) for a in (x, w, b, dz))
    n = x.shape[-1]
    d = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt((d * d).mean(-1, keepdims=True) + wide(eps))
    h, dh = r * d, dz * w
    rows = (-1, n)
    J = r.reshape(-1, 1, 1) * (np.eye(n) - 1 / wide(n) - h.reshape(rows)[:, :, None] * h.reshape(rows)[:, None, :] / n)
    dX = np.einsum("ij,ijk->ik", dh.reshape(rows), J).reshape(x.shape)
    return {"Z": h * w + b, "dX": dX, "dW": (dz * h).reshape(rows).sum(0), "db": dz.reshape(rows).sum(0), "h": h, "r": r, "d": d}


def bounds(x, w, b, dz, exact, dtype):
    """How far results may be from the exact ones.

    The mean of n numbers is off by gamma_n mean|x|, so d by `e_d = gamma_{n+1} (mean|x| + |x|)`, absolutely. The variance is
    that of numbers off by e_d: relatively `2 e_d / |d|` in the mean, and `gamma_{n+2}` of its own; and r by half of that. With
    `e_r` for the relative error of r: h is off by `r e_d + |h| (e_r + 2u)`, and so on, product by product.
    """
    u = unit_roundoff("float32" if dtype == "float16" else dtype)
    out = 2 * unit_roundoff("float16") if dtype == "float16" else 0
    n, N = x.shape[-1], int(np.prod(x.shape[:-1]))
    x, w, b, dz = (np.abs(a.astype(np.float64)) for a in (x, w, b, dz))
    h, r, d = (np.abs(np.asarray(exact[name], np.float64)) for name in "hrd")
    mean = lambda a: a.mean(-1, keepdims=True)  # noqa: E731
    e_d = gamma(n + 2, u) * (mean(x) + x)
    e_r = r**2 * mean(d * e_d + e_d**2) + gamma(n + 6, u)
    e_h = 1.1 * (r * e_d + h * (e_r + 3 * u))
    Z = e_h * w + 3 * u * (h * w + b)
    dh = dz * w
    inner = dh + mean(dh) + h * mean(dh * h)
    e_inner = gamma(n + 6, u) * inner + e_h * mean(dh * h) + h * mean(dh * e_h)
    found = {
        "Z": Z + out * (h * w + b), "dX": 1.1 * r * (e_inner + inner * (e_r + 3 * u)) + out * r * inner,
        "dW": (dz * e_h).reshape(-1, n).sum(0) + (gamma(N + 2, u) + out) * (dz * h).reshape(-1, n).sum(0),
        "db": (gamma(N + 1, u) + out) * dz.reshape(-1, n).sum(0),
    }  # fmt: skip
    tiny = 8 * float(np.finfo(dtype).smallest_normal)
    return {name: 1.01 * value + tiny for name, value in found.items()}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(5,), (4, 33), (2, 3, 8), (1, 1), (64, 7)], ids=str)
@pytest.mark.parametrize(("shift", "eps"), [(0, 1e-5), (20, 1e-2)])
def test_all_results_are_within_the_bounds_of_rounding(backend, shape, dtype, shift, eps):
    if dtype not in backend.dtypes:
        pytest.skip(f"layers do not compute in {dtype} here")
    layer = layer_on(backend, shape[-1], dtype, eps)
    x, dz = (random(*shape) + shift).astype(dtype), random(*shape, seed=3, dtype=dtype)
    w, b = backend.to_numpy(layer.W), backend.to_numpy(layer.b)
    X = backend.asarray(x)
    Z, cache = layer.forward(X)
    dX, gradients = layer.gradients(backend.asarray(dz), cache)
    exact = reference(x, w, b, dz, eps)
    allowed = bounds(x, w, b, dz, exact, dtype)
    for name, found in {"Z": Z, "dX": dX, "dW": gradients["W"], "db": gradients["b"]}.items():
        assert backend.owns(found)
        assert found.dtype == X.dtype
        assert tuple(found.shape) == exact[name].shape
        error = np.abs(backend.to_numpy(found) - exact[name]).astype(np.float64)
        assert (error <= allowed[name]).all(), (name, float((error / allowed[name]).max()))
    assert np.array_equal(backend.to_numpy(layer(X)), backend.to_numpy(Z))
    assert np.array_equal(backend.to_numpy(X), x), "X was written to"


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)], ids=str)
def test_it_agrees_with_pytorch(shape):
    torch = pytest.importorskip("torch")
    layer = LayerNorm(6, eps=1e-3)
    layer.W, layer.b = random(6, seed=1), random(6, seed=2)
    twin = torch.nn.LayerNorm(6, eps=1e-3, dtype=torch.float64)
    twin.load_state_dict({"weight": torch.tensor(layer.W), "bias": torch.tensor(layer.b)})
    X, dZ = 3 * random(*shape) + 5, random(*shape, seed=4)
    Z, cache = layer.forward(X)
    dX, gradients = layer.gradients(dZ, cache)
    X_t = torch.tensor(X, requires_grad=True)
    Z_t = twin(X_t)
    Z_t.backward(torch.tensor(dZ))
    pairs = (Z, Z_t.detach()), (dX, X_t.grad), (gradients["W"], twin.weight.grad), (gradients["b"], twin.bias.grad)
    for ours, theirs in pairs:
        assert np.abs(ours - theirs.numpy()).max() < 1e-10


def test_gradients_are_those_of_forward(backend):
    layer = layer_on(backend, 7, "float64")
    gradcheck(layer, backend.asarray(random(4, 7)))
    options = {"device": backend.device, "dtype": "float64"}
    gradcheck(Sequential(Linear(5, 7, seed=0, **options), layer, Linear(7, 3, seed=1, **options)), backend.asarray(random(4, 5)))


def test_what_is_taken_out_of_the_gradient_moves_nothing():
    """A row moved as a whole, and one scaled (but for eps), is normalised to the same: no gradient along either."""
    layer, X = LayerNorm(9, eps=0.0), random(3, 9)
    _, cache = layer.forward(X)
    dX, _ = layer.gradients(random(3, 9, seed=1), cache)
    D = X - X.mean(-1, keepdims=True)
    assert np.abs(dX.sum(-1)).max() < 1e-13
    assert np.abs((dX * D).sum(-1)).max() < 1e-13


def test_large_float16_values_are_normalised_in_float32(backend):
    if "float16" not in backend.dtypes:
        pytest.skip("layers do not compute in float16 here")
    layer = LayerNorm(4, dtype="float16", device=backend.device)
    Z = backend.to_numpy(layer(backend.asarray([[300.0, -300.0, 60000.0, -60000.0]], "float16")))
    assert np.isfinite(Z).all()
    assert abs(Z.astype(float).std() - 1) < 1e-2


def test_it_is_a_layer(backend):
    layer = LayerNorm(3, dtype="float32", device=backend.device)
    assert isinstance(layer, Layer)
    assert list(layer.parameters()) == ["W", "b"]
    assert np.array_equal(backend.to_numpy(layer.W), np.ones(3))
    assert np.array_equal(backend.to_numpy(layer.b), np.zeros(3))
    assert layer.dW is layer.db is None
    assert layer.features == 3
    assert layer.device == backend.device
    assert layer.config() == {"features": 3, "eps": 1e-5}
    X = backend.asarray(random(4, 3), "float32")
    Z, cache = layer.forward(X)
    layer.backward(X, cache)
    first = backend.to_numpy(layer.dW)
    layer.backward(X, cache, accumulate=True)
    assert np.array_equal(backend.to_numpy(layer.dW), 2 * first)
    assert layer.backward(X, cache, needs_dX=False) is None
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to()):
        assert twin.W is not layer.W
        assert np.array_equal(backend.to_numpy(twin(X)), backend.to_numpy(Z))
        assert repr(twin) == repr(layer)


def test_training_a_moved_layer_leaves_the_first_as_it_is():
    layer = LayerNorm(3)
    twin = layer.to()
    Z, cache = twin.forward(random(4, 3))
    twin.backward(np.ones_like(Z), cache)
    Adam().step(twin)
    assert np.array_equal(layer.b, np.zeros(3))
    assert not np.array_equal(twin.b, np.zeros(3))


def test_what_does_not_fit_is_refused(backend):
    layer = LayerNorm(3, dtype="float32", device=backend.device)
    for shape in ((), (2,), (3, 4)):
        with pytest.raises(ValueError, match=r"^X has shape .* features = 3"):
            layer(backend.asarray(np.ones(shape), "float32"))
    with pytest.raises(TypeError, match=r"^X is float64 but W is float32"):
        layer(backend.asarray(np.ones(3), "float64"))
    with pytest.raises(TypeError, match=r"^X is int32"):
        layer(backend.asarray(np.ones(3), "int32"))
    _, cache = layer.forward(backend.asarray(np.ones((2, 3)), "float32"))
    with pytest.raises(ValueError, match=r"^dZ has shape"):
        layer.gradients(backend.asarray(np.ones(3), "float32"), cache)
    with pytest.raises(TypeError, match=r"^cache is"):
        layer.gradients(backend.asarray(np.ones((2, 3)), "float32"), {"H": 1})
    with pytest.raises(ValueError, match=r"^W has shape"):
        LayerNorm(4, dtype="float32", device=backend.device).gradients(backend.asarray(np.ones((2, 3)), "float32"), cache)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [((0,), ValueError, "features"), ((2.5,), TypeError, "features"), ((True,), TypeError, "features"),
     ((3, -1.0), ValueError, "eps"), ((3, "a"), TypeError, "eps")],
)  # fmt: skip
def test_arguments_that_are_wrong_are_named(arguments, error, match):
    with pytest.raises(error, match=f"^{match} is"):
        LayerNorm(*arguments)


def test_a_frozen_layer_gives_the_gradient_of_its_input_alone(backend):
    layer = layer_on(backend, 5, "float64")
    X, dZ = backend.asarray(random(4, 5)), backend.asarray(random(4, 5, seed=2))
    _, cache = layer.forward(X)
    expected, _ = layer.gradients(dZ, cache)
    layer.trainable = False
    dX, gradients = layer.gradients(dZ, cache)
    assert gradients == {}
    assert np.array_equal(backend.to_numpy(dX), backend.to_numpy(expected))
    assert layer.gradients(dZ, cache, needs_dX=False) == (None, {})
    layer.backward(dZ, cache)
    assert layer.dW is None
