"""Dropout: the mask is that of the recipe on every backend, its numbers look random, and a run goes on exactly."""

from __future__ import annotations

import copy
import math
import pickle
import threading

import numpy as np
import pytest

from anyarray_linear import Dropout, Layer, Linear, Sequential
from anyarray_linear.dropout import keep_mask, mask_key
from anyarray_linear.testing import gradcheck


def by_the_recipe(count, rate, seed, step):
    """The mask as the module's docstring writes it, in Python's integers."""

    def halved(x):
        x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
        return (x ^ x >> 15) * 0x735A2D97 % 2**32

    def hashed(x):
        x = halved(x)
        return x ^ x >> 15

    a = 0
    for word in (seed % 2**32, seed >> 32, step % 2**32, step >> 32):
        a = hashed(((a ^ word) + 0x9E3779B9) % 2**32)
    b = hashed((a + 0x9E3779B9) % 2**32)
    return np.asarray([halved(halved((i + a) % 2**32) ^ b) >> 8 >= round(rate * 2**24) for i in range(count)])


def mask(seed, step, rate=0.5, count=1 << 18):
    import array_api_compat.numpy as xp

    return keep_mask(xp, np.empty(count), rate, *mask_key(seed, step))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (40, 5, 3)], ids=str)
def test_every_backend_has_the_mask_of_the_recipe(backend, shape, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"layers do not compute in {dtype} here")
    for rate, seed, step in ((0.5, 0, 0), (0.1, 3, 1), (0.9, 2**63 - 1, 2**40 + 5), (0.0, 1, 1)):
        layer = Dropout(rate, seed=seed)
        layer.step = step
        x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        X = backend.asarray(x)
        K = by_the_recipe(math.prod(shape), rate, seed, step).reshape(shape)
        Z, cache = layer.forward(X)
        dX, gradients = layer.gradients(X, cache)
        assert layer.step == step + 1
        assert gradients == {}
        factor = np.asarray(1 / (1 - rate), dtype)
        for found in (Z, dX):
            assert found.dtype == X.dtype
            assert tuple(found.shape) == shape
            assert backend.owns(found)
            # the factor is rounded or not, as the library has it, and the product is: two roundings
            error = np.abs(backend.to_numpy(found).astype(float) - np.where(K, x * factor.astype(float), 0))
            assert (error <= 2 * np.finfo(dtype).eps * np.abs(x * factor.astype(float))).all()
        assert layer(X) is X
        assert np.array_equal(backend.to_numpy(X), x), "X was written to"


def test_an_infinite_gradient_does_not_pass_where_nothing_was_kept(backend):
    layer = Dropout(0.5, seed=0)
    X = backend.asarray(np.full(64, np.inf), "float32")
    Z, _ = layer.forward(X)
    assert set(backend.to_numpy(Z)) == {0, np.inf}


def normal(count, of, rate):
    """How many standard deviations `count` kept elements of `of` are from the mean."""
    return (count - of * (1 - rate)) / math.sqrt(of * rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_share_kept_is_that_of_independent_draws(rate):
    """2000 masks each: their scores have mean 0 and variance 1, within five of their own standard deviations."""
    for masks in ((mask(7, step, rate, 4096) for step in range(2000)), (mask(seed, 3, rate, 4096) for seed in range(2000))):
        z = np.asarray([normal(K.sum(), 4096, rate) for K in masks])
        assert abs(z.mean()) < 5 / math.sqrt(2000)
        assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / 2000)


def signs(seed, step):
    return np.where(mask(seed, step), 1, -1)


def test_neighbours_steps_and_seeds_are_not_correlated():
    S = signs(0, 0)
    sums = [(S[lag:] @ S[:-lag]) / math.sqrt(len(S) - lag) for lag in (1, 2, 3, 4, 8, 16, 64, 100, 128, 1000, 1024, 65536)]
    others = [(0, 1), (0, 2), (0, 2**16), (0, 2**32), (1, 0), (2, 0), (2**32, 0), (1, 1), (3, 9)]
    sums += [(S @ signs(*other)) / math.sqrt(len(S)) for other in others]
    assert np.abs(sums).max() < 5  # each is a standard normal, to the eye
    spectrum = np.abs(np.fft.rfft(S))[1:-1] ** 2 / len(S)  # each an exponential of mean 1
    assert spectrum.max() < math.log(len(S)) + 12


def test_an_element_is_kept_independently_from_step_to_step():
    M = np.stack([mask(9, step, 0.25, 256) for step in range(2000)]).astype(float)
    z = normal(M.sum(0), 2000, 0.25)
    assert np.abs(z).max() < 5
    correlations = np.corrcoef(M.T)[~np.eye(256, dtype=bool)] * math.sqrt(2000)
    assert abs(correlations.std() - 1) < 0.05
    assert np.abs(correlations).max() < 6


def test_pairs_of_steps_are_no_shifted_copies():
    """With a key that is only added, the mask of one step would be that of another, some elements on."""
    S = np.fft.rfft(signs(5, 0)[:65536])
    for step in range(1, 20):
        shifted = np.fft.irfft(S * np.conj(np.fft.rfft(signs(5, step)[:65536]))) / 256
        assert np.abs(shifted).max() < 6.5


def test_seeds_of_every_kind():
    assert Dropout(0.5, seed=3).seed == 3
    assert Dropout(0.5, seed=2**80).seed == Dropout(0.5, seed=2**80).seed < 2**63
    assert Dropout(0.5).seed != Dropout(0.5).seed
    rng = np.random.default_rng(0)
    children = [Dropout(0.5, seed=rng).seed for _ in range(2)]
    assert children[0] != children[1]
    rng = np.random.default_rng(0)
    assert [Dropout(0.5, seed=rng).seed for _ in range(2)] == children
    for wrong in (-1, 0.5, True, "a"):
        with pytest.raises((TypeError, ValueError), match=r"^seed is"):
            Dropout(0.5, seed=wrong)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, 2, "0.5", None, True, math.nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises((TypeError, ValueError), match=r"^rate is"):
        Dropout(rate)


def test_it_is_a_layer_whose_state_is_its_seed_and_step(backend):
    layer = Dropout(0.5, seed=4)
    X = backend.asarray(np.ones((8, 8)), "float32")
    layer.forward(X)
    assert isinstance(layer, Layer)
    assert layer.parameters() == {}
    assert layer.state() == {"seed": 4, "step": 1}
    assert layer.config() == {"rate": 0.5}
    other = Dropout(0.5, seed=99)
    other.seed, other.step = layer.state().values()
    copies = [layer.to(backend.device, "float32"), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other]
    expected = backend.to_numpy(layer.forward(X)[0])
    for twin in copies:
        assert np.array_equal(backend.to_numpy(twin.forward(X)[0]), expected)
        assert twin.step == 2


def test_every_forward_of_many_threads_has_a_mask_of_its_own():
    layer, X, masks = Dropout(0.5, seed=0), np.ones(4096, "float32"), []

    def work():
        for _ in range(50):
            masks.append(layer.forward(X)[1]["K"].tobytes())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layer.step == 400
    assert sorted(masks) == sorted(mask(0, step, 0.5, 4096).tobytes() for step in range(400))


def test_what_does_not_fit_is_refused(backend):
    layer = Dropout(0.5, seed=0)
    with pytest.raises(TypeError, match=r"^X is"):
        layer.forward(backend.asarray([1], "int64"))
    assert layer.step == 0, "a pass that was refused counts for nothing"
    _, cache = layer.forward(backend.asarray(np.ones((2, 3)), "float32"))
    with pytest.raises(ValueError, match=r"^dZ has shape"):
        layer.gradients(backend.asarray(np.ones(3), "float32"), cache)
    with pytest.raises(TypeError, match=r"^cache is"):
        layer.gradients(backend.asarray(np.ones(3), "float32"), {})
    assert layer.gradients(backend.asarray(np.ones((2, 3)), "float32"), cache, needs_dX=False) == (None, {})


def test_it_agrees_with_pytorch_s_definition():
    torch = pytest.importorskip("torch")
    X = np.random.default_rng(0).standard_normal((30, 20))
    layer = Dropout(0.3, seed=0)
    Z, cache = layer.forward(X)
    X_t = torch.tensor(X, requires_grad=True)
    Z_t = X_t * torch.tensor(cache["K"]) / (1 - 0.3)  # torch.nn.functional.dropout, with this mask
    Z_t.backward(torch.tensor(X))
    assert np.abs(Z - Z_t.detach().numpy()).max() < 1e-10
    assert np.abs(layer.gradients(X, cache)[0] - X_t.grad.numpy()).max() < 1e-10


def test_inside_a_model_inference_drops_nothing():
    model = Sequential(Linear(4, 8, seed=0), Dropout(0.5, seed=0), Linear(8, 2, seed=1))
    X = np.random.default_rng(0).standard_normal((5, 4))
    assert np.array_equal(model(X), Sequential(model[0], model[2])(X))
    Z, caches = model.forward(X)
    assert not np.array_equal(Z, model(X))
    _, gradients = model.gradients(np.ones_like(Z), caches)
    assert list(gradients) == ["0.W", "0.b", "2.W", "2.b"]


def test_its_gradient_is_that_of_forward_with_the_mask_of_the_next_step():
    model = Sequential(Linear(4, 8, seed=0), Dropout(0.5, seed=0), Linear(8, 2, seed=1))
    model[1].step = 5
    gradcheck(model, np.random.default_rng(0).standard_normal((5, 4)))
    assert model[1].step == 5
